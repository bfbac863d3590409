"""How a run ends when it fails: every live rank prints one message, also when another rank dies or hangs.

Two threads per rank, which the main thread's blocking calls do not hold up:

* The heartbeat alone talks to the rendezvous store. It writes this rank's position (stage, micro-batch),
  reads those of the others, publishes this rank's failure and reads the run's: the first cause that was
  published is what every rank prints. A store whose process is stopped blocks it for good.
* The watchdog itself never blocks. It waits for signals and for a cause, and looks at how long each
  heartbeat, its own included, has stood still. SIGTERM, which torchrun sends to the survivors of a dead rank,
  starts a short search for the cause, also while the main thread sits in a receive, where Python runs no
  signal handlers.

A rank counts as silent once its heartbeat has not changed for the timeout, however long it works on a
micro-batch: only a stopped or dead process is silent, or one that holds the interpreter lock all that time. Of ranks
that live, rank 0's watchdog knows whether passes move: while some are under way, its main thread must get on with them
within the timeout, whether it computes, sends or waits.

Whom the heartbeats make a rank blame is decided in `heartbeats.py`.

Where the ring may be formed again (`on_over`), a silent rank, or a standstill that no rank is busy in, ends the epoch
(`epochs.py`) and not the run. The heartbeat sees that an epoch is over, whoever ended it, and breaks the connections,
so that the main thread does not go on waiting for what will not come.

No torch here, so that the watch begins before torch is imported; the store is handed in later.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Container
from typing import Any, NoReturn

from pipeline.comm.epochs import Epoch
from pipeline.comm.heartbeats import Clock, Heartbeats, heartbeat
from pipeline.comm.stop_wish import StopWish
from pipeline.comm.world import World

__all__ = ["EXIT_INTERRUPTED", "PipelineError", "RunFinished", "Watchdog", "bounded", "tell"]

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
# Between a sign of failure and the exit, for the cause to become known.
_GRACE_S = 2.0
# SIGTERM comes from torchrun, which has seen a rank end: wait until the dead one differs from the slow ones.
_SEARCH_S = 3.0
_TELL_S = 1.0


class PipelineError(RuntimeError):
    """Ends a run while it goes on. The text is written for the user, who needs no traceback to read it.

    `is_symptom`: another rank is to blame, `peer` where that is known. `names_place`: the text tells the
    failed rank's position itself.
    """

    is_symptom = False
    names_place = False
    peer: int | None = None


class RunFinished(Exception):
    """This process was started again after the others had finished the run."""


def bounded(work: Callable[[], object], wait_s: float = _TELL_S) -> None:
    """Do what may block for good, in a thread of its own, and go on after `wait_s` at the latest.

    What ends a failed rank must not depend on whether somebody reads its output: a write to a full pipe never returns.
    """

    def quiet() -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed terminal or file must not keep the rank alive
            work()

    thread = threading.Thread(target=quiet, name="bounded", daemon=True)
    thread.start()
    thread.join(wait_s)


def tell(text: str) -> None:
    """Write to stderr, if it takes the text within a second.

    One write, so that lines of several ranks do not mix; and below Python's locks, which a blocked thread may hold.
    """
    bounded(lambda: os.write(2, text.encode(errors="replace")))


class Watchdog:
    """One rank's watch. It begins with the signals; `join` adds the other ranks, `stop` ends it all.

    `where` is this rank's position in words and `waiting` whether it waits for another rank; whoever drives
    the run keeps them up to date by `move`. `advice` stands behind the last message. With one process there is nothing
    to watch, and `abort` only prints. Must be made on the main thread.

    `epoch_is_over` once another forming of the ring is due. `on_over` is called then, on another thread; without it a
    ring is formed once, and the end of its epoch is that of the run. What the main thread is at then, such as loading,
    may take `over_limit_s` to its end.

    After `let_stop`, a first signal asks the run to come to its end, and only a second one ends it.
    """

    def __init__(self, world: World, timeout_s: float) -> None:
        self.where = "starting"
        self.waiting = False
        self.advice = ""
        self.on_over: Callable[[], None] | None = None
        self.over_limit_s = timeout_s
        self.epoch_is_over = False
        self._over_s = 0.0
        self._world, self._timeout_s = world, timeout_s
        self._interval_s = min(0.25, timeout_s / 8)
        self._store: Any = None
        self._epoch: Epoch | None = None
        self._next: tuple[Any, Epoch | None] | None = None
        self._has_turned = threading.Event()
        self._ends_epoch = False
        self._beats = Heartbeats(world)
        self._own_cause: str | None = None
        self._cause: str | None = None
        self._exit_code = EXIT_FAILED
        self._unanswered_s = 0.0  # how long the store has not answered
        self._is_due = False
        self._num_moves = self._num_moves_seen = 0
        self._still_s = 0.0  # how long no move has been seen while one was due
        self._wish = StopWish(world)
        self._all_told = threading.Event()
        self._stopping = threading.Event()
        self._wake_heart = threading.Event()
        self._leaving = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        if world.world_size == 1:
            return
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # The wakeup descriptor is written at C level, also while the main thread sits in a blocking call.
        self._old_wakeup_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._old_sigterm = signal.signal(signal.SIGTERM, lambda *_: None)
        self._thread.start()

    @property
    def place(self) -> str:
        return f"rank {self._world.rank}, {self.where}" if self._world.world_size > 1 else self.where

    def move(self, where: str, *, waiting: bool, due: bool) -> None:
        """This rank has got somewhere; if another move is `due`, it must come within the timeout."""
        self.where, self.waiting, self._is_due = where, waiting, due
        self._num_moves += 1

    def join(self, store: Any, epoch: Epoch | None = None) -> None:
        """Watch the other ranks and be watched; again in each epoch.

        `store` is a `torch.distributed.Store`: a client of the rendezvous store for this object alone, and `epoch` its
        view of the epoch whose keys are meant.
        """
        self._has_turned.clear()
        self._next = (store, epoch)
        if self._heart.ident is None:
            self._turn()
            self._heart.start()
        else:
            self._wake_heart.set()
            self._has_turned.wait(self._timeout_s)

    def let_stop(self, on_stop: Callable[[], None]) -> None:
        """From here on, a first SIGINT or SIGTERM ends nothing: `on_stop` is called, on any thread, and on rank 0 for a
        signal of another rank, too. Not for SIGTERM where a rank that it ends may come back (`on_over`).

        On the main thread.
        """
        self._wish.hear(on_stop)

    def stop(self) -> None:
        """End the watch; signals get the meaning back that they had before."""
        self._stopping.set()
        self._wake_heart.set()
        self._writer.send(b"\0")
        signal.set_wakeup_fd(self._old_wakeup_fd)
        signal.signal(signal.SIGTERM, self._old_sigterm)
        self._wish.forget()
        self._thread.join()
        self._reader.close()
        self._writer.close()
        if self._heart.is_alive():
            self._heart.join(self._interval_s)

    def abort(self, error: BaseException) -> NoReturn:
        """Print the cause of the end, tell the other ranks, and end this process.

        An error that is not made for users comes with its traceback. Destructors do not run: those of a
        process group whose peer is gone may block.
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        message = str(error)
        bounded(sys.stdout.flush)
        if isinstance(error, KeyboardInterrupt):
            message, self._exit_code = "interrupted", EXIT_INTERRUPTED
        elif not isinstance(error, (ValueError, PipelineError)):
            message = f"{type(error).__name__}: {error}"
            tell("".join(traceback.format_exception(error)))
        names_place = isinstance(error, PipelineError) and error.names_place
        if self._world.world_size == 1:
            has_place = isinstance(error, PipelineError) and not names_place
            self.leave(f"{self.where}: {message}" if has_place else message)
        if isinstance(error, PipelineError) and error.is_symptom:
            self.leave(self._wait_for_cause() or self._publish(self._beats.blame(error.peer, message, self.place)))
        self.leave(self._publish(message if names_place else f"{self.place}: {message}"))

    def leave(self, cause: str) -> NoReturn:
        """Print the last message and end the process, from any thread; one that comes second waits here for the end.

        The other ranks are not told: `abort` does that.
        """
        with self._leaving:
            try:
                name = f"rank {self._world.rank} stops" if self._world.world_size > 1 else "error"
                tell(f"\n{name}: {cause}{self.advice}\n")
                if self._world.hosts_store and self._heart.is_alive():
                    self._all_told.wait(_GRACE_S)
            finally:
                os._exit(self._exit_code)

    def last_known(self, rank: int) -> str:
        """`rank 2 (last at stage 2, micro-batch 5)`, or that it has not started."""
        return self._beats.last_known(rank)

    def _watch(self) -> None:
        clock = Clock(self._interval_s)
        while not self._stopping.is_set():
            ready, _, _ = select.select([self._reader], [], [], self._interval_s / 2)
            received = set(self._reader.recv(64)) if ready else set()
            passed_s = clock.tick()
            self._unanswered_s += passed_s if self._heart.is_alive() else 0.0
            self._over_s = self._over_s + passed_s if self.epoch_is_over else 0.0
            num_moves = self._num_moves
            is_still = self._is_due and num_moves == self._num_moves_seen
            self._still_s, self._num_moves_seen = self._still_s + passed_s if is_still else 0.0, num_moves
            cause = self._look(received)
            if cause is not None and not self._stopping.is_set():
                self.leave(cause)

    def _look(self, received: Container[int]) -> str | None:
        """A reason to end, if there is one; `received` are the signals since the last look."""
        if self._wish.is_heard and self._asks_to_stop(received):
            if self._wish.count_signal():
                self._exit_code = EXIT_INTERRUPTED
                return self._publish(f"{self.place}: interrupted")
            self._wake_heart.set()
            return None
        if signal.SIGINT in received:
            time.sleep(0.5)  # the main thread raises KeyboardInterrupt, unless it is blocked
            self._exit_code = EXIT_INTERRUPTED
            return self._publish(f"{self.place}: interrupted")
        if signal.SIGTERM in received and self.on_over is not None:
            # The others wait for this rank to be started again, unless one has told a cause that is still on its way.
            return self._wait_for_cause(4 * self._interval_s) or self._guess_cause()
        if signal.SIGTERM in received:
            return self._wait_for_cause(_SEARCH_S) or self._publish(self._guess_cause())
        if self._cause is not None:
            return self._cause
        if self.epoch_is_over and self.on_over is None:
            return f"{self.place}: a rank was started again, for which this run does not wait (runtime.rejoin_s is 0)"
        if self._over_s > self.over_limit_s:
            return f"{self.place}: at it for {self.over_limit_s:g} s, while the others form the ring again"
        if self._unanswered_s > self._timeout_s:
            return f"{self._store_in_words()} has not answered for {self._timeout_s:g} s"
        silent = [] if self.epoch_is_over else self._beats.silent(self._timeout_s)
        if silent and self.on_over is not None:
            self._end_epoch()
            return None
        if silent:
            who = self._beats.last_known(*silent)
            return self._publish(f"no sign of life from {who} for {self._timeout_s:g} s")
        if self._still_s > self._timeout_s:
            if self.on_over is not None and self.waiting and not self._beats.busy():
                self._end_epoch()
                return None
            return self._publish(self._why_still())
        return None

    def _asks_to_stop(self, received: Container[int]) -> bool:
        return signal.SIGINT in received or (signal.SIGTERM in received and self.on_over is None)

    def _end_epoch(self) -> None:
        self._ends_epoch = True
        self._wake_heart.set()

    def _why_still(self) -> str:
        if not self.waiting:
            return f"{self.place}: at it for {self._timeout_s:g} s, or runtime.timeout_s is too short for it"
        return self._beats.blame(None, f"no pass has moved for {self._timeout_s:g} s", self.place)

    def _guess_cause(self) -> str:
        """Why torchrun sends SIGTERM although no rank has published a cause."""
        silent = self._beats.silent(0.8 * _SEARCH_S)
        if silent:
            return f"{self.place}: ended by SIGTERM; no sign of life from {self._beats.last_known(*silent)}"
        missing = self._beats.not_started()
        before = f" before rank {', '.join(map(str, missing))} had joined" if missing else ""
        return f"{self.place}: ended by SIGTERM{before}"

    def _wait_for_cause(self, wait_s: float = _GRACE_S) -> str | None:
        """The run's cause, once a rank has published one; None if none does."""
        deadline = time.monotonic() + wait_s
        while self._cause is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return self._cause

    def _publish(self, cause: str) -> str:
        """Offer `cause` as the run's; returns the one that was published first, if the store answers."""
        self._own_cause = cause
        self._wake_heart.set()
        deadline = time.monotonic() + _GRACE_S
        while self._cause is None and self._heart.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._cause or cause

    def _beat(self) -> None:
        """The heartbeat thread."""
        count, clock = 0, Clock(self._interval_s)
        try:
            while not self._stopping.is_set():
                if self._next is not None:
                    self._turn()
                count += 1
                beat = heartbeat(count, is_waiting=self.waiting, where=self.where)
                self._store.set(f"beat/{self._world.rank}", beat)
                self._read_beats(clock.tick())
                if self._cause is None:
                    self._exchange_cause()
                elif self._world.hosts_store and self._store.check(self._keys_of_told()):
                    self._all_told.set()
                self._look_at_epoch()
                self._wish.pass_on(self._store)
                self._unanswered_s = 0.0
                self._wake_heart.wait(0.05 if self._cause else self._interval_s)
                self._wake_heart.clear()
        except (RuntimeError, OSError):
            if not self._stopping.is_set():
                self._cause = self._cause or self._own_cause or f"{self._store_in_words()} has ended"

    def _turn(self) -> None:
        """Begin with the next epoch: on the heartbeat's thread, which so never mixes two."""
        assert self._next is not None
        (self._store, self._epoch), self._next = self._next, None
        self._beats = Heartbeats(self._world)
        self.epoch_is_over = self._ends_epoch = False
        self._wish.begin_epoch()
        self._has_turned.set()

    def _look_at_epoch(self) -> None:
        if self._epoch is None or self.epoch_is_over:
            return
        if self._ends_epoch:
            self._epoch.end()
        if self._epoch.is_over():
            self.epoch_is_over = True
            if self.on_over is not None:
                self.on_over()

    def _read_beats(self, passed_s: float) -> None:
        started = [rank for rank in range(self._world.world_size) if self._has_started(rank)]
        beats = self._store.multi_get([f"beat/{rank}" for rank in started])
        for rank, value in zip(started, beats, strict=True):
            self._beats.see(rank, value, passed_s)

    def _has_started(self, rank: int) -> bool:
        return self._beats.has_started(rank) or self._store.check([f"beat/{rank}"])

    def _exchange_cause(self) -> None:
        cause = None
        if self._own_cause is not None:
            cause = self._store.compare_set("cause", "", self._own_cause)
            if self._epoch is not None:
                self._epoch.pass_on(self._own_cause)
        elif self._store.check(["cause"]):
            cause = self._store.get("cause")
        if cause is not None:
            self._store.set(f"told/{self._world.rank}", "")
            self._cause = cause.decode(errors="replace")

    def _keys_of_told(self) -> list[str]:
        """Of the ranks that live and will therefore ask for the cause."""
        return [f"told/{rank}" for rank in self._beats.alive(_GRACE_S / 2)]

    def _store_in_words(self) -> str:
        if self._world.store_host is None:
            return f"{self.place}: torchrun's rendezvous store"
        return f"{self.last_known(self._world.store_host)}, which hosts the rendezvous store,"
