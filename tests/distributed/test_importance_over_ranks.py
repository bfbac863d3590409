"""Importance on real ranks: it changes no hidden state, only which bytes they become."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.importance.files import TokenOwner, write_head_relevance, write_token_importance
from pipeline.importance.metrics import METRICS, AttentionMetric
from pipeline.models.weight_files import checkpoint_fingerprint
from pipeline.partition.plan import default_plan
from pipeline.records.store import read_per_token, read_record
from tests.distributed.test_equality import LENGTH, check, overrides, run_cases
from tests.helpers.launch import run_alone, run_ranks
from tests.helpers.tiny_models import tiny_arguments, tiny_model, write_text
from tests.unit.test_hf_model import SIZES

FILES = ("head_weighted", "head_weighted_causal", "oracle")


def record_of(case):
    (path,) = Path(case["exp_dir"]).glob("*.json")
    return read_record(path), read_per_token(path)


def codec(metric, high="int8", low="int4"):
    return f"token_mixed(metric={metric}, fraction=0.25, high={high}, low={low})"


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox", "gemma3_text"])
def test_hidden_states_are_bit_equal_with_every_metric_that_reads_the_stage(model_type, tmp_path):
    text = write_text(tmp_path / "text", LENGTH * 3)
    model = tiny_model(model_type)
    relevance = tmp_path / "heads"
    write_head_relevance(relevance, torch.rand(6, 4) + 0.1, checkpoint_fingerprint=checkpoint_fingerprint(model))
    cases = {
        f"{metric} {layers}": overrides(
            model,
            text,
            tmp_path / f"{metric} {layers}",
            2,
            partition__wrap=False,
            compressor=codec(metric, "none", "none"),
            importance__layers=layers,
            importance__head_weights=str(relevance),
        )
        for metric, cls in METRICS.items()
        for layers in ("last", "all")
        if metric != "oracle" and (layers == "last" or issubclass(cls, AttentionMetric))
    }
    run_cases(2, cases)
    for name, case in cases.items():
        record = check(case)
        (link,) = record.traffic_per_link.values()
        assert link.bytes == 3 * (LENGTH * 64 * 4 + LENGTH // 8), name
        assert record.stages["0"].importance_s > 0 == record.stages["1"].importance_s
        assert record.stages["0"].compute_s > 0
        assert record.causal is (name.split()[0] in ("random", "uniform"))


def test_ranks_and_one_process_choose_the_same_tokens_and_the_choice_matters(tmp_path):
    text = write_text(tmp_path / "text", LENGTH * 5 + 7)
    folders = {(name, place): tmp_path / f"{name}-{place}" for name in METRICS for place in ("alone", "ranks")}
    model = tiny_model(num_layers=8)  # in the plan of four nodes with wrap, every sending stage has layers
    relevance, oracle = tmp_path / "heads", tmp_path / "oracle"
    checkpoint = checkpoint_fingerprint(model)
    torch.manual_seed(0)
    write_head_relevance(relevance, torch.rand(8, 4) ** 8 + 1e-3, checkpoint_fingerprint=checkpoint)
    first = overrides(model, text, tmp_path / "first", 4, dataset__stride=20, batch_size=2)
    run_cases(1, {"first": first})
    record, _ = record_of(first)
    write_token_importance(
        oracle,
        {link.name: torch.rand(record.results.total_processed_tokens) for link in default_plan(8, 4).links},
        TokenOwner(
            checkpoint_fingerprint=checkpoint,
            ids_sha256=record.dataset.ids_sha256,
            **{key: getattr(record.protocol, key) for key in ("max_length", "stride", "bos")},
        ),
    )
    cases = {
        (name, place): {
            **first,
            "exp_dir": str(folder),
            "compressor": codec(name, "int8", "int2"),
            "importance.head_weights": str(relevance),
            "importance.oracle": str(oracle),
        }
        for (name, place), folder in folders.items()
    }
    for folder in folders.values():
        folder.mkdir()
    run_cases(1, {name: case for (name, place), case in cases.items() if place == "alone"})
    run_cases(4, {name: case for (name, place), case in cases.items() if place == "ranks"})
    losses = {}
    for name in METRICS:
        (alone, alone_tokens), (ranks, tokens) = record_of(cases[name, "alone"]), record_of(cases[name, "ranks"])
        assert all(np.array_equal(tokens[key], alone_tokens[key]) for key in tokens), name
        for key in ("results", "traffic_totals", "digest", "codecs", "importance"):
            assert getattr(alone, key) == getattr(ranks, key), (name, key)
        losses[name] = tokens["loss"].tobytes()
        for link in ranks.importance.values():
            assert ("head_weights" in link or "oracle" in link) is (name in FILES)
    assert len(set(losses.values())) == len(METRICS)


BAD = {
    "unknown metric": (
        ["--compressor", codec("colum")],
        r"codec token_mixed wants the importance metric 'colum'; there are: column, column_causal, last_row",
    ),
    "fraction": (
        ["--compressor", "token_mixed(metric=norm, fraction=1.5)"],
        r"fraction is 1\.5, allowed: a number from 0 to 1",
    ),
    "no file": (["--compressor", codec("oracle")], r"metric oracle needs a file: set importance\.oracle"),
    "missing file": (
        ["--compressor", codec("head_weighted"), "--set", "importance.head_weights=nowhere"],
        r"nowhere cannot be read: No such file",
    ),
    "layers of another stage": (
        ["--compressor", codec("column"), "--set", "importance.layers=[5]"],
        r"metric column reads attention, but stage 0 holds layers 0 to 2, and importance\.layers is \[5\]",
    ),
    "no layers": (
        ["--compressor", codec("column"), "--set", "partition.nodes=[{layers: [[0, 0]]}, {layers: [[0, 6]]}]"],
        r"metric column reads attention, but stage 0 holds no layers",
    ),
    "layers": (
        ["--set", "importance.layers=first"],
        r"importance\.layers must be last, all or a list of layer numbers, got 'first'",
    ),
    "seed": (["--set", "importance.seed=-1"], r"importance\.seed must be at least 0, got -1"),
    "wrapped": (["--compressor", f"zstd({codec('colum')})"], r"wants the importance metric 'colum'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_before_weights_are_loaded(name, tmp_path):
    more, words = BAD[name]
    two_nodes = ("--set", "partition.num_nodes=2", "--set", "partition.wrap=false")
    ended = run_ranks([tiny_arguments(tmp_path, *two_nodes, *more)] * 2)
    for one in ended:
        assert one.returncode not in (0, None)
        assert "Traceback" not in one.stderr and "AssertionError" not in one.stderr
        assert re.search(words, one.stderr), one.stderr
    assert not list(tmp_path.glob("*.json"))


def test_a_model_whose_attention_cannot_be_read(tmp_path):
    model = shutil.copytree(tiny_model(), tmp_path / "gemma2")  # for its tokenizer
    config = AutoConfig.for_model("gemma2", **{**SIZES, "num_hidden_layers": 4, "max_position_embeddings": 512})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(model)
    arguments = tiny_arguments(tmp_path / "exp", "--model_name", str(model), "--set", "partition.num_nodes=2")
    ended = run_alone(*arguments, "--compressor", codec("last_row"))
    assert ended.returncode != 0
    assert "attention of Gemma2Model runs on eager; only that of sdpa can be read" in ended.stderr
    run_alone(*arguments, "--compressor", codec("norm")).check()
