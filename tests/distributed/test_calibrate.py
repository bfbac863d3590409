"""Calibration over ranks and in one process writes the same files, and runs use them."""

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from pipeline.records.store import read_record
from tests.helpers.launch import call_on_ranks, run_ranks
from tests.helpers.tiny_models import save_tiny_model, tiny_arguments, tiny_model, write_text

FILES = [
    "layer-0-node0-node1.safetensors",
    "layer-3-node1-node0.safetensors",
    "token-ids.safetensors",
]

NUM_TOKENS = 64 * 13 + 20  # of the text; the mixture has as many


def main_on_rank(rank, arguments):
    from pipeline.calibrate import main

    return main(arguments)


def calibrate(num_ranks, out, text, *more):
    arguments = [
        *("--out", str(out), "--set", f"model.name={tiny_model()}", "--set", "dataset.name=text"),
        *("--set", f"dataset.path={text}", "--set", "dataset.max_length=64", "--set", "runtime.threads=1"),
        *("--set", "partition.num_nodes=2", *more),
    ]
    return call_on_ranks(num_ranks, main_on_rank, arguments, distributed=num_ranks > 1)


@pytest.fixture(scope="module")
def calibrations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrations")
    text = write_text(folder / "text", NUM_TOKENS)
    for num_ranks in (1, 2):
        for rank, finished in enumerate(calibrate(num_ranks, folder / str(num_ranks), text)):
            finished.check()
            if rank == 0:
                (folder / "told").write_text(finished.stdout)
    return folder


def test_files_do_not_depend_on_the_number_of_processes(calibrations):
    for name in FILES:
        alone, on_ranks = (load_file(calibrations / n / name) for n in ("1", "2"))
        assert alone.keys() == on_ranks.keys()
        for key in alone:
            assert alone[key].shape == on_ranks[key].shape
        for key in ("mean", "fixed_size") if "layer" in name else ("rows", "steps"):
            assert (alone[key].float() - on_ranks[key].float()).abs().max() <= 1e-2 * alone[key].float().abs().max()
    assert sorted(path.name for path in (calibrations / "2").iterdir()) == FILES


def test_files_say_what_they_are_for(calibrations):
    with safe_open(calibrations / "2" / FILES[0], "pt") as file:
        metadata = file.metadata()
    assert metadata["link"] == "layer:0:node0->node1" and metadata["num_tokens"] == str(64 * 22)
    assert len(metadata["checkpoint"]) >= 16 and len(metadata["text_sha256"]) == 64
    assert metadata["text"].startswith(f"{2 * NUM_TOKENS} tokens: {NUM_TOKENS} of text file text, ")
    with safe_open(calibrations / "1" / FILES[0], "pt") as file:
        assert file.metadata() == metadata


def test_the_screen_says_what_was_mixed(calibrations):
    told = (calibrations / "told").read_text()
    assert f"calibrating on {2 * NUM_TOKENS} tokens: {NUM_TOKENS} of text file text, 47 of arabic, " in told
    assert " of thai, " in told and " of python\n" in told


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("codec", ["klt(calibration={}, step=0.5)", "klt_fixed(calibration={}, nbits=3)"])
def test_runs(calibrations, codec, num_ranks, tmp_path):
    spec = codec.format(calibrations / "2")
    arguments = tiny_arguments(
        tmp_path, "--set", "partition.num_nodes=2", "--compressor", spec, "--max_length", "64", num_tokens=300
    )
    for finished in run_ranks([arguments] * num_ranks, distributed=num_ranks > 1):
        finished.check()
    (path,) = tmp_path.glob("*.json")
    record = read_record(path)
    assert record.causal
    assert 0.2 < record.traffic_totals.bits_per_value < 5


def test_ranks_and_one_process_score_alike(calibrations, tmp_path):
    losses = []
    for num_ranks in (1, 2):
        out = tmp_path / str(num_ranks)
        spec = f"klt(calibration={calibrations / '2'}, step=0.3)"
        arguments = tiny_arguments(out, "--set", "partition.num_nodes=2", "--compressor", spec, num_tokens=300)
        for finished in run_ranks([arguments] * num_ranks, distributed=num_ranks > 1):
            finished.check()
        (path,) = out.glob("*.json")
        losses.append(read_record(path).results.total_nll)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_another_model_is_refused(calibrations, tmp_path):
    other = save_tiny_model(tmp_path / "other", "llama", seed=1)
    arguments = tiny_arguments(
        tmp_path, "--set", "partition.num_nodes=2", "--compressor", f"klt(calibration={calibrations / '2'}, step=0.5)"
    )
    arguments[arguments.index("--model_name") + 1] = str(other)
    (finished,) = run_ranks([arguments], distributed=False)
    assert finished.returncode != 0
    assert "a file with checkpoint" in finished.stderr


def test_without_a_token_table_and_a_mixture(tmp_path):
    text = write_text(tmp_path / "text", 64 * 2)
    for finished in calibrate(1, tmp_path / "out", text, "--no-token-table", "--tokens", "64", "--mixture", "0"):
        finished.check()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES[:2]
    with safe_open(tmp_path / "out" / FILES[0], "pt") as file:
        assert file.metadata()["text"] == "text file text"
