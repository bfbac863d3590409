"""Calibration over ranks and in one process writes the same files, and runs use them."""

import errno
import os
import signal

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


def interrupted_main(rank, arguments, save_every_s, dying, call, end):
    """`main`, of which one rank ends in its n-th call of a function: killed, or by Ctrl-C."""
    import importlib

    from pipeline.analysis import unfinished

    unfinished.SAVE_EVERY_S, unfinished.MIN_INTERVALS = save_every_s, 0
    place, name, number = call
    owner = importlib.import_module(f"pipeline.analysis.{place}")
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    real, num_calls = getattr(owner, name), 0

    def counted(*given, **named):
        nonlocal num_calls
        num_calls += 1
        if num_calls == number and rank == dying:
            os.kill(os.getpid(), end)
        return real(*given, **named)

    setattr(owner, name, counted)
    return main_on_rank(rank, arguments)


def command(out, text, *more):
    return [
        *("--out", str(out), "--set", f"model.name={tiny_model()}", "--set", "dataset.name=text"),
        *("--set", f"dataset.path={text}", "--set", "dataset.max_length=64", "--set", "runtime.threads=1"),
        *("--set", "partition.num_nodes=2", *more),
    ]


def calibrate(num_ranks, out, text, *more):
    arguments = command(out, text, *more)
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


def interrupt(num_ranks, out, text, call, *, dying=1, end=signal.SIGKILL, save_every_s=0.0):
    """A calibration that saves after each pass, and is interrupted; returns the unfinished files that it leaves."""
    arguments = command(out, text, "--set", "runtime.timeout_s=10")  # for a rank that waits without a connection
    finished = call_on_ranks(
        num_ranks, interrupted_main, arguments, save_every_s, dying, call, end, distributed=num_ranks > 1
    )
    assert all(one.returncode != 0 for one in finished)
    assert finished[dying].returncode == (130 if end == signal.SIGINT else -end), finished[dying].stderr
    return sorted(path.name for path in out.glob("unfinished-*.safetensors"))


def assert_alike(out, other):
    """Bit for bit, and nothing else is left."""
    assert sorted(path.name for path in out.iterdir()) == FILES
    for name in FILES:
        found, expected = load_file(out / name), load_file(other / name)
        assert found.keys() == expected.keys()
        assert all(found[key].equal(expected[key]) for key in found)
        with safe_open(out / name, "pt") as one, safe_open(other / name, "pt") as two:
            assert one.metadata() == two.metadata()


@pytest.mark.parametrize(
    ("call", "dying", "end", "num_done", "num_files"),
    [
        (("gathering", "Gathered.take_states", 14), 1, signal.SIGKILL, 12, 2),  # while gradients come back
        (("gathering", "Gathered.take_states", 15), 0, signal.SIGINT, 12, 2),
        (("gathering", "Gathered.take_states", 24), 1, signal.SIGKILL, 22, 2),  # the held-out ones
        (("unfinished", "write_whole", 4), 1, signal.SIGKILL, 12, 3),  # when the other rank's is written
        (("unfinished", "_unlink", 5), 1, signal.SIGKILL, 16, 3),  # before its older one is removed
    ],
)
def test_an_interrupted_calibration_goes_on(call, dying, end, num_done, num_files, calibrations, tmp_path):
    text = calibrations / "text"
    left = interrupt(2, tmp_path, text, call, dying=dying, end=end)
    assert len(left) == num_files and sum(name.endswith(f"-{num_done}.safetensors") for name in left) == 2
    for rank, finished in enumerate(calibrate(2, tmp_path, text)):
        told = f"going on with an interrupted calibration: {num_done} of 26 micro-batches are done"
        assert (told in finished.check().stdout) == (rank == 0)
    assert_alike(tmp_path, calibrations / "2")


def test_it_goes_on_in_one_process_and_fits_no_link_twice(calibrations, tmp_path):
    text = calibrations / "text"
    left = interrupt(1, tmp_path, text, ("calibration", "fit", 2), dying=0)
    assert len(left) == 2 and {name.rpartition("-")[2] for name in left} == {"26.safetensors"}
    (finished,) = calibrate(1, tmp_path, text)
    told = finished.check().stdout
    assert "26 of 26 micro-batches are done" in told
    assert f"written: {tmp_path / FILES[0]}" not in told and f"written: {tmp_path / FILES[1]}" in told
    assert_alike(tmp_path, calibrations / "1")


