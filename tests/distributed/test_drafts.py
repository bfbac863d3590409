"""Answers with drafts are those without, in float64, whatever is guessed and how many passes are under way."""

import json
from collections import Counter

import pytest
from transformers import AutoTokenizer

from pipeline.partition.plan import default_plan
from tests.compressors.codec_cases import SPECS, make
from tests.distributed.test_calibrate import main_on_rank
from tests.distributed.test_generation import PROMPTS, answers, arguments, prompts_file, run
from tests.helpers.launch import call_on_ranks, run_alone, run_ranks
from tests.helpers.tiny_models import tiny_model, write_text

NUM_TOKENS = (40, 7, 30, 25, 1)
SAMPLED = (
    *("generation.temperature=0.9", "generation.top_k=20"),
    *("generation.repetition_penalty=1.3", "generation.seed=5", "generation.logprobs=2"),
)
NO_WRAP = ("partition.wrap=false",)
CASES = {
    "greedy": ("llama", "none", ()),
    "sampled": ("llama", "int8", SAMPLED),
    "no wrap": ("llama", "nf4", NO_WRAP),
    "no wrap, sampled": ("qwen3", "none", (*NO_WRAP, *SAMPLED)),
    "hadamard": ("llama", "hadamard(int4)", SAMPLED),
    "klt": ("llama", "klt(calibration={}, step=0.5)", ()),
    "sliding windows": ("gemma3_text", "nf4", ()),
    "another codec for sampled tokens": ("llama", "nf4", (*SAMPLED, "compressor_decode=int8")),
}
CODECS = [s for s in SPECS if make(s).frame_invariant and "importance" not in make(s).needs]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    text = write_text(folder / "text", 64 * 13 + 20)
    settings = (f"model.name={tiny_model()}", "dataset.name=text", f"dataset.path={text}", "dataset.max_length=64")
    words = [word for setting in (*settings, "runtime.threads=1") for word in ("--set", setting)]
    call_on_ranks(1, main_on_rank, ["--out", str(folder / "files"), *words], distributed=False)[0].check()
    return folder / "files"


def generate(model, exp_dir, *settings, codec="none", drafts=None, prompts=PROMPTS, num_tokens=NUM_TOKENS, num_ranks=4):
    """Answers and traffic; with `drafts`, those that are right in six of ten cases, several passes in flight."""
    exp_dir.mkdir()
    words = ["model.dtype=fp64", "generation.prefill_chunk=16"]
    if drafts is not None:
        words += [f"generation.draft=tests.helpers.drafters:Knowing(sequences={drafts})"]
        words += ["generation.draft_adapts=false", "generation.draft_depth=4", "generation.draft_passes=3"]
    file = prompts_file(exp_dir, prompts, num_tokens)
    run(num_ranks, arguments(model, exp_dir, file, *words, *settings, codec=codec)).check()
    (path,) = exp_dir.glob("*-generation-*.json")
    return answers(exp_dir), json.loads(path.read_text())["traffic_per_link"]


