"""What the watchdog does to a process, and whom it blames. Whole runs: distributed/test_failures.py."""

import contextlib
import os
import re
import signal
import sys
import threading
import time

import pytest

from pipeline.comm import watchdog
from pipeline.comm.watchdog import PipelineError, Watchdog, _Beat, _Clock
from pipeline.comm.world import World
from tests.helpers.launch import call_on_ranks

WORLD = World(rank=1, world_size=4)


@pytest.fixture
def idle():
    """A watchdog whose threads do not run, so that nothing ends the test's process."""
    dog = Watchdog(World(), timeout_s=2.0)
    dog._world = WORLD
    return dog


class Gone(PipelineError):
    is_symptom = True
    peer = 2


def test_signals_mean_after_the_end_what_they_meant_before():
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    dog = Watchdog(WORLD, timeout_s=2.0)
    assert signal.getsignal(signal.SIGTERM) != before[0]
    dog.stop()
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before


def test_one_process_keeps_its_signals():
    before = signal.getsignal(signal.SIGTERM)
    Watchdog(World(), timeout_s=2.0)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_process_that_was_stopped_itself_counts_no_silence(monkeypatch):
    now_s = iter([0.0, 0.4, 900.4, 900.9])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(now_s))
    clock = _Clock(interval_s=0.25)
    assert [clock.tick(), clock.tick(), clock.tick()] == [pytest.approx(0.4), 1.0, pytest.approx(0.5)]


def test_a_silent_peer_is_blamed_first(idle):
    idle._beats = {
        0: _Beat(b"8|0|stage 0, micro-batch 9"),
        2: _Beat(b"4|0|stage 2, micro-batch 5", silent_s=1.9),
    }
    assert idle._blame(2, "closed") == "lost rank 2 (last at stage 2, micro-batch 5): closed"


def test_a_silent_rank_is_blamed_before_a_peer_that_lives(idle):
    idle._beats = {0: _Beat(b"8|0|stage 0, micro-batch 9"), 2: _Beat(b"4|0|loading weights", silent_s=1.9)}
    assert idle._blame(0, "closed") == "lost rank 2 (last at loading weights): closed"


def test_then_whoever_does_not_wait(idle):
    idle._beats = {
        0: _Beat(b"8|1|stage 4, micro-batch 5"),
        1: _Beat(b"8|0|stage 1, micro-batch 7"),
        2: _Beat(b"4|1|stage 2, micro-batch 6"),
        3: _Beat(b"4|0|stage 3, micro-batch 5"),
    }
    assert idle._blame(2, "timed out") == (
        "the others wait for rank 3 (last at stage 3, micro-batch 5), "
        "or runtime.timeout_s is too short for it: timed out"
    )


def test_else_the_symptom_is_told_where_it_was_seen(idle):
    idle.where = "stage 1, micro-batch 7"
    idle._beats = {2: _Beat(b"4|1|stage 2, micro-batch 6")}
    assert idle._blame(2, "timed out") == "rank 1, stage 1, micro-batch 7: timed out"


def test_of_a_standstill_the_rank_that_computes_is_named(idle):
    """Rank 0's own watchdog sees it, as nobody else times passes."""
    idle.move("stage 4, micro-batch 6", waiting=False, due=True)
    cause = "rank 1, stage 4, micro-batch 6: at it for 2 s, or runtime.timeout_s is too short for it"
    assert idle._why_still() == cause
    idle.move("stage 4, micro-batch 6", waiting=True, due=True)
    idle._beats = {2: _Beat(b"4|0|stage 2, micro-batch 8"), 3: _Beat(b"4|1|stage 3, micro-batch 7")}
    told = "the others wait for rank 2 (last at stage 2, micro-batch 8), or runtime.timeout_s is too short for it"
    assert idle._why_still() == f"{told}: no pass has moved for 2 s"


def stand_still(rank, ends):
    """Moves for longer than the timeout, then no more, although another move is due, or none is."""
    dog = Watchdog(World(rank=0, world_size=4), timeout_s=0.6)
    for index in range(6):
        dog.move(f"stage 0, micro-batch {index}", waiting=False, due=True)
        time.sleep(0.2)
    if not ends:
        time.sleep(60)
    dog.move("waiting for prompts", waiting=True, due=False)
    time.sleep(1.5)
    dog.stop()


def test_passes_that_do_not_move_within_the_timeout_end_the_run():
    (still,) = call_on_ranks(1, stand_still, False, timeout_s=20)
    (idle,) = call_on_ranks(1, stand_still, True, timeout_s=20)
    cause = "rank 0, stage 0, micro-batch 5: at it for 0.6 s, or runtime.timeout_s is too short for it"
    assert still.returncode == 1 and f"rank 0 stops: {cause}" in still.stderr
    assert (idle.returncode, idle.stderr) == (0, "")


ERRORS = {"bug": KeyError("x"), "peer": Gone("closed"), "ctrl-c": KeyboardInterrupt()}


def end_in(rank: int, how: str) -> None:
    """Ends its process in one of the ways there are."""
    dog = Watchdog(World() if how == "alone" else WORLD, timeout_s=2.0)
    dog.where, dog.advice = "stage 1, micro-batch 7", "; mend it"
    if how == "closed stderr":
        os.close(2)
    if how == "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    if how == "two threads":
        threading.Thread(target=dog._leave, args=["first"]).start()
        dog._leave("first")
    try:
        raise ERRORS.get(how, ValueError("bad"))
    except BaseException as e:
        dog.abort(e)


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("alone", 1, "error: bad; mend it"),
        ("user", 1, "rank 1 stops: rank 1, stage 1, micro-batch 7: bad; mend it"),
        ("bug", 1, "rank 1 stops: rank 1, stage 1, micro-batch 7: KeyError: 'x'; mend it"),
        ("ctrl-c", 130, "rank 1 stops: rank 1, stage 1, micro-batch 7: interrupted; mend it"),
        ("peer", 1, "rank 1 stops: rank 1, stage 1, micro-batch 7: closed; mend it"),
        ("two threads", 1, "rank 1 stops: first; mend it"),
        (
            "sigterm",
            1,
            "rank 1 stops: rank 1, stage 1, micro-batch 7: ended by SIGTERM before rank 0, 2, 3 had joined; mend it",
        ),
        ("closed stderr", 1, None),
    ],
)
def test_a_process_ends_with_one_message(how, code, message):
    (ended,) = call_on_ranks(1, end_in, how, timeout_s=20)
    assert ended.returncode == code
    told = re.findall(r"^(?:error|rank \d+ stops): .*$", ended.stderr, re.MULTILINE)
    assert told == ([message] if message else [])
    assert ("Traceback" in ended.stderr) == (how == "bug")


def end_on_a_full_pipe(rank: int, how: str) -> None:
    """As `end_in`, where nobody reads what is written to stdout and stderr."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x")
    os.set_blocking(writer, True)
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    sys.stdout = os.fdopen(1, "w")
    sys.stdout.write("not flushed yet")
    end_in(rank, how)


@pytest.mark.parametrize("how", ["alone", "user", "bug", "ctrl-c", "peer", "two threads", "sigterm"])
def test_a_process_ends_though_nobody_reads_what_it_says(how):
    """A rank that hangs in its last words would keep torchrun, and with it everybody, waiting."""
    (ended,) = call_on_ranks(1, end_on_a_full_pipe, how, timeout_s=20)
    assert ended.returncode == (130 if how == "ctrl-c" else 1)