def test_ranks_may_have_folders_of_their_own(calibrations, tmp_path):
    """As on several machines."""
    text, outs = calibrations / "text", [tmp_path / "0", tmp_path / "1"]
    commands = [command(out, text) for out in outs]
    call = ("gathering", "Gathered.take_states", 14)
    interrupted = call_on_ranks(2, interrupted_main_of, commands, 0.0, 1, call, signal.SIGKILL)
    assert interrupted[1].returncode == -signal.SIGKILL
    assert [len(list(out.glob("unfinished-*-12.safetensors"))) for out in outs] == [1, 1]
    for finished in call_on_ranks(2, interrupted_main_of, commands, 0.0, None, call, None):
        finished.check()
    assert [sorted(path.name for path in out.iterdir()) for out in outs] == [[FILES[0], FILES[2]], [FILES[1]]]
    (outs[1] / FILES[1]).rename(outs[0] / FILES[1])
    assert_alike(outs[0], calibrations / "2")


def test_a_rank_without_a_place_to_write_is_told_before_the_passes(calibrations, tmp_path):
    text = calibrations / "text"
    commands = [command(out, text) for out in (tmp_path / "0", text / "1")]
    for finished in call_on_ranks(2, interrupted_main_of, commands, 0.0, None, ("unfinished", "write_whole", 0), None):
        assert finished.returncode != 0
        assert f"{text / '1'}, cannot be written to: Not a directory" in finished.stderr
        assert "calibrating:" not in finished.stderr


def interrupted_main_of(rank, commands, *more):
    return interrupted_main(rank, commands[rank], *more)


def test_without_the_other_ranks_file_it_starts_anew(calibrations, tmp_path):
    text = calibrations / "text"
    left = interrupt(2, tmp_path, text, ("gathering", "Gathered.take_states", 14))
    (tmp_path / left[1]).unlink()
    first, _ = calibrate(2, tmp_path, text)
    assert "starting anew" in first.check().stdout and "going on" not in first.stdout
    assert_alike(tmp_path, calibrations / "2")


def test_a_damaged_file_and_one_of_another_calibration_are_named_and_not_used(calibrations, tmp_path):
    text = calibrations / "text"
    left = interrupt(2, tmp_path, text, ("gathering", "Gathered.take_states", 14))
    data = bytearray((tmp_path / left[1]).read_bytes())
    data[-100] ^= 1
    (tmp_path / left[1]).write_bytes(data)
    digest = left[0].split("-")[-2]
    foreign = tmp_path / left[0].replace(digest, "0123456789abcdef")
    foreign.write_bytes(b"anything")
    first, second = calibrate(2, tmp_path, text)
    assert "starting anew" in first.check().stdout and f"{foreign} is of another calibration" in first.stderr
    assert f"{left[1]} is not used: it is damaged" in second.check().stderr
    assert foreign.read_bytes() == b"anything"
    foreign.unlink()
    assert_alike(tmp_path, calibrations / "2")


@pytest.mark.parametrize("change", ["--no-token-table", "--tokens=1300"])
def test_with_other_features_or_text_it_starts_anew(change, calibrations, tmp_path):
    text = calibrations / "text"
    left = interrupt(1, tmp_path, text, ("gathering", "Gathered.take_states", 28), dying=0)
    (finished,) = calibrate(1, tmp_path, text, change)
    assert "starting anew" in finished.check().stdout
    assert all(f"{name} is of another calibration" in finished.stderr for name in left)
    files = FILES[:2] if change == "--no-token-table" else FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*left, *files])


def test_a_full_disk_meanwhile_does_not_end_it(calibrations, tmp_path):
    text, call = calibrations / "text", ("unfinished", "write_whole", 0)
    finished = call_on_ranks(2, full_disk_main, command(tmp_path, text), call)
    told = [one.check().stderr for one in finished]
    assert told[0].count("cannot be saved") == 0
    assert told[1].count("cannot be saved") == 1 and "No space left on device; make room there" in told[1]
    assert_alike(tmp_path, calibrations / "2")


def full_disk_main(rank, arguments, call):
    from pipeline.analysis import unfinished

    def fail(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == 1:
        unfinished.write_whole = fail
    return interrupted_main(rank, arguments, 0.0, None, call, None)
