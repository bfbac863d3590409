"""Which rows go around the ring next: requests join and leave between passes.

The source of an engine (`runtime.engine`). It knows slots, positions and token ids; what a token means, and when an
answer ends, is the answer's business.

* A request gets a slot when one is free. If a slot holds a prefix of its prompt already, that is not computed again.
* Prompts go in chunks, of which several are under way at once; passes of sampled tokens and chunks take turns.
* Sampled tokens of several sequences share a pass: as many as make `passes` of them, so that each pass costs the
  reading of the weights once and as many ranks work as can. A sequence waits for its own token only.
* What a failed pass has left on the ranks, they undo (`Worker.drop`); a slot that was to begin with a copy then holds
  nothing. A pass of several rows is tried again row by row.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from pipeline.models.sampling import Sampled, SamplingOptions
from pipeline.models.stage import Scores
from pipeline.partition.passes import Pass, PassKind, Row
from pipeline.runtime.engine import Entry, Failure, Result
from pipeline.runtime.head import begin_note

__all__ = ["Answering", "Scheduler"]

MIN_SHARED = 16  # positions of a prefix that are worth a copy
LOOK_S = 0.1  # between looks at requests that wait
MAX_LOOK = 64  # requests of them that may overtake one that waits for its prompt to be computed


class Answering(Protocol):
    """A request under way, as the scheduler sees it."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """At least one."""

    @property
    def options(self) -> SamplingOptions: ...

    @property
    def expires_s(self) -> float:
        """By `time.monotonic`; infinity for never."""

    @property
    def is_finished(self) -> bool: ...

    def begin(self) -> None:
        """It has a slot."""

    def take(self, token: Sampled) -> None:
        """The next token."""

    def count(self, payload_bytes: Sequence[float]) -> None:
        """A pass of its own has crossed the links, with so many bytes on each."""

    def finish(self, reason: str, error: str | None = None) -> None:
        """No more tokens will come."""


@dataclass(eq=False)
class _Sequence:
    """A request in a slot. Positions [0, sent) of `ids`, prompt and answer, are in the ring or behind it."""

    answering: Answering
    slot: int
    ids: list[int]
    sent: int = 0
    source: int | None = None  # the slot that its first positions are taken from
    epoch: int = 0  # passes of earlier ones no longer count
    is_under_way: bool = False  # its last position is, so that a token is due
    is_alone: bool = False
    has_begun: bool = False

    @property
    def num_prompt(self) -> int:
        return len(self.answering.prompt_ids)

    @property
    def is_prefilling(self) -> bool:
        return self.sent < self.num_prompt

    @property
    def is_ready(self) -> bool:
        return not self.is_prefilling and not self.is_under_way


@dataclass
class _UnderWay:
    """What a pass was made of."""

    rows: list[_UnderWayRow] = field(default_factory=list)


@dataclass(frozen=True)
class _UnderWayRow:
    """`held` is what its slot held for the sequence, of which `kept` positions are there if the pass fails."""

    sequence: _Sequence
    epoch: int
    start: int
    held: list[int]
    kept: int


class Scheduler:
    """Requests in, passes out.

    Args:
        num_slots, slot_length: of the caches.
        prefill_chunk: tokens of a prompt in one pass.
        passes: of sampled tokens that are under way at once.
        shares_prefixes: whether what a slot holds may serve another prompt.
        shares_answers: whether sampled tokens in it may; not where they have another codec than prompts.
        wake: called when there is something new to do, from whatever thread `submit` is.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        slot_length: int,
        prefill_chunk: int,
        passes: int,
        shares_prefixes: bool = True,
        shares_answers: bool = True,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.wake = wake
        self._slot_length, self._chunk, self._passes = slot_length, prefill_chunk, passes
        self._shares_prefixes, self._shares_answers = shares_prefixes, shares_answers
        self._queue: deque[Answering] = deque()
        self._lock = threading.Lock()
        self._is_closed = False
        self._free = deque(range(num_slots))
        self._held: list[list[int]] = [[] for _ in range(num_slots)]  # token ids that the caches have to share
        self._active: list[_Sequence] = []
        self._under_way: deque[_UnderWay] = deque()
        self._num_decodes = 0
        self._prefilled_last = False
        self._next_look_s = 0.0

    def submit(self, answering: Answering) -> None:
        """Answer one more request."""
        with self._lock:
            self._queue.append(answering)
        self.wake()

    def close(self) -> None:
        """No more requests will come."""
        self._is_closed = True
        self.wake()

    @property
    def is_done(self) -> bool:
        return self._is_closed and not self._queue and not self._active

    def next(self) -> Entry | None:
        self._expire()
        self._admit()
        ready = [s for s in self._active if s.is_ready]
        prefilling = [s for s in self._active if s.is_prefilling]
        can_decode = bool(ready) and self._num_decodes < self._passes
        if can_decode and (self._prefilled_last or not prefilling):
            self._prefilled_last = False
            return self._decode(ready)
        if prefilling:
            self._prefilled_last = True
            return self._prefill(prefilling[0])
        return None

    def take(self, work: Pass, result: Result | Failure) -> None:
        under_way = self._under_way.popleft()
        self._num_decodes -= work.kind is PassKind.DECODE
        tokens = result.value if isinstance(result, Result) else None
        assert not isinstance(tokens, Scores)
        for place, row in enumerate(under_way.rows):
            sequence = row.sequence
            if isinstance(result, Failure):
                del row.held[row.kept :]
            if row.epoch != sequence.epoch:
                continue  # of a sequence that has ended, or was sent back
            if isinstance(result, Failure):
                self._fail(sequence, row.start, result.cause, shared=len(under_way.rows) > 1)
                continue
            sequence.is_alone = False
            sequence.answering.count([nbytes / len(under_way.rows) for nbytes in result.trail])
            if tokens is not None:
                self._extend(sequence, tokens[place])

    def _expire(self) -> None:
        now_s = time.monotonic()
        for sequence in [s for s in self._active if _is_over(s.answering, now_s)]:
            self._leave(sequence)
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + LOOK_S
        with self._lock:
            waiting = list(self._queue)
        for answering in waiting:
            if _is_over(answering, now_s):
                self._unqueue(answering)

    def _admit(self) -> None:
        """Give free slots to requests, in their order; one that shares a prompt under way waits for it."""
        with self._lock:
            waiting = list(itertools.islice(self._queue, MAX_LOOK))
        now_s = time.monotonic()
        for answering in waiting:
            if not self._free:
                return
            if _is_over(answering, now_s):
                self._unqueue(answering)
                continue
            source, shared = self._shared_prefix(answering.prompt_ids)
            if shared is None:
                continue
            self._unqueue(answering)
            if source in self._free:
                slot = source
                self._free.remove(slot)
            else:
                slot = self._free.popleft()
            sequence = _Sequence(answering, slot, list(answering.prompt_ids), sent=shared)
            sequence.source = source if shared else None
            self._active.append(sequence)
            answering.begin()

    def _unqueue(self, answering: Answering) -> None:
        with self._lock:
            self._queue.remove(answering)

    def _shared_prefix(self, prompt: Sequence[int]) -> tuple[int, int | None]:
        """(slot, how many positions it holds of a prompt); None for the latter when more of them are on their way."""
        best, longest = self._free[0], 0
        if not self._shares_prefixes:
            return best, 0
        for slot, held in enumerate(self._held):
            shared = _common(held, prompt[:-1])
            if shared > longest or (shared == longest and slot in self._free and best not in self._free):
                best, longest = slot, shared
        coming = [_common(s.ids[: s.num_prompt], prompt[:-1]) for s in self._active if s.is_prefilling]
        if max(coming, default=0) >= longest + MIN_SHARED:
            return best, None
        return (best, longest) if longest >= MIN_SHARED else (self._free[0], 0)

    def _prefill(self, sequence: _Sequence) -> Entry:
        if not sequence.has_begun:
            self._begin(sequence)
        start = sequence.sent
        chunk = sequence.ids[start : min(start + self._chunk, sequence.num_prompt)]
        sequence.sent += len(chunk)
        is_last = not sequence.is_prefilling
        sequence.is_under_way = is_last
        note, source, held, kept = b"", None, self._held[sequence.slot], start
        if not sequence.has_begun:
            note = begin_note({sequence.slot: sequence.answering.options})
            source = None if sequence.source == sequence.slot else sequence.source
            sequence.has_begun, kept = True, 0  # what it begins with may not be there
        held += chunk
        self._under_way.append(_UnderWay([_UnderWayRow(sequence, sequence.epoch, start, held, kept)]))
        work = Pass(
            kind=PassKind.PREFILL, rows=(Row(sequence.slot, start, source),), num_tokens=len(chunk), samples=is_last
        )
        return Entry(work=work, token_ids=torch.tensor([chunk]), note=note)

    def _begin(self, sequence: _Sequence) -> None:
        """Its slot is its own from here on."""
        source, start = sequence.source, sequence.sent
        if source is not None and _common(self._held[source], sequence.ids[:start]) < start:
            sequence.source, sequence.sent = None, 0  # another has the source by now
        self._held[sequence.slot] = sequence.ids[: sequence.sent]

    def _decode(self, ready: list[_Sequence]) -> Entry:
        num_decoding = sum(not s.is_prefilling for s in self._active)
        alone = [s for s in ready if s.is_alone]
        together = alone[:1] or ready[: math.ceil(num_decoding / self._passes)]
        rows, under_way = [], _UnderWay()
        for sequence in together:
            rows.append(Row(sequence.slot, sequence.sent))
            held = self._held[sequence.slot]
            under_way.rows.append(_UnderWayRow(sequence, sequence.epoch, sequence.sent, held, sequence.sent))
            if self._shares_answers:
                held.append(sequence.ids[sequence.sent])
            sequence.sent += 1
            sequence.is_under_way = True
            self._active.remove(sequence)
            self._active.append(sequence)  # the others come first next time
        self._under_way.append(under_way)
        self._num_decodes += 1
        work = Pass(kind=PassKind.DECODE, rows=tuple(rows), num_tokens=1, samples=True)
        return Entry(work=work, token_ids=torch.tensor([[s.ids[-1]] for s in together]))

    def _extend(self, sequence: _Sequence, token: Sampled) -> None:
        sequence.is_under_way = False
        answering = sequence.answering
        if not answering.is_finished:
            sequence.ids.append(token.token_id)
            answering.take(token)
            if not answering.is_finished and len(sequence.ids) > self._slot_length:
                answering.finish("length")
        if answering.is_finished:
            self._leave(sequence)

    def _fail(self, sequence: _Sequence, start: int, cause: str, *, shared: bool) -> None:
        """Send a sequence back to where the pass began, alone, or a prompt to its beginning without a shared prefix."""
        if sequence.answering.is_finished:
            self._leave(sequence)
            return
        sequence.epoch += 1
        sequence.is_under_way = False
        if shared:
            sequence.is_alone, sequence.sent = True, start
        elif sequence.source is not None and start < sequence.num_prompt:
            sequence.source, sequence.sent, sequence.has_begun = None, 0, False
        else:
            sequence.answering.finish("error", cause)
            self._leave(sequence)

    def _leave(self, sequence: _Sequence) -> None:
        sequence.epoch += 1
        self._active.remove(sequence)
        self._free.append(sequence.slot)


def _is_over(answering: Answering, now_s: float) -> bool:
    """Whether no more tokens are to come, which it is told if its time is up."""
    if not answering.is_finished and answering.expires_s <= now_s:
        answering.finish("deadline")
    return answering.is_finished


def _common(held: Sequence[int], prompt: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    for place, (a, b) in enumerate(zip(held, prompt, strict=False)):
        if a != b:
            return place
    return min(len(held), len(prompt))
