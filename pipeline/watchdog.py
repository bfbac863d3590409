"""The watch over the other ranks: every live rank ends with one message when another dies, hangs or fails.

Two threads per rank, which the main thread's blocking calls do not hold up:

* The heartbeat alone talks to the rendezvous store. It writes this rank's position (stage, micro-batch), reads those
  of the others, publishes this rank's failure and reads the run's: the first cause that was published is what every
  rank prints. A store whose process is stopped blocks it for good.
* The watchdog itself never blocks. It waits for signals and for a cause, and looks at how long each heartbeat,
  its own included, has stood still. SIGTERM, which torchrun sends to the survivors of a dead rank, starts a short
  search for the cause, also while the main thread sits in a receive, where Python runs no signal handlers.

A rank counts as silent once its heartbeat has not changed for the timeout, however long it works on a micro-batch:
only a stopped or dead process is silent, or one that holds the interpreter lock all that time.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from dataclasses import dataclass

import torch.distributed as dist

__all__ = ["EXIT_FAILED", "EXIT_INTERRUPTED", "Position", "Watchdog"]

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
# Between a sign of failure and the exit, for the cause to become known.
_GRACE_S = 1.5
# SIGTERM comes from torchrun, which has seen a rank end: wait until the dead one differs from the slow ones.
_SEARCH_S = 3.0


@dataclass
class Position:
    """What a rank is doing, in words, and whether it waits for another rank meanwhile.

    `advice` ends every last message of the rank.
    """

    rank: int
    where: str = "starting"
    waiting: bool = False
    advice: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.where}"


@dataclass
class _Beat:
    """The last heartbeat of a rank and when this rank first saw it."""

    value: bytes
    seen_s: float

    def age_s(self) -> float:
        return time.monotonic() - self.seen_s

    @property
    def where(self) -> str:
        return self.value.decode(errors="replace").split("|", 2)[2]

    @property
    def waiting(self) -> bool:
        return self.value.split(b"|", 2)[1] == b"1"


class Watchdog:
    """One rank's watch. Starts with the signals; `join` adds the store, `stop` ends it all.

    Args:
        position: this rank's, kept up to date by others.
        store_host: who hosts the rendezvous store: a rank, or None for torchrun's agent.
    """

    def __init__(self, position: Position, *, world_size: int, timeout_s: float, store_host: int | None) -> None:
        self._position, self._world_size, self._timeout_s = position, world_size, timeout_s
        self._store_host = store_host
        self._interval_s = min(0.5, timeout_s / 8)
        self._store: dist.Store | None = None
        self._beats: dict[int, _Beat] = {}
        self._own_cause: str | None = None
        self._cause: str | None = None
        self._exit_code = EXIT_FAILED
        self._answered_s = time.monotonic()  # when the store last did
        self._all_told = threading.Event()
        self._stopping = threading.Event()
        self._wake_heart = threading.Event()
        self._leaving = threading.Lock()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # The wakeup descriptor is written at C level, also while the main thread sits in a blocking call.
        self._old_wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old_sigterm = signal.signal(signal.SIGTERM, lambda *_: None)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def join(self, store: dist.Store) -> None:
        """Take part in the others' watch. `store` is a client of this object's own."""
        self._store = store
        self._answered_s = time.monotonic()
        self._heart.start()

    def stop(self) -> None:
        """End the watch; signals get the meaning back that they had before."""
        self._stopping.set()
        self._wake()
        self._wake_heart.set()
        signal.set_wakeup_fd(self._old_wakeup_fd)
        signal.signal(signal.SIGTERM, self._old_sigterm)
        self._thread.join()
        if self._heart.is_alive():
            self._heart.join(self._interval_s)

    def fail(self, cause: str, *, code: int = EXIT_FAILED) -> None:
        """Publish this rank's own failure and exit. Does not return."""
        self._exit_code = code
        self._leave(self._publish(cause))

    def fail_for_peer(self, peer: int | None, symptom: str) -> None:
        """Exit for what this rank saw of another one, such as a closed connection. Does not return.

        Waits a moment first: that rank may be about to say why, or it falls silent.
        """
        deadline = time.monotonic() + _GRACE_S
        while self._cause is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self._leave(self._cause or self._publish(self._blame(peer, symptom)))

    def last_known(self, rank: int) -> str:
        """`rank 2 (last at stage 2, micro-batch 5)`, or that it has not started."""
        beat = self._beats.get(rank)
        return f"rank {rank} (last at {beat.where})" if beat else f"rank {rank} (not started)"

    def _watch(self) -> None:
        while not self._stopping.is_set():
            ready, _, _ = select.select([self._reader], [], [], self._interval_s / 2)
            received = set(self._reader.recv(64)) if ready else set()
            if self._stopping.is_set():
                return
            if signal.SIGINT in received:
                self._interrupt()
            if signal.SIGTERM in received:
                self._leave(self._search_cause())
            if self._cause is not None:
                self._leave(self._cause)
            silent = self._silent_ranks(self._timeout_s)
            if silent:
                self._leave(self._publish(f"{silent} has not answered for {self._timeout_s:g} s"))
            if self._heart.is_alive() and time.monotonic() - self._answered_s > self._timeout_s:
                self._leave(f"{self._store_in_words()} has not answered for {self._timeout_s:g} s")

    def _interrupt(self) -> None:
        """After SIGINT the main thread raises KeyboardInterrupt, unless it is blocked."""
        time.sleep(0.5)
        self._exit_code = EXIT_INTERRUPTED
        self._leave(self._publish(f"{self._position}: interrupted"))

    def _search_cause(self) -> str:
        """After SIGTERM: wait for a published cause, then look for a silent rank, then give up."""
        deadline = time.monotonic() + _SEARCH_S
        while self._cause is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if self._cause is not None:
            return self._cause
        missing = [str(rank) for rank in range(self._world_size) if rank not in {*self._beats, self._position.rank}]
        cause = f"{self._position}: ended by SIGTERM"
        silent = self._silent_ranks(0.8 * _SEARCH_S)
        if silent:
            cause = f"{silent} has ended or hangs"
        elif missing:
            cause += f", and rank {', '.join(missing)} had not started"
        return self._publish(cause)

    def _blame(self, peer: int | None, symptom: str) -> str:
        """Who is at fault for a link's failure: a silent peer, else the rank that keeps the others waiting."""
        if peer in self._beats and self._beats[peer].age_s() > 0.8 * _GRACE_S:
            return f"{self.last_known(peer)} is gone: {symptom}"
        busy = [rank for rank, beat in sorted(self._beats.items()) if not beat.waiting and rank != self._position.rank]
        if busy:
            return f"{', '.join(map(self.last_known, busy))} keeps the others waiting: {symptom}"
        return f"{self._position}: {symptom}"

    def _silent_ranks(self, limit_s: float) -> str:
        silent = [
            rank
            for rank, beat in sorted(self._beats.copy().items())
            if rank != self._position.rank and beat.age_s() > limit_s
        ]
        return ", ".join(map(self.last_known, silent))

    def _publish(self, cause: str) -> str:
        """Offer `cause` as the run's; returns the one that was published first, as far as the store answers."""
        self._own_cause = cause
        self._wake_heart.set()
        deadline = time.monotonic() + _GRACE_S
        while self._cause is None and self._heart.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._cause or cause

    def _leave(self, cause: str) -> None:
        """Print the last message and end the process; the thread that comes second waits here for the end.

        Runs no destructors: those of a process group whose peer is gone may block.
        """
        with self._leaving:
            if self._stopping.is_set():
                return
            try:
                # One write, below Python's locks, which a blocked main thread may hold.
                os.write(2, f"\nrank {self._position.rank} stops: {cause}{self._position.advice}\n".encode())
                if self._store_host == self._position.rank and self._heart.is_alive():
                    self._all_told.wait(_GRACE_S)
            finally:
                os._exit(self._exit_code)

    def _beat(self) -> None:
        """The heartbeat thread."""
        count = 0
        try:
            while not self._stopping.is_set():
                count += 1
                position = self._position
                self._store.set(f"beat/{position.rank}", f"{count}|{position.waiting:d}|{position.where}")
                self._read_beats()
                if self._cause is None:
                    self._exchange_cause()
                elif self._store_host == position.rank and self._store.check(self._keys("told")):
                    self._all_told.set()
                self._answered_s = time.monotonic()
                self._wake_heart.wait(0.05 if self._cause else self._interval_s)
                self._wake_heart.clear()
        except (RuntimeError, OSError):
            if not self._stopping.is_set():
                self._cause = self._cause or self._own_cause or f"{self._store_in_words()} has ended"

    def _read_beats(self) -> None:
        started = [rank for rank in range(self._world_size) if self._has_started(rank)]
        for rank, value in zip(started, self._store.multi_get([f"beat/{rank}" for rank in started])):
            if rank not in self._beats or self._beats[rank].value != value:
                self._beats[rank] = _Beat(value, time.monotonic())

    def _has_started(self, rank: int) -> bool:
        return rank in self._beats or self._store.check([f"beat/{rank}"])

    def _exchange_cause(self) -> None:
        cause = None
        if self._own_cause is not None:
            cause = self._store.compare_set("cause", "", self._own_cause)
        elif self._store.check(["cause"]):
            cause = self._store.get("cause")
        if cause is not None:
            self._store.set(f"told/{self._position.rank}", "")
            self._cause = cause.decode(errors="replace")

    def _keys(self, prefix: str) -> list[str]:
        return [f"{prefix}/{rank}" for rank in range(self._world_size)]

    def _store_in_words(self) -> str:
        if self._store_host is None:
            return "the rendezvous store of torchrun"
        return f"{self.last_known(self._store_host)}, which hosts the rendezvous store,"

    def _wake(self) -> None:
        try:
            self._writer.send(b"\0")
        except BlockingIOError:
            pass  # full: the reader wakes anyway
