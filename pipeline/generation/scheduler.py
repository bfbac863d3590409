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
from collections.abc import Callable

import numpy as np
import torch

from pipeline.generation.sequences import (
    ActiveSequence,
    Answering,
    HeldIds,
    UnderWay,
    UnderWayRow,
    WaitingRequest,
    is_over,
    shared_length,
)
from pipeline.models.sampling import Sampled
from pipeline.models.stage import Scores
from pipeline.partition.passes import Pass, PassKind, Row
from pipeline.runtime.engine import Entry, Failure, Result
from pipeline.runtime.head import begin_note

__all__ = ["Scheduler"]

MIN_SHARED = 16  # positions of a prefix that are worth a copy
LOOK_S = 0.1  # between looks at requests that wait
MAX_LOOK = 64  # requests of them that may overtake one that waits for its prompt to be computed


class Scheduler:
    """Requests in, passes out.

    Args:
        num_slots, slot_length: of the caches.
        prefill_chunk: tokens of a prompt in one pass.
        passes: of sampled tokens that are under way at once.
        shares_prefixes: whether what a slot holds may serve another prompt.
        shares_answers: whether sampled tokens in it may; not where they have another codec than prompts.
        shares_passes: whether sequences may decode together; not where the model lets them change each other's tokens.
        wake: called when there is something new to do, from whatever thread `submit` is.

    Attributes:
        num_prefilled_again: positions that were computed once more because the ring was formed again.
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
        shares_passes: bool = True,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.wake = wake
        self._slot_length, self._chunk, self._passes = slot_length, prefill_chunk, passes
        self._shares_prefixes, self._shares_answers = shares_prefixes, shares_answers
        self._shares_passes = shares_passes
        self._queue: deque[WaitingRequest] = deque()
        self._lock = threading.Lock()
        self._is_closed = False
        self._free = deque(range(num_slots))
        self._held = [HeldIds(slot_length) for _ in range(num_slots)]
        self._active: list[ActiveSequence] = []
        self._under_way: deque[UnderWay] = deque()
        self._num_decodes = 0
        self._prefilled_last = False
        self._next_look_s = 0.0
        self._num_tokens = 0
        self.num_prefilled_again = 0

    def submit(self, answering: Answering) -> None:
        """Answer one more request."""
        waiting = WaitingRequest(answering, np.array(answering.prompt_ids, np.int32))
        with self._lock:
            self._queue.append(waiting)
        self.wake()

    def close(self) -> None:
        """No more requests will come."""
        self._is_closed = True
        self.wake()

    def begin_again(self) -> None:
        """The ring was formed again: slots are empty, and nothing that was under way will come.

        Sequences go on where they are, once prompt and answer so far have been computed again.
        """
        again = [
            WaitingRequest(s.answering, np.array(s.ids, np.int32), num_lost=max(s.sent, s.num_lost))
            for s in self._active
            if not s.answering.is_finished
        ]
        with self._lock:
            self._queue.extendleft(reversed(again))
            for waiting in self._queue:
                waiting.prefix = None
        num_slots = len(self._held)
        self._free = deque(range(num_slots))
        self._held = [HeldIds(self._slot_length) for _ in range(num_slots)]
        self._active.clear()
        self._under_way.clear()
        self._num_decodes = 0

    @property
    def progress(self) -> int | None:
        """How many tokens have come; None where there is nothing to do until more requests come."""
        return self._num_tokens if self._is_closed or self._queue or self._active else None

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
                row.held.crop(row.kept)
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
        for sequence in [s for s in self._active if is_over(s.answering, now_s)]:
            self._leave(sequence)
        if now_s < self._next_look_s:
            return
        self._next_look_s = now_s + LOOK_S
        with self._lock:
            everyone = list(self._queue)
        for waiting in everyone:
            if is_over(waiting.answering, now_s):
                self._unqueue(waiting)

    def _admit(self) -> None:
        """Give free slots to requests, in their order; one that shares a prompt under way waits for it."""
        with self._lock:
            first = list(itertools.islice(self._queue, MAX_LOOK))
        now_s = time.monotonic()
        for waiting in first:
            if not self._free:
                return
            answering = waiting.answering
            if is_over(answering, now_s):
                self._unqueue(waiting)
                continue
            if waiting.must_wait:
                continue
            source, shared = self._shared_prefix(waiting)
            if shared is None:
                continue
            self._unqueue(waiting)
            if source in self._free:
                slot = source
                self._free.remove(slot)
            else:
                slot = self._free.popleft()
            is_new = waiting.num_lost is None
            sequence = ActiveSequence(answering, slot, waiting.prompt, waiting.prompt.tolist(), sent=shared)
            sequence.num_lost = waiting.num_lost or 0
            sequence.source = source if shared else None
            self._active.append(sequence)
            if is_new:
                answering.begin()

    def _unqueue(self, waiting: WaitingRequest) -> None:
        with self._lock:
            self._queue.remove(waiting)

    def _shared_prefix(self, waiting: WaitingRequest) -> tuple[int, int | None]:
        """(slot, how many positions it holds of a prompt); None for the latter when more of them are on their way."""
        best, longest = self._free[0], 0
        if not self._shares_prefixes:
            return best, 0
        prompt = waiting.prompt[:-1]  # its last token is computed in any case, or nothing would come of it
        for slot, held in enumerate(self._held):
            shared = shared_length(held.ids, prompt)
            if shared > longest or (shared == longest and slot in self._free and best not in self._free):
                best, longest = slot, shared
        for sequence in self._active:
            if sequence.is_prefilling and (coming := shared_length(sequence.prompt, prompt)) >= longest + MIN_SHARED:
                waiting.prefix = (sequence, sequence.epoch, coming - MIN_SHARED)
                return best, None
        return (best, longest) if longest >= MIN_SHARED else (self._free[0], 0)

    def _prefill(self, sequence: ActiveSequence) -> Entry:
        if not sequence.has_begun:
            self._begin(sequence)
        start = sequence.sent
        chunk = sequence.prompt[start : start + self._chunk]
        sequence.sent += len(chunk)
        self.num_prefilled_again += max(0, min(sequence.sent, sequence.num_lost) - start)
        is_last = not sequence.is_prefilling
        sequence.is_under_way = is_last
        note, source, held, kept = b"", None, self._held[sequence.slot], start
        if not sequence.has_begun:
            note = begin_note({sequence.slot: sequence.answering.options})
            source = None if sequence.source == sequence.slot else sequence.source
            sequence.has_begun, kept = True, 0  # what it begins with may not be there
        held.append(chunk)
        self._under_way.append(UnderWay([UnderWayRow(sequence, sequence.epoch, start, held, kept)]))
        work = Pass(
            kind=PassKind.PREFILL, rows=(Row(sequence.slot, start, source),), num_tokens=len(chunk), samples=is_last
        )
        return Entry(work=work, token_ids=torch.from_numpy(chunk.astype(np.int64))[None], note=note)

    def _begin(self, sequence: ActiveSequence) -> None:
        """Its slot is its own from here on."""
        source, start = sequence.source, sequence.sent
        if source is not None and shared_length(self._held[source].ids, sequence.prompt[:start]) < start:
            sequence.source, sequence.sent = None, 0  # another has the source by now
        self._held[sequence.slot] = HeldIds(self._slot_length)
        self._held[sequence.slot].append(sequence.prompt[: sequence.sent])

    def _decode(self, ready: list[ActiveSequence]) -> Entry:
        num_decoding = sum(not s.is_prefilling for s in self._active)
        alone = [s for s in ready if s.is_alone]
        at_once = math.ceil(num_decoding / self._passes) if self._shares_passes else 1
        together = alone[:1] or ready[:at_once]
        rows, under_way = [], UnderWay()
        for sequence in together:
            rows.append(Row(sequence.slot, sequence.sent))
            held = self._held[sequence.slot]
            under_way.rows.append(UnderWayRow(sequence, sequence.epoch, sequence.sent, held, sequence.sent))
            if self._shares_answers:
                held.append(np.array([sequence.ids[sequence.sent]], np.int32))
            sequence.sent += 1
            sequence.is_under_way = True
            self._active.remove(sequence)
            self._active.append(sequence)  # the others come first next time
        self._under_way.append(under_way)
        self._num_decodes += 1
        work = Pass(kind=PassKind.DECODE, rows=tuple(rows), num_tokens=1, samples=True)
        return Entry(work=work, token_ids=torch.tensor([[s.ids[-1]] for s in together]))

    def _extend(self, sequence: ActiveSequence, token: Sampled) -> None:
        sequence.is_under_way = False
        answering = sequence.answering
        if not answering.is_finished:
            sequence.ids.append(token.token_id)
            self._num_tokens += 1
            answering.take(token)
            if not answering.is_finished and len(sequence.ids) > self._slot_length:
                answering.finish("length")
        if answering.is_finished:
            self._leave(sequence)

    def _fail(self, sequence: ActiveSequence, start: int, cause: str, *, shared: bool) -> None:
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

    def _leave(self, sequence: ActiveSequence) -> None:
        sequence.epoch += 1
        self._active.remove(sequence)
        self._free.append(sequence.slot)
