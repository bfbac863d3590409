"""The map of the drafter `shortcut` is the same over ranks and in one process, and its drafts change no answer."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.distributed.test_drafts import SAMPLED
from tests.distributed.test_generation import PROMPTS, answers, arguments, prompts_file, run
from tests.helpers.launch import call_on_ranks
from tests.helpers.tiny_models import EOS_ID, VOCAB_SIZE, pass_on_unchanged, save_tiny_model, tiny_model, write_text

PLAN = "partition.nodes=[{layers: [[0, 1], [5, 6]]}, {layers: [[1, 2]]}, {layers: [[2, 4]]}, {layers: [[4, 5]]}]"
NUM_TOKENS = (40, 7, 30, 25, 1)


def main_on_rank(rank, words):
    from pipeline.calibrate import main

    return main(words)


def calibrate(num_ranks, model, out, text, *more):
    settings = [
        *(f"model.name={model}", "dataset.name=text", f"dataset.path={text}", "dataset.max_length=64"),
        *("runtime.threads=1", "batch_size=2", "model.dtype=fp64", PLAN),
    ]
    words = ["--out", str(out), "--shortcut", *(word for setting in settings for word in ("--set", setting)), *more]
    return call_on_ranks(num_ranks, main_on_rank, words, distributed=num_ranks > 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """One whose middle layers change nothing, so that most drafts are right."""
    return pass_on_unchanged(save_tiny_model(tmp_path_factory.mktemp("model"), "llama"), range(1, 5))


@pytest.fixture(scope="module")
def calibrations(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrations")
    text = write_text(folder / "text", 64 * 14 + 20)
    for num_ranks in (1, 4):
        told = [finished.check().stdout for finished in calibrate(num_ranks, model, folder / str(num_ranks), text)]
        assert [("model's own choice" in one) for one in told] == [True] + [False] * (num_ranks - 1)
    return folder


def test_the_file_does_not_depend_on_the_number_of_processes(calibrations):
    files = [calibrations / n / "shortcut.safetensors" for n in ("1", "4")]
    alone, on_ranks = map(load_file, files)
    assert alone.keys() == on_ranks.keys() == {"weights", "bias", "likely_ids"}
    for key in alone:
        torch.testing.assert_close(alone[key], on_ranks[key], rtol=0, atol=1e-6)
    assert alone["likely_ids"].tolist() == list(range(VOCAB_SIZE)) and EOS_ID in alone["likely_ids"]
    assert [path.name for path in (calibrations / "4").iterdir()] == ["shortcut.safetensors"]
    metadata = []
    for file in files:
        with safe_open(file, "pt") as opened:
            metadata.append(opened.metadata())
    assert metadata[0] == metadata[1]
    # 14 windows, of which one pair is held out; their first two tokens have nothing before them that counts.
    assert metadata[0]["skipped_layers"] == "1-5" and metadata[0]["num_tokens"] == str(12 * 62)


def test_the_text_tells_how_good_it_is(model, tmp_path):
    """Where the map is right by construction, so are the drafts; where it cannot be, most are wrong."""
    text = write_text(tmp_path / "text", 64 * 14 + 20)
    shares = []
    for name in (model, tiny_model()):
        (finished,) = calibrate(1, name, tmp_path / "out", text)
        (line,) = [line for line in finished.check().stdout.splitlines() if "own choice" in line]
        shares.append(float(line.partition("choice: ")[2].partition("%")[0]))
        assert line.endswith(" of 124")  # every column but the first two of a pair of windows
    assert shares[0] > 90 > shares[1]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_answers_are_those_without_drafts(model, calibrations, codec, sampled, tmp_path):
    settings = ["model.dtype=fp64", "generation.prefill_chunk=16", PLAN, *(SAMPLED if sampled else ())]
    drafts = [
        f"generation.draft=shortcut(calibration={calibrations / '4'})",
        *("generation.draft_adapts=false", "generation.draft_depth=3", "generation.draft_passes=3"),
    ]
    found, records = [], []
    for name, more in (("plain", []), ("drafted", drafts)):
        out = tmp_path / name
        out.mkdir()
        words = arguments(model, out, prompts_file(out, PROMPTS, NUM_TOKENS), *settings, *more, codec=codec)
        run(4, words).check()
        found.append(answers(out))
        (path,) = out.glob("*-generation-*.json")
        records.append(json.loads(path.read_text()))
    for line, answer in found[0].items():
        for key in ("text", "token_ids", "finish_reason", "error"):
            assert found[1][line][key] == answer[key], (line, key)
    before, after = (record["traffic_per_link"] for record in records)
    for name in before:
        assert after[name]["tokens"] > before[name]["tokens"], "no draft was wrong"
        if not sampled:  # what a draw of few sequences comes to is seldom the likeliest
            assert after[name]["frames"] < before[name]["frames"], "no draft was right"


def test_a_plan_without_wrap_has_none(model, tmp_path):
    text = write_text(tmp_path / "text", 64 * 3)
    words = ("--set", "partition.nodes=[]", "--set", "partition.wrap=false")
    (finished,) = calibrate(1, model, tmp_path / "out", text, *words)
    assert finished.returncode != 0 and "last layers are on node 3" in finished.stderr
    (finished,) = calibrate(1, model, tmp_path / "out", text, "--no-token-table")
    assert finished.returncode != 0 and "leave one out" in finished.stderr
