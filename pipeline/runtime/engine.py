"""The loop that every rank runs: take what comes, compute, hand it on.

A source on rank 0 decides on passes while they run; the other ranks learn what to do from frames. What a rank computes
is its worker's business (`worker.py`, `gradients.py`), how frames move is the links'.

A worker that raises fails its pass alone: a failure takes the place of the pass's data, keeps its order, reaches the
source as the pass's result and so returns its credit. Where the source has no more passes and none is in flight, END
goes around the chain, and the links serve the next job. What breaks the links (a damaged frame, a lost rank) raises on
the rank that sees it, and ends the run.
"""

from __future__ import annotations

import functools
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from compressors.base import Payload
from pipeline.comm.link import Frame
from pipeline.comm.link_ends import Arrival, LinkEnds
from pipeline.comm.watchdog import PipelineError, tell
from pipeline.partition.passes import Pass
from pipeline.runtime.codecs import cause_in_words

__all__ = ["Departure", "Engine", "Entry", "Failure", "Report", "Result", "Source", "StageError", "Worker"]


class StageError(PipelineError):
    """A stage or codec raised on some rank, which has logged the traceback. The text names rank and position.

    The links are whole: the ranks may go on with another job.
    """

    names_place = True


class Report(Protocol):
    """Takes down what this rank is doing (`Control.report`)."""

    def __call__(self, where: str, *, waiting: bool = False, due: bool = False) -> str:
        """`waiting` for another rank; returns `where` with the rank's name.

        `due`: this must be called again within the timeout, or something hangs.
        """


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A pass that enters the ring: token ids, int64 [rows, tokens] on the CPU, and what the head must know of it."""

    work: Pass
    token_ids: torch.Tensor
    note: bytes = b""


@dataclass(frozen=True)
class Failure:
    """In the place of a pass's result: why there is none, with rank and position."""

    cause: str


@dataclass(frozen=True)
class Result:
    """What a pass has come to, and its payload bytes on each link of hidden states."""

    value: Any
    trail: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Departure:
    """What a worker sends on, over which link of the chain."""

    link_index: int
    payload: Payload
    trail: tuple[int, ...]
    token_ids: np.ndarray | None = None
    note: bytes = b""


class Source(Protocol):
    """Where passes come from and results go to, on rank 0."""

    @property
    def is_done(self) -> bool:
        """Whether no pass will follow."""

    def next(self) -> Entry | None:
        """The next pass; None when there is nothing to do yet."""

    def take(self, work: Pass, result: Result | Failure) -> None:
        """Passes come back in the order in which they went."""

    def is_void(self, work: Pass) -> bool:
        """Whether the pass that is due back is of no use any more, and what it would still leave in slots is not, too.

        It then may come back without a value.
        """


class Worker(Protocol):
    """What a rank computes. What it raises fails the pass, but for PipelineErrors, which end the run."""

    def place(self, link_index: int | None, work: Pass) -> str:
        """In words, what the rank is at with a frame of this link, or a pass that enters."""

    def enter(self, entry: Entry) -> Departure | Result:
        """Begin a pass."""

    def unpack(self, link_index: int, frame: Frame) -> torch.Tensor:
        """What has come over a link, in memory of its own: the frame's payload is a view of a buffer for the next."""

    def step(self, link_index: int, frame: Frame, inputs: torch.Tensor, entry: Entry | None) -> Departure | Result:
        """Go on with a pass; `entry` is what rank 0 knows of the one that is due back."""

    def spare(self, link_index: int, frame: Frame) -> Result:
        """End a pass where its last link ends, computing nothing: a result without value."""

    def drop(self, link_index: int | None, work: Pass) -> None:
        """A pass has failed where this link leads to, or before: undo there what it has left, and what it replaced."""

    def waited(self, link_index: int, seconds: float, *, sending: bool) -> None:
        """This rank has waited for a frame of a link, or to send one."""


