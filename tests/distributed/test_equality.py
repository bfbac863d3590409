"""A split model computes what the unsplit one does: hidden states bit for bit, losses, traffic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from pipeline.config.reading import load_config
from pipeline.data.text import load_text, tokenize
from pipeline.records.store import read_per_token, read_record
from tests.helpers.launch import call_on_ranks
from tests.helpers.tiny_models import MODEL_TYPES, save_tiny_model, tiny_model, write_text

LENGTH = 32


def overrides(model: Path, text: Path, exp_dir: Path, num_nodes: int, **more):
    exp_dir.mkdir(exist_ok=True)
    return {
        "model.name": str(model),
        "dataset.name": "text",
        "dataset.path": str(text),
        "dataset.max_length": LENGTH,
        "dataset.stride": LENGTH,
        "partition.num_nodes": num_nodes,
        "runtime.threads": 1,
        "exp_dir": str(exp_dir),
        **{key.replace("__", "."): value for key, value in more.items()},
    }


def evaluate_all(rank: int, cases: dict[str, dict]) -> None:
    """Run every case in one process group; the last stage's hidden states go to `<exp_dir>/hidden`."""
    from pipeline.comm.control import Control
    from pipeline.comm.world import World
    from pipeline.evaluation.evaluation import Evaluation
    from pipeline.models.stage import Stage
    from pipeline.runtime.deployment import deploy

    control = Control(World.from_environment(), timeout_s=60, load_timeout_s=120, interface=None)
    control.form()
    score = Stage.score
    for case in cases.values():
        config = load_config(None, list(case.items()))
        Stage.score = score  # a deployment times a token, which is none of the run
        deployment = deploy(config, control)
        kept: list[torch.Tensor] = []

        def keep_and_score(stage, hidden_states, *scored, kept=kept):
            kept.append(hidden_states.clone())
            return score(stage, hidden_states, *scored)

        Stage.score = keep_and_score
        Evaluation(config, deployment).run()
        if kept:
            save_file({str(i): hidden for i, hidden in enumerate(kept)}, Path(case["exp_dir"]) / "hidden")
    control.close()


def run_cases(num_ranks: int, cases: dict[str, dict]) -> None:
    outcomes = call_on_ranks(num_ranks, evaluate_all, cases, timeout_s=200, distributed=num_ranks > 1)
    assert [o.returncode for o in outcomes] == [0] * num_ranks, "\n".join(o.stderr for o in outcomes)


