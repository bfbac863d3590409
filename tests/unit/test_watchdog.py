"""What the watchdog does to a process, and whom it blames. Whole runs: distributed/test_failures.py."""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from typing import ClassVar

import pytest

from pipeline.comm import heartbeats
from pipeline.comm.epochs import Epoch
from pipeline.comm.heartbeats import Clock, Heartbeats, heartbeat
from pipeline.comm.watchdog import PipelineError, Watchdog
from pipeline.comm.world import World
from tests.helpers.launch import call_on_ranks

WORLD = World(rank=1, world_size=4)



def seen(**ranks):
    """What rank 1 has seen: (is waiting, where, for how long it has stood still) of rank0, rank2, ..."""
    beats = Heartbeats(WORLD)
    for name, (is_waiting, where, silent_s) in ranks.items():
        value = heartbeat(8, is_waiting=is_waiting, where=where).encode()
        beats.see(int(name.removeprefix("rank")), value, 900.0)
        beats.see(int(name.removeprefix("rank")), value, silent_s)
    return beats


class Gone(PipelineError):
    is_symptom = True
    peer = 2


def test_signals_mean_after_the_end_what_they_meant_before():
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    dog = Watchdog(WORLD, timeout_s=2.0)
    assert signal.getsignal(signal.SIGTERM) != before[0]
    dog.stop()
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before


class Store(dict):
    """As torch.distributed's; who asks for the epoch waits until it `answers`."""

    def __init__(self):
        super().__init__()
        self.is_asked, self.answers = threading.Event(), threading.Event()

    def set(self, key, value):
        self[key] = value.encode()

    def check(self, keys):
        return all(key in self for key in keys)

    def multi_get(self, keys):
        return [self[key] for key in keys]

    def compare_set(self, key, expected, wanted):
        return self.setdefault(key, wanted.encode())

    def get(self, key):
        self.is_asked.set()
        self.answers.wait()
        return super().get(key, b"0")


def test_a_cause_that_is_told_between_two_epochs_reaches_the_next(monkeypatch):
    """Ctrl-C while the ring is formed again: the others must not wait for this rank."""
    first, second, before = Store(), Store(), signal.getsignal(signal.SIGINT)
    second.answers.set()
    dog = Watchdog(WORLD, timeout_s=20.0)
    monkeypatch.setattr(dog, "leave", lambda cause: None)
    dog.join(first, Epoch(first, 0))
    assert first.is_asked.wait(5)
    turning = threading.Thread(target=dog.join, args=(second, Epoch(second, 0)))
    turning.start()
    threading.Timer(0.3, first.answers.set).start()
    try:
        dog.abort(ValueError("interrupted"))
    finally:
        signal.signal(signal.SIGINT, before)
        turning.join()
        dog.stop()
    assert second.get("cause") == b"rank 1, starting: interrupted"


def test_sigterm_does_not_come_before_the_cause_where_a_ring_may_be_formed_again(monkeypatch):
    """One torchrun of several ranks ends the others at once when one has failed and told why."""
    store, told = Store(), []
    store.answers.set()
    dog = Watchdog(WORLD, timeout_s=20.0)
    dog.on_over = lambda: None
    monkeypatch.setattr(dog, "leave", told.append)
    dog.join(store, Epoch(store, 0))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    assert told == []
    store["cause"] = b"rank 2 has failed"
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    dog.stop()
    assert told[0] == "rank 2 has failed"


def test_one_process_keeps_its_signals():
    before = signal.getsignal(signal.SIGTERM)
    Watchdog(World(), timeout_s=2.0)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_process_that_was_stopped_itself_counts_no_silence(monkeypatch):
    now_s = iter([0.0, 0.4, 900.4, 900.9])
    monkeypatch.setattr(heartbeats.time, "monotonic", lambda: next(now_s))
    clock = Clock(interval_s=0.25)
    assert [clock.tick(), clock.tick(), clock.tick()] == [pytest.approx(0.4), 1.0, pytest.approx(0.5)]


def test_silence_is_counted_from_the_last_heartbeat_that_differed():
    beats = Heartbeats(WORLD)
    for value, passed_s in ((b"1|0|here", 5.0), (b"1|0|here", 0.5), (b"1|0|here", 0.5), (b"2|0|here", 0.5)):
        silent = beats.silent(0.9)
        beats.see(3, value, passed_s)
    assert silent == [3] and beats.silent(0.0) == [] and beats.alive(0.1) == [3]
    assert beats.not_started() == [0, 2] and beats.has_started(3) and not beats.has_started(2)
    assert beats.last_known(3, 2) == "rank 3 (last at here) and rank 2 (not started)"


