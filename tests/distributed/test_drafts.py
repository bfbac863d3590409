"""Answers with drafts are those without, in float64, whatever is guessed and how many passes are under way."""

import json

import pytest
from transformers import AutoTokenizer

from tests.distributed.test_generation import PROMPTS, answers, arguments, prompts_file, run
from tests.helpers.tiny_models import tiny_model

NUM_TOKENS = (40, 7, 30, 25, 1)
SAMPLED = (
    *("generation.temperature=0.9", "generation.top_k=20"),
    *("generation.repetition_penalty=1.3", "generation.seed=5"),
)


def generate(model, exp_dir, *settings, codec="none", drafts=None, **more):
    """Answers and traffic of four ranks; with `drafts`, a file of sequences, drafts that are right as `more` has it."""
    exp_dir.mkdir()
    words = ["model.dtype=fp64", "generation.prefill_chunk=16", *settings]
    if drafts is not None:
        options = "".join(f", {name}={value}" for name, value in more.items())
        words.append(f"generation.draft=tests.helpers.drafters:Knowing(sequences={drafts}{options})")
        words += ["generation.draft_adapts=false", "generation.draft_depth=4", "generation.draft_passes=3"]
    prompts = prompts_file(exp_dir, PROMPTS, NUM_TOKENS)
    run(4, arguments(model, exp_dir, prompts, *words, codec=codec)).check()
    (path,) = exp_dir.glob("*-generation-*.json")
    return answers(exp_dir), json.loads(path.read_text())["traffic_per_link"]


def known(folder, model, plain):
    """A file of the sequences, for the drafter."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    path = folder / "sequences.json"
    path.write_text(
        json.dumps([tokenizer(PROMPTS[line - 1])["input_ids"] + a["token_ids"] for line, a in plain.items()])
    )
    return path


def check_alike(model, tmp_path, *settings, codec="none", **more):
    plain, before = generate(model, tmp_path / "plain", *settings, codec=codec)
    drafts = known(tmp_path, model, plain)
    drafted, traffic = generate(model, tmp_path / "drafted", *settings, codec=codec, drafts=drafts, **more)
    for line, answer in plain.items():
        for key in ("text", "token_ids", "finish_reason", "error"):
            assert drafted[line][key] == answer[key], (line, key)
    for name, link in traffic.items():
        assert link["tokens"] > before[name]["tokens"], "no draft was wrong"
    return before, traffic


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("codec", ["none", "int8", "nf4", "hadamard(int4)"])
def test_answers_are_those_without_drafts(codec, sampled, tmp_path):
    check_alike(tiny_model(), tmp_path, *(SAMPLED if sampled else ()), codec=codec)
