"""Prompts through the ring: the reference's tokens, whatever shares a pass and however many ranks there are."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.launch import run_alone, run_ranks
from tests.helpers.tiny_models import MODEL_TYPES, tiny_model

PROMPTS = ["The canal", "a", "Once upon a time there was a lock keeper who", "xyz " * 30, "1, 2, 3, 4,"]
NUM_TOKENS = (24, 7, 24, 12, 1)


def prompts_file(tmp_path, prompts=PROMPTS, num_tokens=NUM_TOKENS):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": p, "max_new_tokens": n} for p, n in zip(prompts, num_tokens, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def arguments(model, exp_dir, prompts, *settings, codec="none"):
    base = ("runtime.threads=1", "generation.max_slots=3", "generation.max_length=160", "generation.ignore_eos=true")
    words = [word for setting in (*base, *settings) for word in ("--set", setting)]
    return ["--model_name", str(model), "--exp_dir", str(exp_dir), "--compressor", codec, *words, "--generate", str(prompts)]


def answers(exp_dir):
    (path,) = Path(exp_dir).glob("answers-*.jsonl")
    return {line["line"]: line for line in map(json.loads, path.read_text().splitlines())}


def run(num_ranks, words, **options):
    if num_ranks == 1:
        return run_alone(*words, timeout_s=120, **options)
    return run_ranks([words] * num_ranks, timeout_s=120, **options)[0]


def reference(model_dir, dtype):
    """Greedy tokens and logits of transformers' own, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    for prompt, num_tokens in zip(PROMPTS, NUM_TOKENS, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=-1,
                pad_token_id=0,
            )
        yield output[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_greedy_tokens_are_transformers(model_type, tmp_path):
    model = tiny_model(model_type)
    run(4, arguments(model, tmp_path / "out", prompts_file(tmp_path), "generation.prefill_chunk=16")).check()
    got = answers(tmp_path / "out")
    for number, expected in enumerate(reference(model, torch.float32), 1):
        assert got[number]["token_ids"] == expected, number


PLANS = {"1": (1, ()), "2": (2, ("partition.num_nodes=2",)), "4": (4, ()), "4, no wrap": (4, ("partition.wrap=false",))}
SHAPES = {
    "chunks of 5": ("generation.prefill_chunk=5",),
    "whole prompts, alone": ("generation.prefill_chunk=0", "generation.max_slots=1"),
    "all together": ("generation.max_slots=5", "generation.passes=1"),
}


@pytest.mark.parametrize("codec", ["none", "nf4", "hadamard(int4)"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_what_shares_a_pass_changes_no_token(model_type, codec, tmp_path):
    """In float64, where noise does not become text, for codecs that treat every token alike."""
    model, prompts = tiny_model(model_type), prompts_file(tmp_path)
    plan = ("partition.nodes=[{layers: [[0, 1], [5, 6]]}, {layers: [[1, 3]]}, {layers: [[3, 4]]}, {layers: [[4, 5]]}]",)
    found = {}
    for name, shape in SHAPES.items():
        out = tmp_path / name
        run(1, arguments(model, out, prompts, "model.dtype=fp64", *plan, *shape, codec=codec)).check()
        found[name] = answers(out)
    out = tmp_path / "4"
    run(4, arguments(model, out, prompts, "model.dtype=fp64", *plan, *SHAPES["chunks of 5"], codec=codec)).check()
    found["four ranks"] = answers(out)
    first = found.pop("chunks of 5")
    for name, others in found.items():
        for line, answer in first.items():
            assert answer["error"] is None
            assert others[line]["token_ids"] == answer["token_ids"], (name, line)
