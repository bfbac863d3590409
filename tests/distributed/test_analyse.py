"""The three analyses over ranks, and what the metrics make of their files."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.launch import call_on_ranks, run_ranks
from tests.helpers.tiny_models import tiny_model, write_text

NUM_TOKENS = 300


def arguments(tmp_path, *more, model_type="llama"):
    text = write_text(tmp_path / "text", NUM_TOKENS)
    settings = [
        *(f"model.name={tiny_model(model_type)}", "dataset.name=text", f"dataset.path={text}", "dataset.max_length=64"),
        *(
            "dataset.stride=64",
            "runtime.threads=1",
            "partition.num_nodes=2",
            "partition.wrap=false",
            "batch_size=2",
            *more,
        ),
    ]
    return [word for setting in settings for word in ("--set", setting)]


def analyse_on_rank(rank, argv):
    from pipeline.analyse import main

    return main(argv)


def analyse(num_ranks, what, out, argv):
    finished = call_on_ranks(
        num_ranks, analyse_on_rank, [what, "--out", str(out), *argv], distributed=num_ranks > 1, timeout_s=100
    )
    return [rank.check() for rank in finished]


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_one_process_and_two_ranks_find_the_same(tmp_path, model_type):
    argv = arguments(tmp_path, model_type=model_type)
    for num_ranks in (1, 2):
        for what in ("layers", "heads", "oracle"):
            analyse(num_ranks, what, tmp_path / f"{num_ranks}", argv)
    for name in ("head_relevance", "token_importance"):
        one, two = (load_file(tmp_path / f"{n}" / f"{name}.safetensors") for n in (1, 2))
        assert one.keys() == two.keys()
        for key in one:
            np.testing.assert_allclose(one[key], two[key], rtol=1e-4)
    one, two = (json.loads((tmp_path / f"{n}" / "layers.json").read_text()) for n in (1, 2))
    assert one["num_windows"] == 5
    for metric, found in one["metrics"].items():
        for measure, matrix in found["pairs"].items():
            assert np.shape(matrix) == (6, 6)
            np.testing.assert_allclose(matrix, two["metrics"][metric]["pairs"][measure], atol=0.02)
        assert (tmp_path / "2" / f"layers_{metric}.png").stat().st_size > 10_000
    relevance = json.loads((tmp_path / "2" / "relevance.json").read_text())
    assert np.shape(relevance["relevance"]) == (6, 4)
    assert (tmp_path / "2" / "relevance.png").stat().st_size > 10_000


def test_metrics_read_the_files(tmp_path):
    argv = arguments(tmp_path)
    analyse(2, "heads", tmp_path, argv)
    analyse(2, "oracle", tmp_path, argv)
    files = [
        f"importance.head_weights={tmp_path}/head_relevance.safetensors",
        f"importance.oracle={tmp_path}/token_importance.safetensors",
    ]
    results = {}
    for metric in ("head_weighted", "oracle", "random"):
        codec = f"token_mixed(metric={metric}, fraction=0.5, high=fp16, low=int2)"
        run = [*arguments(tmp_path, *files), "--exp_dir", str(tmp_path / metric), "--compressor", codec]
        for rank in run_ranks([run, run]):
            rank.check()
        (path,) = (tmp_path / metric).glob("*.json")
        results[metric] = json.loads(path.read_text())["results"]["total_nll"]
    assert len(set(results.values())) == 3


def test_files_of_another_model_or_protocol_are_refused(tmp_path):
    argv = arguments(tmp_path)
    analyse(1, "heads", tmp_path, argv)
    analyse(1, "oracle", tmp_path, argv)
    for metric, key, name, more, word in (
        ("head_weighted", "head_weights", "head_relevance", {"model_type": "qwen2"}, "checkpoint_fingerprint"),
        ("oracle", "oracle", "token_importance", {}, "max_length"),
    ):
        change = [f"importance.{key}={tmp_path}/{name}.safetensors", "dataset.max_length=32", "dataset.stride=32"]
        codec = f"token_mixed(metric={metric}, fraction=0.5, high=fp16, low=int2)"
        run = [*arguments(tmp_path, *change, **more), "--exp_dir", str(tmp_path / "x"), "--compressor", codec]
        for rank in run_ranks([run, run]):
            assert rank.returncode != 0
            assert f"was made for {word}" in rank.stderr
        assert not list((tmp_path / "x").glob("*.json"))


def model_that_does_not_load(folder):
    shutil.copytree(tiny_model(), folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 8}))
    return folder


def calibrate_on_rank(rank, argv):
    from pipeline.calibrate import main

    return main(argv)


def test_what_cannot_be_done_is_known_before_weights_load(tmp_path):
    """Neither program gets to the weights, of which some are missing."""
    text = write_text(tmp_path / "text", 300)
    argv = ["--out", str(tmp_path / "out"), "--model_name", str(model_that_does_not_load(tmp_path / "model"))]
    argv += ["--max_length", "64", "--set", f"dataset={{name: text, path: {text}}}", "--set", "runtime.threads=1"]
    for function, words, expected in (
        (
            analyse_on_rank,
            ["oracle", "--stride=64", "--set=partition.num_nodes=1"],
            "there is no link to rate tokens at",
        ),
        (calibrate_on_rank, ["--set=partition.num_nodes=1"], "there is no link to calibrate"),
        (calibrate_on_rank, ["--set=partition.num_nodes=2"], "stores nothing of layer 6"),
    ):
        (rank,) = call_on_ranks(1, function, [*words, *argv], distributed=False)
        assert rank.returncode != 0
        assert expected in rank.stderr


def test_models_without_rules_are_refused(tmp_path):
    argv = arguments(tmp_path, model_type="gemma3_text")
    (rank,) = call_on_ranks(1, analyse_on_rank, ["heads", "--out", str(tmp_path), *argv], distributed=False)
    assert rank.returncode != 0
    assert "rules of relevance for model type 'gemma3_text'" in rank.stderr