def known(folder, model, plain):
    """A file of the sequences, for the drafter."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    path = folder / "sequences.json"
    path.write_text(json.dumps([tokenizer(a["prompt"])["input_ids"] + a["token_ids"] for a in plain.values()]))
    return path


def check_alike(drafted, plain):
    for line, answer in plain.items():
        for key in ("text", "token_ids", "finish_reason", "error"):
            assert drafted[line][key] == answer[key], (line, key)
        if answer["logprobs"] is not None:
            got, expected = drafted[line]["logprobs"], answer["logprobs"]
            assert got["token_logprobs"] == pytest.approx(expected["token_logprobs"], abs=1e-9)
            assert [[i for i, _ in top] for top in got["top_logprobs"]] == [
                [i for i, _ in top] for top in expected["top_logprobs"]
            ]


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_without_drafts(case, request, tmp_path):
    """Without them in one process, of as many nodes."""
    model_type, codec, settings = CASES[case]
    model = tiny_model(model_type)
    if "{}" in codec:
        codec = codec.format(request.getfixturevalue("calibration"))
    plain, before = generate(model, tmp_path / "plain", *settings, "partition.num_nodes=4", codec=codec, num_ranks=1)
    drafts = known(tmp_path, model, plain)
    drafted, traffic = generate(model, tmp_path / "drafted", *settings, codec=codec, drafts=drafts)
    check_alike(drafted, plain)
    assert all(a["error"] is None for a in plain.values())
    for name, link in traffic.items():
        assert link["tokens"] > before[name]["tokens"], "no draft was wrong"


@pytest.mark.parametrize("first", range(0, len(CODECS), 8))
def test_every_codec_takes_drafts(first, tmp_path):
    """Eight at a time, each on a link of its own; `klt` is tried above."""
    model, names = tiny_model(num_layers=12), [link.name for link in default_plan(12, 8).links]
    codecs = dict(zip(names, (CODECS[first : first + 8] * 8)[:8], strict=True))
    settings = (f"compressor_per_link={json.dumps(codecs)}", "partition.num_nodes=8")
    few = {"prompts": PROMPTS[:3], "num_tokens": [16, 7, 16], "num_ranks": 1}
    plain, before = generate(model, tmp_path / "plain", *settings, **few)
    drafts = known(tmp_path, model, plain)
    drafted, traffic = generate(model, tmp_path / "drafted", *settings, drafts=drafts, **few)
    check_alike(drafted, plain)
    assert all(link["tokens"] > before[name]["tokens"] for name, link in traffic.items())


def test_stop_strings_inside_drafts(tmp_path):
    """Drafts go on behind them."""
    plain, _ = generate(tiny_model(), tmp_path / "plain", num_ranks=1)
    letters = Counter(letter for a in plain.values() for letter in set(a["text"][2:-2]) if letter.isalnum())
    stop = f"generation.stop=['{letters.most_common(1)[0][0]}']"
    stopped, _ = generate(tiny_model(), tmp_path / "stopped", stop, num_ranks=1)
    drafted, _ = generate(tiny_model(), tmp_path / "drafted", stop, drafts=known(tmp_path, tiny_model(), plain))
    check_alike(drafted, stopped)
    assert "stop" in {a["finish_reason"] for a in stopped.values()}


def test_several_passes_of_one_sequence_are_under_way(tmp_path):
    """Where one is at a time, there are no more passes than tokens."""
    prompts, num_tokens = PROMPTS[:1], [40]
    plain, _ = generate(tiny_model(), tmp_path / "plain", prompts=prompts, num_tokens=num_tokens, num_ranks=1)
    drafts = known(tmp_path, tiny_model(), plain)
    deep = ("generation.draft_depth=1", "generation.draft_passes=4")
    drafted, traffic = generate(
        tiny_model(), tmp_path / "drafted", *deep, drafts=drafts, prompts=prompts, num_tokens=num_tokens
    )
    check_alike(drafted, plain)
    assert all(link["frames"] > 40 for link in traffic.values())


def test_weights_that_mix_tokens_have_no_drafts(tmp_path):
    words = arguments(tiny_model(), tmp_path, prompts_file(tmp_path), "model.load_in_8bit=true")
    finished = run_alone(*words, "--set", "generation.draft=ngram", "--set", "generation.prefill_chunk=0")
    assert finished.returncode == 1 and "leave generation.draft out" in finished.stderr


def test_a_drafter_that_cannot_be_made_is_told_on_every_rank(tmp_path):
    drafter = "generation.draft=tests.helpers.drafters:Knowing(sequences=/nowhere)"
    words = arguments(tiny_model(), tmp_path, prompts_file(tmp_path), drafter)
    finished = run_ranks([words] * 4)
    assert all(one.returncode not in (0, None) for one in finished)
    assert "generation.draft" in finished[0].stderr and "/nowhere" in finished[0].stderr