def unsplit(case: dict, **options) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states per micro-batch and all losses of plain transformers on the same windows."""
    ids, _ = tokenize(load_text(name="text", path=case["dataset.path"], split="test"), Path(case["model.name"]))
    torch.set_num_threads(1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.get("model.dtype", "fp32")]
    model = AutoModelForCausalLM.from_pretrained(case["model.name"], dtype=dtype, **options).eval()
    rows = torch.tensor(ids).split(LENGTH)
    hidden, losses = [], []
    with torch.inference_mode():
        for batch in zip(*[iter(rows)] * case.get("batch_size", 1), strict=True):
            batch = torch.stack(batch)
            states = model.base_model(input_ids=batch).last_hidden_state
            logits = model(input_ids=batch).logits.float()
            hidden.append(states)
            losses += torch.nn.functional.cross_entropy(
                logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="none"
            ).flatten()
    return hidden, torch.stack(losses)


def check(case: dict, **options) -> dict:
    """Compare a finished case with the unsplit model; returns its record."""
    folder = Path(case["exp_dir"])
    (path,) = folder.glob("*.json")
    hidden, losses = unsplit(case, **options)
    got = load_file(folder / "hidden")
    assert len(got) == len(hidden) > 0
    for i, expected in enumerate(hidden):
        assert torch.equal(got[str(i)], expected), f"micro-batch {i}"
    np.testing.assert_allclose(read_per_token(path)["loss"], losses.numpy(), rtol=0, atol=1e-5)
    return read_record(path)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_hidden_states_are_bit_equal_for_all_architectures(num_ranks, tmp_path):
    cases = {}
    for model_type in MODEL_TYPES:
        for num_microbatches in {max(1, num_ranks - 1), num_ranks, 2 * num_ranks + 1}:
            name = f"{model_type}-{num_microbatches}"
            text = write_text(tmp_path / f"{name}.txt", LENGTH * num_microbatches)
            cases[name] = overrides(tiny_model(model_type), text, tmp_path / name, num_ranks)
    run_cases(num_ranks, cases)
    for name, case in cases.items():
        record = check(case)
        assert record.results.num_microbatches == int(name.rsplit("-", 1)[1])
        assert len(record.traffic_per_link) == (num_ranks if num_ranks > 1 else 0)


def test_other_plans_batches_and_tied_weights(tmp_path):
    text = write_text(tmp_path / "text", LENGTH * 6)
    explicit = [
        {"layers": [[0, 1], [4, 5]]},
        {"layers": [[1, 2], [5, 6]]},
        {"layers": [[2, 4]]},
        {"layers": [[6, 6]]},
    ]
    own_head = save_tiny_model(tmp_path / "own_head", "llama")
    config = own_head / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    cases = {
        "own head": overrides(own_head, text, tmp_path / "f", 4),
        "no wrap": overrides(tiny_model("gemma3_text", tied=True), text, tmp_path / "a", 4, partition__wrap=False),
        "batch": overrides(tiny_model("llama", tied=True), text, tmp_path / "b", 4, batch_size=3),
        "explicit": overrides(tiny_model("gpt_neox"), text, tmp_path / "c", 4, partition__nodes=explicit),
        "few layers": overrides(tiny_model("qwen3", num_layers=2), text, tmp_path / "d", 4),
        "receives": overrides(
            tiny_model("qwen2"), text, tmp_path / "e", 4, runtime__receives_ahead=1, runtime__in_flight=7
        ),
    }
    run_cases(4, cases)
    records = {name: check(case) for name, case in cases.items()}
    assert [len(record.notes) for record in records.values()] == [1, 0, 0, 0, 0, 0]
    assert "lm_head.weight is stored and differs" in records["own head"].notes[0]
    assert list(records["no wrap"].traffic_per_link)[-1] == "layer:4:node2->node3"
    assert list(records["few layers"].traffic_per_link)[0] == "embed:node0->node1"
    assert records["batch"].results.num_microbatches == 2


def test_one_process_runs_the_same_plan_and_frames_as_four_ranks(tmp_path):
    text = write_text(tmp_path / "text", LENGTH * 5 + 7)
    common = {"dataset__stride": 20, "model__dtype": "bf16", "compressor": "int4", "batch_size": 2}
    alone = overrides(tiny_model(), text, tmp_path / "alone", 4, **common)
    ranks = overrides(tiny_model(), text, tmp_path / "ranks", 4, **common)
    run_cases(1, {"alone": alone})
    run_cases(4, {"ranks": ranks})
    records = []
    for case in (alone, ranks):
        (path,) = Path(case["exp_dir"]).glob("*.json")
        records.append((read_record(path), read_per_token(path)))
    (first, first_tokens), (second, second_tokens) = records
    assert all(np.array_equal(first_tokens[key], second_tokens[key]) for key in first_tokens)
    for key in ("results", "traffic_totals", "traffic_per_link", "digest", "codecs"):
        assert getattr(first, key) == getattr(second, key), key


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_stages_are_bit_equal(bits, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert bitsandbytes
    text = write_text(tmp_path / "text", LENGTH * 2)
    cases, options = {}, {}
    for model_type in MODEL_TYPES:
        model = tiny_model(model_type)
        if bits == 4:  # bitsandbytes' CPU kernel takes widths that are multiples of 64
            model = save_tiny_model(tmp_path / f"model-{model_type}", model_type, intermediate_size=128)
        more = {f"model__load_in_{bits}bit": True, "model__dtype": "bf16"}
        cases[model_type] = overrides(model, text, tmp_path / model_type, 4, **more)
    run_cases(1, cases)
    options = {
        "quantization_config": BitsAndBytesConfig(
            **{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
        "device_map": {"": "cpu"},
    }
    for case in cases.values():
        record = check(case, **options)
        assert record.causal is (bits == 4)