class Engine:
    """One rank's loop over the links of one job.

    `source` is rank 0's, with `credits`, the passes that may be in flight. While some are, rank 0's reports say that
    another one is due.
    """

    def __init__(
        self,
        worker: Worker,
        ends: LinkEnds,
        report: Report,
        *,
        source: Source | None,
        credits: int,
    ) -> None:
        self._worker, self._ends, self._report = worker, ends, report
        self._source, self._credits = source, credits
        self._in_flight: deque[Entry] = deque()
        self._is_ending = source is None
        self._where = "waiting for a first pass"

    def run(self) -> None:
        """Until the source is done and END has gone around.

        Raises BadFrame for a damaged frame, LinkError when a peer is gone or silent, and what the source raises.
        """
        has_moved, start_s = True, 0.0
        while True:
            if not self._is_ending:
                has_moved |= self._start_passes()
            if self._is_ending and not self._ends.is_open:
                break
            if has_moved:  # a source that wakes this rank in vain does not
                self._tell(waiting=True)
                start_s = time.perf_counter()
            arrival = self._ends.take()
            has_moved = arrival is not None
            if arrival is not None:
                self._worker.waited(arrival.link_index, time.perf_counter() - start_s, sending=False)
                self._advance(arrival)
        self._report("finishing", waiting=True)
        self._ends.flush()

    def _start_passes(self) -> bool:
        """New work enters while there are credits: one pass after each frame, more if nothing else waits for this rank.

        Were frames always taken first, those that have come together would stay together, and the ring would empty
        while this rank starts as many passes at a time. Returns whether there was anything to do.
        """
        source = self._source
        assert source is not None
        has_started = False
        while len(self._in_flight) < self._credits and not (has_started and self._ends.has_arrived()):
            entry = source.next()
            if entry is None:
                break
            has_started = True
            self._in_flight.append(entry)
            self._perform(None, entry.work, functools.partial(self._worker.enter, entry))
        if source.is_done and not self._in_flight:
            self._is_ending = True
            self._ends.end()
        return has_started or self._is_ending

    def _advance(self, arrival: Arrival) -> None:
        link_index, frame = arrival.link_index, arrival.frame
        if frame is None:
            self._ends.release_end(arrival)
            return
        if frame.failure is not None:
            self._ends.release(arrival)
            self._worker.drop(link_index, frame.work)
            self._pass_on_failure(link_index, frame.work, frame.failure)
            return
        entry = self._in_flight[0] if link_index == self._ends.last_link and self._in_flight else None
        if entry is not None and self._source is not None and self._source.is_void(entry.work):
            result = self._worker.spare(link_index, frame)
            self._ends.release(arrival)
            self._finish(frame.work, result)
            return

        def go_on() -> Departure | Result:
            try:
                inputs = self._worker.unpack(link_index, frame)
            finally:
                self._ends.release(arrival)
            return self._worker.step(link_index, frame, inputs, entry)

        self._perform(link_index, frame.work, go_on)

    def _perform(self, link_index: int | None, work: Pass, compute: Callable[[], Departure | Result]) -> None:
        self._where = self._worker.place(link_index, work)
        place = self._tell()
        try:
            outcome = compute()
            if isinstance(outcome, Departure):
                self._send(work, outcome)
                return
        except PipelineError:
            raise
        except Exception as e:
            tell(f"ERROR: {place}: a stage or codec raised\n{traceback.format_exc()}")
            self._worker.drop(link_index, work)
            self._pass_on_failure(link_index, work, f"{place}: {cause_in_words(e)}")
            return
        self._finish(work, outcome)

    def _send(self, work: Pass, departure: Departure) -> None:
        start_s = time.perf_counter()
        self._tell(waiting=True)
        self._ends.senders[departure.link_index].send(
            work, departure.payload, departure.trail, token_ids=departure.token_ids, note=departure.note
        )
        self._worker.waited(departure.link_index, time.perf_counter() - start_s, sending=True)

    def _pass_on_failure(self, link_index: int | None, work: Pass, cause: str) -> None:
        onward = self._ends.senders.get(0 if link_index is None else link_index + 1)
        if onward is not None:
            onward.fail(work, cause)
        else:
            self._finish(work, Failure(cause))

    def _finish(self, work: Pass, result: Result | Failure) -> None:
        assert self._source is not None, "passes end on rank 0"
        entry = self._in_flight.popleft()
        assert entry.work == work, f"{work} has come back before {entry.work}"
        self._source.take(entry.work, result)

    def _tell(self, *, waiting: bool = False) -> str:
        is_due = bool(self._in_flight) or (self._source is not None and self._is_ending)
        return self._report(self._where, waiting=waiting, due=is_due)