def test_a_rank_that_was_stopped_while_it_worked_is_not_busy():
    """It is lost, and the ring may be formed again: a standstill is no fault of one that lives."""
    beats = seen(rank0=(True, "stage 4", 0.0), rank2=(False, "stage 2", 2.9), rank3=(False, "stage 3", 0.2))
    assert beats.busy() == [3]


def test_a_rank_does_not_count_itself():
    beats = seen(rank1=(False, "stage 1", 60.0), rank2=(True, "stage 2", 0.0))
    assert beats.silent(1.0) == [] and beats.alive(1.0) == [2]
    assert beats.blame(2, "closed", "here") == "here: closed"


def test_a_silent_peer_is_blamed_first():
    beats = seen(
        rank0=(False, "stage 0, micro-batch 9", 1.9), rank2=(False, "stage 2, micro-batch 5", 1.9),
        rank3=(False, "stage 3, micro-batch 5", 0.0),
    )  # fmt: skip
    assert beats.blame(2, "closed", "here") == "lost rank 2 (last at stage 2, micro-batch 5): closed"


def test_a_silent_rank_is_blamed_before_a_peer_that_lives():
    beats = seen(rank0=(False, "stage 0, micro-batch 9", 0.0), rank2=(False, "loading weights", 1.9))
    assert beats.blame(0, "closed", "here") == "lost rank 2 (last at loading weights): closed"


def test_then_whoever_does_not_wait():
    beats = seen(
        rank0=(True, "stage 4, micro-batch 5", 0.0), rank1=(False, "stage 1, micro-batch 7", 0.0),
        rank2=(True, "stage 2, micro-batch 6", 0.0), rank3=(False, "stage 3, micro-batch 5", 0.0),
    )  # fmt: skip
    assert beats.blame(2, "timed out", "here") == (
        "the others wait for rank 3 (last at stage 3, micro-batch 5), "
        "or runtime.timeout_s is too short for it: timed out"
    )


def test_else_the_symptom_is_told_where_it_was_seen():
    beats = seen(rank2=(True, "stage 2, micro-batch 6", 0.0))
    assert beats.blame(2, "timed out", "rank 1, micro-batch 7") == "rank 1, micro-batch 7: timed out"


class OthersAlive(dict):
    """A rendezvous store with the heartbeats of ranks that get on: each time they are read, they have changed."""

    count = 0
    others: ClassVar = {"beat/2": (False, "stage 2, micro-batch 8"), "beat/3": (True, "stage 3, micro-batch 7")}

    def set(self, key, value):
        self[key] = value.encode()

    def compare_set(self, key, expected, wanted):
        return self.setdefault(key, wanted.encode())

    def check(self, keys):
        return all(key in self or key in self.others for key in keys)

    def multi_get(self, keys):
        self.count += 1
        return [self._read(key) for key in keys]

    def _read(self, key):
        if key not in self.others:
            return self[key]
        is_waiting, where = self.others[key]
        return heartbeat(self.count, is_waiting=is_waiting, where=where).encode()


def wait_still(rank):
    """Rank 0 waits for a pass that never comes, while the others' heartbeats go on."""
    dog = Watchdog(World(rank=0, world_size=4), timeout_s=0.6)
    dog.join(OthersAlive())
    dog.move("stage 4, micro-batch 6", waiting=True, due=True)
    time.sleep(60)


def test_of_a_standstill_while_all_live_the_rank_that_computes_is_named():
    """Rank 0's own watchdog sees it, as nobody else times passes."""
    (still,) = call_on_ranks(1, wait_still, timeout_s=20)
    told = "the others wait for rank 2 (last at stage 2, micro-batch 8), or runtime.timeout_s is too short for it"
    assert still.returncode == 1 and f"rank 0 stops: {told}: no pass has moved for 0.6 s\n" in still.stderr


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


@pytest.mark.slow
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
        threading.Thread(target=dog.leave, args=["first"]).start()
        dog.leave("first")
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


@pytest.mark.slow
@pytest.mark.parametrize("how", ["alone", "user", "bug", "ctrl-c", "peer", "two threads", "sigterm"])
def test_a_process_ends_though_nobody_reads_what_it_says(how):
    """A rank that hangs in its last words would keep torchrun, and with it everybody, waiting."""
    (ended,) = call_on_ranks(1, end_on_a_full_pipe, how, timeout_s=20)
    assert ended.returncode == (130 if how == "ctrl-c" else 1)
