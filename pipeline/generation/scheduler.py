"""Which rows go around the ring next: requests join and leave between passes.

The source of an engine (`runtime.engine`). It knows slots, positions and token ids; what a token means, and when an
answer ends, is the answer's business.

* A request gets a slot when one is free. If a slot holds a prefix of its prompt already, that is not computed again.
* Prompts go in chunks, of which several are under way at once; passes of sampled tokens and chunks take turns. Chunks
  of equal length share a pass, up to `prefill_chunk` tokens in all.
* Where log-probabilities of a prompt are wanted, its chunks echo from there on (`ActiveSequence.next_chunk`); what is
  before may be shared.
* Sampled tokens of several sequences share a pass: as many as make `passes` of them, so that each pass costs the
  reading of the weights once and as many ranks work as can. A sequence waits for its own token only.
* With drafters, drafts may go behind a sequence's newest token, and further passes of the sequence behind that, which
  take them for right (`drafting.policy` says how many). Where one was wrong, all that went behind it is void.
* What a failed pass has left on the ranks, they undo (`Worker.drop`); a slot that was to begin with a copy then holds
  nothing. A pass of several rows, or with drafts, is tried again row by row, without drafts.
* A request that is cancelled leaves between passes, whether it has a slot or waits for one.

Void passes need not be computed to their end: their sequence goes on at or before where they began, and other sequences
copy, or go on with, what `HeldIds` has: of sampled tokens only those whose passes came back, and were not void.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.drafting.policy import Drafting
from pipeline.generation.sequences import (
    ActiveSequence,
    Answering,
    HeldIds,
    UnderWay,
    UnderWayRow,
    WaitingRequest,
    is_over,
    shared_length,
    takes_a_source,
)
from pipeline.models.sampling import Sampled
from pipeline.models.stage import Scores
from pipeline.partition.passes import Pass, PassKind, Row
from pipeline.runtime.engine import Entry, Failure, Result
from pipeline.runtime.head import begin_note

__all__ = ["Scheduler", "SchedulerConfig"]

MIN_SHARED = 16  # positions of a prefix that are worth a copy
LOOK_S = 0.1  # between looks at requests that wait
MAX_PROMPTS = 16  # that share a pass: what the head must know of those that begin is to fit into a frame's note
MAX_LOOK = 64  # requests of them that may overtake one that waits for its prompt to be computed


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """What a ring has room for, and what its sequences may share.

    Args:
        num_slots, slot_length: of the caches.
        prefill_chunk: tokens of a prompt in one pass.
        passes: of sampled tokens that are under way at once, passes that take drafts for right not among them.
        shares_prefixes: whether what a slot holds may serve another prompt.
        shares_answers: whether sampled tokens in it may; not where they have another codec than prompts.
        shares_passes: whether sequences may share a pass; not where the model lets them change each other's tokens.
    """

    num_slots: int
    slot_length: int
    prefill_chunk: int
    passes: int
    shares_prefixes: bool = True
    shares_answers: bool = True
    shares_passes: bool = True


class Scheduler:
    """Requests in, passes out.

    Attributes:
        drafting: of the ring that there is; None without drafters.
        wake: called when there is something new to do, from whatever thread `submit` is.
        num_prefilled_again: positions that were computed once more because the ring was formed again.
    """

    def __init__(self, config: SchedulerConfig, drafting: Drafting | None = None) -> None:
        self.drafting = drafting
        self.wake: Callable[[], None] = lambda: None
        self._config = config
        self._queue: deque[WaitingRequest] = deque()
        self._lock = threading.Lock()
        self._is_closed = False
        self._free = deque(range(config.num_slots))
        self._held = [HeldIds(config.slot_length) for _ in range(config.num_slots)]
        self._active: list[ActiveSequence] = []
        self._under_way: deque[UnderWay] = deque()
        self._num_decodes = 0  # of passes that begin with certain tokens
        self._prefilled_last = False
        self._next_look_s = 0.0
        self._num_tokens = 0
        self.num_prefilled_again = 0

    def submit(self, answering: Answering) -> None:
        """Answer one more request.

        Raises ValueError for a `scored_from` that is no position of the prompt behind its first, and where without one
        no token is wanted.
        """
        prompt, scored_from = np.array(answering.prompt_ids, np.int32), answering.scored_from
        if scored_from is not None and not 0 < scored_from < len(prompt):
            last = len(prompt) - 1
            raise ValueError(f"scored_from is {scored_from}; in a prompt of {last + 1} tokens, 1 to {last}")
        if scored_from is None and not answering.num_wanted:
            raise ValueError("no token is wanted, and none of the prompt's log-probabilities")
        waiting = WaitingRequest(answering, prompt, scored_from)
        with self._lock:
            self._queue.append(waiting)
        self.wake()

    def close(self) -> None:
        """No more requests will come."""
        self._is_closed = True
        self.wake()

    def begin_again(self, drafting: Drafting | None = None) -> None:
        """The ring was formed again: slots are empty, and nothing that was under way will come.

        Sequences go on where they are, once prompt and answer so far have been computed again. `drafting` is the new
        ring's, whose figures go on, too.
        """
        if drafting is not None and self.drafting is not None:
            drafting.figures = self.drafting.figures
        self.drafting = drafting
        again = [
            WaitingRequest(
                s.answering,
                np.array(s.ids[: s.num_certain], np.int32),
                s.to_tell,
                num_lost=max(min(s.sent, s.num_certain), s.num_lost),
            )
            for s in self._active
            if not s.answering.is_finished
        ]
        with self._lock:
            self._queue.extendleft(reversed(again))
            for waiting in self._queue:
                waiting.prefix = None
        num_slots = len(self._held)
        self._free = deque(range(num_slots))
        self._held = [HeldIds(self._config.slot_length) for _ in range(num_slots)]
        self._active.clear()
        self._under_way.clear()
        self._num_decodes = 0

    @property
    def progress(self) -> int | None:
        """How many tokens have come; None where there is nothing to do until more requests come."""
        return self._num_tokens if self._is_closed or self._queue or self._active else None

    @property
    def num_slots(self) -> int:
        return self._config.num_slots

    @property
    def num_active(self) -> int:
        """Requests that have a slot; from any thread."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Requests without one; from any thread."""
        return len(self._queue)

    @property
    def is_done(self) -> bool:
        return self._is_closed and not self._queue and not self._active

    def next(self) -> Entry | None:
        self._expire()
        self._admit()
        ready = [s for s in self._active if s.is_ready]
        prefilling = [s for s in self._active if s.is_prefilling]
        can_decode = bool(ready) and self._num_decodes < self._config.passes
        if can_decode and (self._prefilled_last or not prefilling):
            self._prefilled_last = False
            return self._decode(ready)
        if prefilling:
            self._prefilled_last = True
            return self._prefill(*prefilling)
        return self._decode_ahead() if not ready else None

    def is_void(self, work: Pass) -> bool:
        """Whether nothing of a DECODE pass counts; a prompt's may serve others, even if its sequence has ended."""
        rows = self._under_way[0].rows
        return work.kind is PassKind.DECODE and all(row.epoch != row.sequence.epoch for row in rows)

    def take(self, work: Pass, result: Result | Failure) -> None:
        under_way = self._under_way.popleft()
        is_decode = work.kind is PassKind.DECODE
        self._num_decodes -= is_decode and not under_way.is_ahead
        tokens = result.value if isinstance(result, Result) else None
        assert not isinstance(tokens, Scores)
        for place, row in enumerate(under_way.rows):
            sequence, num_taken = row.sequence, 0
            counts = row.epoch == sequence.epoch  # else its sequence has ended, or was sent back
            if isinstance(result, Failure):
                row.held.crop(row.kept)
                if counts:
                    self._fail(row, result.cause, work)
            else:
                own = tokens[place] if counts and tokens is not None else []
                if work.echoes:
                    is_last = row.start + work.num_tokens == sequence.num_prompt
                    told, own = own[:-1], own[-1:] if is_last and sequence.answering.num_wanted else []
                if not sequence.answering.is_finished:
                    shares = [nbytes / len(under_way.rows) for nbytes in result.trail]
                    sequence.answering.count(shares, brings_tokens=bool(own))
                if counts and not sequence.answering.is_finished:
                    sequence.is_alone = False
                    if work.echoes:
                        self._tell(row, told)
                    num_taken = self._extend(row, own) if own else 0
            if is_decode and self.drafting is not None and sequence.track is not None:
                self.drafting.came(sequence.track, num_tokens=num_taken or None)

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
            sequence = ActiveSequence(answering, slot, waiting.prompt, sent=shared, to_tell=waiting.to_tell)
            sequence.track = self.drafting.track() if self.drafting is not None else None
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
        if not self._config.shares_prefixes:
            return best, 0
        # Its last token is computed in any case, or nothing would come of it; so is the one before the first to tell.
        prompt = waiting.prompt[: -1 if waiting.to_tell is None else waiting.to_tell - 1]
        for slot, held in enumerate(self._held):
            shared = shared_length(held.ids, prompt)
            if shared > longest or (shared == longest and slot in self._free and best not in self._free):
                best, longest = slot, shared
        for sequence in self._active:
            if sequence.is_prefilling and (coming := shared_length(sequence.prompt, prompt)) >= longest + MIN_SHARED:
                waiting.prefix = (sequence, sequence.epoch, coming - MIN_SHARED)
                return best, None
        return (best, longest) if longest >= MIN_SHARED else (self._free[0], 0)

    def _prefill(self, first: ActiveSequence, *others: ActiveSequence) -> Entry:
        """A chunk of the first prompt, beside it those of others that are as long."""
        self._check_source(first)
        most = self._config.prefill_chunk
        chunk = first.next_chunk(most)
        num_tokens, is_last = chunk.end - chunk.start, chunk.end == first.num_prompt
        together, rows = [first], [first.row_from(chunk.start)]
        at_once = min(MAX_PROMPTS, most // num_tokens) if self._config.shares_passes and not first.is_alone else 1
        for sequence in others:
            if len(together) >= at_once:
                break
            own = sequence.next_chunk(most)
            is_alike = (own.end - own.start, own.echoes) == (num_tokens, chunk.echoes)
            if sequence.is_alone or not is_alike or (own.end == sequence.num_prompt) != is_last:
                continue
            row = sequence.row_from(own.start)
            if self._check_source(sequence) and not takes_a_source([*rows, row]):
                together.append(sequence)
                rows.append(row)
        begins = {s.slot: s.answering.options for s in together if not s.has_begun}
        chunks = [self._send_chunk(s, row.start, num_tokens) for s, row in zip(together, rows, strict=True)]
        self._under_way.append(UnderWay([row for row, _ in chunks], is_prompt=True))
        work = Pass(
            kind=PassKind.PREFILL,
            rows=tuple(rows),
            num_tokens=num_tokens,
            samples=is_last or chunk.echoes,
            echoes=chunk.echoes,
        )
        token_ids = np.stack([ids for _, ids in chunks]).astype(np.int64)
        return Entry(work=work, token_ids=torch.from_numpy(token_ids), note=begin_note(begins))

    def _send_chunk(self, sequence: ActiveSequence, start: int, num_tokens: int) -> tuple[UnderWayRow, np.ndarray]:
        """Positions from `start` on of a prompt are under way; their ids. With its first ones, its slot is its own."""
        kept = start
        if not sequence.has_begun:
            self._held[sequence.slot] = HeldIds(self._config.slot_length)
            self._held[sequence.slot].put(0, sequence.prompt[:start])
            sequence.has_begun, kept = True, 0  # what it begins with may not be there
        held, ids = self._held[sequence.slot], sequence.prompt[start : start + num_tokens]
        held.put(start, ids)
        before, sequence.sent = sequence.sent, start + num_tokens
        self.num_prefilled_again += max(0, min(sequence.sent, sequence.num_lost) - before)
        return UnderWayRow(sequence, sequence.epoch, start, held, kept), ids

    def _check_source(self, sequence: ActiveSequence) -> bool:
        """Whether the slot that its first positions are taken from still has them; else it begins at its beginning."""
        source, start = sequence.source, sequence.sent
        if sequence.has_begun or source is None:
            return True
        if shared_length(self._held[source].ids, sequence.prompt[:start]) == start:
            return True
        sequence.source, sequence.sent = None, 0
        return False

    @property
    def _num_decoding(self) -> int:
        return sum(not s.is_prefilling for s in self._active)

    @property
    def _meets_prompts(self) -> bool:
        return any(under_way.is_prompt for under_way in self._under_way)

    @property
    def _rows_at_once(self) -> int:
        """Of sequences that share a pass."""
        return math.ceil(self._num_decoding / self._config.passes) if self._config.shares_passes else 1

    def _decode(self, ready: list[ActiveSequence]) -> Entry:
        """Rows of one pass have equally many drafts: of those that would have fewer, the next begins a pass."""
        alone = [s for s in ready if s.is_alone]
        first, *others = alone[:1] or ready
        at_once = self._rows_at_once
        num_drafts, together = len(self._drafts(first)), [first]
        for sequence in others:
            if len(together) == at_once:
                break
            if len(self._drafts(sequence)) >= num_drafts:
                together.append(sequence)
        for sequence in together:
            sequence.ids += self._drafts(sequence)[:num_drafts]
            sequence.drafts = None
        self._num_decodes += 1
        return self._send(together)

    def _drafts(self, sequence: ActiveSequence) -> list[int]:
        """Behind its newest token, which is certain."""
        if sequence.drafts is None:
            sequence.drafts = []
            if self.drafting is not None and sequence.track is not None:
                sequence.drafts = self.drafting.behind(
                    sequence.track,
                    sequence.slot,
                    sequence.ids,
                    room=self._room(sequence),
                    num_sequences=self._num_decoding,
                    num_rows=self._rows_at_once,
                    meets_prompts=self._meets_prompts,
                )
        return sequence.drafts

    def _decode_ahead(self) -> Entry | None:
        """One more pass of a sequence that has some under way, as if all drafts in them were right."""
        num_decoding = self._num_decoding
        for sequence in self._active:
            if self.drafting is None or sequence.track is None or not sequence.may_go_ahead:
                continue
            drafts = self.drafting.ahead(
                sequence.track,
                sequence.slot,
                sequence.ids,
                room=self._room(sequence),
                num_sequences=num_decoding,
            )
            if drafts:
                sequence.ids += drafts
                return self._send([sequence], is_ahead=True)
        return None

    def _room(self, sequence: ActiveSequence) -> int:
        """Drafts that fit behind its ids, and are not behind the last token that is wanted."""
        if sequence.is_alone or not sequence.may_draft:
            return 0
        num_assumed = len(sequence.ids) - sequence.num_certain
        return min(self._config.slot_length - len(sequence.ids), sequence.answering.num_wanted - num_assumed - 1)

    def _send(self, together: list[ActiveSequence], *, is_ahead: bool = False) -> Entry:
        """A pass of all that the sequences have and have not sent, equally many tokens of each."""
        rows, ids = [], []
        for sequence in together:
            start = sequence.sent
            rows.append(UnderWayRow(sequence, sequence.epoch, start, self._held[sequence.slot], start))
            ids.append(sequence.ids[start:])
            sequence.sent = len(sequence.ids)
            if self.drafting is not None and sequence.track is not None:
                self.drafting.sent(
                    sequence.track, start, len(ids[-1]), num_rows=len(together), meets_prompts=self._meets_prompts
                )
            self._active.remove(sequence)
            self._active.append(sequence)  # the others come first next time
        self._under_way.append(UnderWay(rows, is_ahead))
        work = Pass(
            kind=PassKind.DECODE,
            rows=tuple(Row(row.sequence.slot, row.start) for row in rows),
            num_tokens=len(ids[0]),
            samples=True,
        )
        return Entry(work=work, token_ids=torch.tensor(ids))

    def _extend(self, row: UnderWayRow, tokens: Sequence[Sampled]) -> int:
        """Take what the head has chosen, until the answer ends or a draft was another; returns how many tokens."""
        sequence, answering, num_taken = row.sequence, row.sequence.answering, 0
        for token in tokens:
            if answering.is_finished or row.epoch != sequence.epoch:
                break
            was_draft = sequence.settle(token.token_id)
            if self.drafting is not None and sequence.track is not None:
                self.drafting.certain(sequence.track, sequence.num_certain - 1, token.token_id)
            num_taken += 1
            self._num_tokens += 1
            answering.take(token, was_draft=was_draft)
            if not answering.is_finished and sequence.num_certain > self._config.slot_length:
                answering.finish("length")
        if row.start >= sequence.num_prompt and self._config.shares_answers:
            row.held.put(row.start, sequence.ids[row.start : row.start + num_taken])
        if answering.is_finished:
            self._leave(sequence)
        return num_taken

    def _tell(self, row: UnderWayRow, tokens: Sequence[Sampled]) -> None:
        """Of the prompt; where no answer is wanted, it is finished behind the last."""
        sequence, answering = row.sequence, row.sequence.answering
        assert sequence.to_tell == row.start + 1, "passes come in their order"
        sequence.to_tell += len(tokens)
        if sequence.to_tell == sequence.num_prompt:
            sequence.to_tell = None
        self._num_tokens += len(tokens)
        answering.take_prompt(tokens)
        if sequence.to_tell is None and not answering.num_wanted:
            answering.finish("length")
            self._leave(sequence)

    def _fail(self, row: UnderWayRow, cause: str, work: Pass) -> None:
        """Send a sequence back to where the pass began, alone, or a prompt to its beginning without a shared prefix.

        Where it had drafts, it has none from here on: what cannot take several tokens would fail again and again.
        """
        sequence, is_decode = row.sequence, work.kind is PassKind.DECODE
        if sequence.answering.is_finished:
            self._leave(sequence)
        elif len(work.rows) > 1 or (is_decode and work.num_tokens > 1):
            sequence.is_alone = True
            if is_decode:
                sequence.may_draft &= work.num_tokens == 1
                sequence.go_back()
            else:
                sequence.prefill_from(row.start, has_begun=row.kept > 0)
        elif sequence.source is not None and row.start < sequence.num_prompt:
            sequence.source = None
            sequence.prefill_from(0, has_begun=False)
        else:
            sequence.answering.finish("error", cause)
            self._leave(sequence)

    def _leave(self, sequence: ActiveSequence) -> None:
        sequence.epoch += 1
        self._active.remove(sequence)
        self._free.append(sequence.slot)
