"""What the scheduler keeps account of: requests under way and in waiting, what slots hold, what passes are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pipeline.drafting.track import Track
from pipeline.models.sampling import Sampled, SamplingOptions
from pipeline.partition.passes import Row

__all__ = [
    "ActiveSequence",
    "Answering",
    "HeldIds",
    "UnderWay",
    "UnderWayRow",
    "WaitingRequest",
    "is_over",
    "shared_length",
    "takes_a_source",
]


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
    def num_wanted(self) -> int:
        """How many tokens may still come, at most."""

    @property
    def scored_from(self) -> int | None:
        """The first position of the prompt, from 1 on, whose token's log-probability is wanted; None for none.

        Then `num_wanted` may be 0 from the beginning: it is finished once its prompt has been told.
        """

    @property
    def is_finished(self) -> bool: ...

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more. May change at any time, on any thread."""

    def begin(self) -> None:
        """It has a slot."""

    def take(self, token: Sampled, *, was_draft: bool) -> None:
        """The next token, and whether it had gone ahead as a draft."""

    def take_prompt(self, tokens: Sequence[Sampled]) -> None:
        """The next tokens of its prompt, in order from `scored_from` on."""

    def count(self, payload_bytes: Sequence[float], *, brings_tokens: bool) -> None:
        """A pass of its own has crossed the links, with so many bytes on each; its tokens, if any, come next."""

    def finish(self, reason: str, error: str | None = None) -> None:
        """No more tokens will come."""


class HeldIds:
    """Token ids, int32 [n], that the caches of all ranks have in a slot; at most `slot_length`."""

    def __init__(self, slot_length: int) -> None:
        self._ids = np.empty(slot_length, np.int32)
        self._length = 0

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: self._length]

    def put(self, start: int, ids: Sequence[int] | np.ndarray) -> None:
        """In place of what there is from position `start` on; nothing where those before are not there."""
        if start <= self._length:
            self._ids[start : start + len(ids)] = ids
            self._length = start + len(ids)

    def crop(self, length: int) -> None:
        self._length = min(self._length, length)


@dataclass(frozen=True)
class Chunk:
    """Positions [start, end) of a prompt that go in one pass, and whether their tokens are told."""

    start: int
    end: int
    echoes: bool


@dataclass(eq=False)
class ActiveSequence:
    """A request in a slot. Positions [0, sent) of `ids` are in the ring or behind it.

    `ids` are those of the prompt and the answer, of which `num_certain`, then drafts that are under way.
    """

    answering: Answering
    slot: int
    prompt: np.ndarray  # token ids, int32
    ids: list[int] = field(init=False)
    num_certain: int = field(init=False)
    sent: int = 0
    source: int | None = None  # the slot that its first positions are taken from
    epoch: int = 0  # passes of earlier ones no longer count
    track: Track | None = None  # where there are drafters
    drafts: list[int] | None = None  # for its next pass, if they have been asked for
    may_draft: bool = True
    to_tell: int | None = None  # the first position of the prompt that is still to be told, None where none is
    is_alone: bool = False
    has_begun: bool = False
    num_lost: int = 0  # positions that were computed before the ring was formed again

    def __post_init__(self) -> None:
        self.ids, self.num_certain = self.prompt.tolist(), len(self.prompt)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    @property
    def is_prefilling(self) -> bool:
        return self.sent < self.num_prompt

    @property
    def is_ready(self) -> bool:
        return not self.is_prefilling and self.sent < self.num_certain

    @property
    def may_go_ahead(self) -> bool:
        """Whether sampled tokens are under way, so that a token is due, and drafts may be behind them."""
        return self.sent >= self.num_certain and self.sent > self.num_prompt and not self.is_alone

    def next_chunk(self, most: int) -> Chunk:
        """Of its prompt, with about `most` tokens: those in front of the ones that are to be told, or some of these.

        A pass tells what follows each of its tokens, so each but the first of those begins with the last token of the
        one before, and has two tokens at least.
        """
        first_echo = self.num_prompt if self.to_tell is None else self.to_tell - 1
        if self.sent < first_echo:
            return Chunk(self.sent, min(self.sent + most, first_echo), echoes=False)
        start = max(first_echo, self.sent - 1)
        return Chunk(start, min(start + max(most, 2), self.num_prompt), echoes=True)

    def row_from(self, start: int) -> Row:
        """Of a pass, from a position on: of its first one, with the slot that the positions before are taken from."""
        is_copied = not self.has_begun and self.source != self.slot
        return Row(self.slot, start, self.source if is_copied else None)

    def prefill_from(self, start: int, *, has_begun: bool) -> None:
        """Go on with the prompt there: passes that have gone no longer count."""
        self.epoch += 1
        self.sent, self.has_begun = start, has_begun

    def settle(self, token_id: int) -> bool:
        """Take the next token for certain; whether it is the draft for its place.

        Where another draft is there, it and what followed it no longer count.
        """
        drafts = self.ids[self.num_certain :]
        is_right = drafts[:1] == [token_id]
        if not is_right:
            self.ids[self.num_certain :] = [token_id]
        self.num_certain += 1
        if drafts and not is_right:
            self.go_back()
        return is_right

    def go_back(self) -> None:
        """Decode again from the newest certain token on: passes that have gone no longer count."""
        self.epoch += 1
        del self.ids[self.num_certain :]
        self.sent = self.num_certain - 1


@dataclass(eq=False)
class WaitingRequest:
    """A request without a slot, or one that has lost it when the ring was formed again: `prompt` then has the tokens of
    its answer, too, and `num_lost` positions of it had been computed.

    `to_tell`: as of `ActiveSequence`.

    `prefix`: of which sequence it wants more than so many positions first, and its epoch.

    While that is on its way, prompts need not be compared.
    """

    answering: Answering
    prompt: np.ndarray
    to_tell: int | None
    num_lost: int | None = None
    prefix: tuple[ActiveSequence, int, int] | None = None

    @property
    def must_wait(self) -> bool:
        if self.prefix is None:
            return False
        sequence, epoch, enough = self.prefix
        return sequence.epoch == epoch and sequence.is_prefilling and sequence.sent <= enough


@dataclass(frozen=True)
class UnderWay:
    """What a pass was made of. `is_ahead`: all of it is behind tokens that were not certain."""

    rows: list[UnderWayRow]
    is_ahead: bool = False
    is_prompt: bool = False


@dataclass(frozen=True)
class UnderWayRow:
    """`held` is what its slot held for the sequence, of which `kept` positions are there if the pass fails."""

    sequence: ActiveSequence
    epoch: int
    start: int
    held: HeldIds
    kept: int


def is_over(answering: Answering, now_s: float) -> bool:
    """Whether no more tokens are to come, which it is told if it was cancelled or its time is up."""
    if not answering.is_finished and (answering.is_cancelled or answering.expires_s <= now_s):
        answering.finish("cancelled" if answering.is_cancelled else "deadline")
    return answering.is_finished


def shared_length(held: np.ndarray, prompt: np.ndarray) -> int:
    """Length of the longest common prefix of token ids."""
    length = min(len(held), len(prompt))
    differs = held[:length] != prompt[:length]
    place = int(differs.argmax()) if length else 0
    return place if length and differs[place] else length


def takes_a_source(rows: Sequence[Row]) -> bool:
    """Whether some row of a pass is to begin as a slot that another one writes to before that place, or copies to."""
    by_slot = {row.slot: row for row in rows}
    sources = [(row, by_slot.get(row.from_slot)) for row in rows if row.from_slot is not None]
    return any(other and (other.start < row.start or other.from_slot is not None) for row, other in sources)
