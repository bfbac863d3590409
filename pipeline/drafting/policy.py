"""How many drafts a pass takes, and whether one more goes while others are under way.

One `Drafting` for a ring, on rank 0, a `Track` for each sequence. The scheduler asks for tokens, and tells of passes
that go and come and of tokens that are certain; seconds are of its clock. docs/drafts.md has the rules and why.

* A pass with k drafts behind the newest token comes to E(k) = 1 + a1 + a1 a2 + ... tokens, a being the chances of its
  drafts (`Acceptance`), and takes step(k). With `rate`, the tokens a second that the sequence makes, the best k has the
  most E(k) - rate x step(k), which is the choice of the highest rate in the long run.
* One more pass behind others is right with a chance q, of all that it takes for granted. It then saves the wait for
  them, and else delays what is right by its own work: it goes where q x wait > (1 - q) x (what is left of that work).
* A drafter that costs time is asked where that has been worth it lately, and every `PROBE_EVERY` tokens to see whether
  it is again. Drafts that are not sent are compared with the tokens that come, too.
"""

from __future__ import annotations

import itertools
import logging
import operator
import statistics
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.drafting.acceptance import Acceptance
from pipeline.drafting.away import Away
from pipeline.drafting.drafter import Draft, Drafter
from pipeline.drafting.figures import DraftFigures
from pipeline.drafting.track import Proposal, Track, UnderWay
from pipeline.planner.pass_costs import PassCosts

__all__ = ["DraftLimits", "Drafting"]

logger = logging.getLogger(__name__)

PROBE_EVERY = 16
_FREE = 0.01  # a drafter that takes less of a step for all its drafts is asked always
_WASTE = 0.125  # of the work that comes to nothing, what is taken for a loss even where nothing waits for it

# Of so many drafts, of which so many are right in the mean.
_Value = Callable[[int, float], float]


@dataclass(frozen=True, kw_only=True)
class DraftLimits:
    """`depth` drafts in a pass and `passes` of a sequence under way; without `adapts`, always so many."""

    depth: int
    passes: int
    adapts: bool = True


@dataclass(frozen=True)
class _Load:
    """`num_sequences` decode at the time, `num_rows` of them in a pass."""

    num_sequences: int
    num_rows: int

    @property
    def num_passes(self) -> int:
        return -(-self.num_sequences // self.num_rows)


@dataclass(eq=False)
class _Asked:
    """What is known of a drafter: the last seconds of a draft, the first of all left out; whether it has raised."""

    drafter: Drafter
    acceptance: Acceptance = field(default_factory=Acceptance)
    times_s: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    has_begun: bool = False
    is_broken: bool = False

    @property
    def draft_s(self) -> float:
        return statistics.median(self.times_s) if self.times_s else 0.0

    def took(self, seconds: float) -> None:
        if self.has_begun:
            self.times_s.append(seconds)
        self.has_begun = True


class Drafting:
    """Rank 0's drafters and what it knows of their worth.

    Args:
        num_links: that share what a lap takes for a token's bytes.
        vocab_size: a draft beyond it is none.

    Attributes:
        figures: what has come of them.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        costs: PassCosts,
        limits: DraftLimits,
        clock: Callable[[], float] = time.monotonic,
        *,
        num_links: int = 1,
        vocab_size: int | None = None,
    ) -> None:
        self.figures = DraftFigures()
        self.costs, self.limits = costs, limits
        self._asked, self._clock = [_Asked(drafter) for drafter in drafters], clock
        self._num_links, self._vocab_size = max(1, num_links), vocab_size
        self._away = Away()
        self._num_under_way = 0

    @property
    def away_s(self) -> float:
        """Of a lap of one token, what is no work of the ranks."""
        return self._away.seconds(1)

    @property
    def draft_s(self) -> dict[str, float]:
        """Seconds of one draft, by drafter."""
        return {asked.drafter.name: asked.draft_s for asked in self._asked}

    def track(self) -> Track:
        """Of a sequence that begins."""
        return Track([asked.acceptance for asked in self._asked], 1 / self._step_s(1, _Load(1, 1)))

    def behind(
        self,
        track: Track,
        slot: int,
        ids: Sequence[int],
        *,
        room: int,
        num_sequences: int,
        num_rows: int = 1,
        meets_prompts: bool = False,
    ) -> list[int]:
        """Drafts for a pass behind the newest of `ids`, of which nothing is under way; at most `room`.

        `num_sequences` are those that decode at the time, `num_rows` of them in a pass, which `meets_prompts` where
        passes other than of sampled tokens are under way.
        """
        track.num_certain, track.num_void = len(ids), len(track.under_way)
        track.sent.clear()
        for compared in track.compared:
            _forget_from(compared, len(ids))  # what was drafted behind drafts that were wrong
        load = _Load(num_sequences, num_rows)
        limit = max(0, min(self.limits.depth, room))
        if self.limits.adapts and self._num_under_way == 0 and not meets_prompts and self._away.needs_plain:
            limit = 0

        def value(num_drafts: int, num_right: float) -> float:
            return 1 + num_right - track.rate * self._step_s(1 + num_drafts, load)

        track.chosen = []
        best_value, has_drafts = value(0, 0.0), False
        for index in self._in_order(load) if limit else ():
            if not self._is_worth_asking(index, track, load):
                has_drafts = True  # as far as anyone knows
                continue
            drafts, num_sent, its_value = self._draft(index, track, slot, ids, limit, value, load)
            has_drafts |= bool(drafts)
            spent = track.rate * len(drafts) * self._asked[index].draft_s
            track.learn_worth(index, max(0.0, its_value - best_value) - spent)
            if num_sent and (its_value > best_value or not self.limits.adapts):
                track.chosen, best_value = drafts[:num_sent], its_value
                if not self.limits.adapts:
                    break
        self._learn_rate(track, load)
        if limit and not track.chosen:
            self.figures.undrafted["cost" if has_drafts else "none"] += 1
        return [proposal.draft.token_id for proposal in track.chosen]

    def ahead(self, track: Track, slot: int, ids: Sequence[int], *, room: int, num_sequences: int) -> list[int]:
        """Tokens of one more pass behind those under way, which `ids` takes for granted; none where it does not pay.

        At most `room`; the first is a draft like the others.
        """
        num_live = len(track.under_way) - track.num_void
        limit = min(self.limits.depth + 1, room)
        if limit < 1 or num_live < 1 or num_live >= self.limits.passes or track.refused == len(ids):
            return []
        load, assumed = _Load(num_sequences, 1), track.assumed_chance

        def value(num_drafts: int, num_right: float) -> float:
            return assumed * num_right - track.rate * load.num_passes * self._busy_s(max(1, num_drafts))

        for index in self._in_order(load):
            mean = track.acceptances[index].mean
            if self.limits.adapts and not self._is_free(index, load):
                if not self._pays_ahead(track, assumed * mean, 1, index, load):
                    continue
            drafts, num_sent, _ = self._draft(index, track, slot, ids, limit, value, load)
            if not num_sent:
                continue
            chance = assumed * drafts[0].chance
            if not self.limits.adapts or self._pays_ahead(track, chance, num_sent, index, load):
                track.chosen = drafts[:num_sent]
                return [proposal.draft.token_id for proposal in track.chosen]
        track.refused = len(ids)
        return []

    def sent(
        self, track: Track, start: int, num_tokens: int, *, num_rows: int = 1, meets_prompts: bool = False
    ) -> None:
        """A pass goes with so many tokens of the sequence from a position on, perhaps fewer than were drafted, and as
        many of each other sequence of its `num_rows`. `meets_prompts` as in `behind`.
        """
        figures = self.figures
        figures.passes += 1
        figures.depths[num_tokens - 1] += 1
        figures.in_flight[len(track.under_way) - track.num_void] += 1
        is_alone = self._num_under_way == 0 and not meets_prompts
        track.under_way.append(UnderWay(num_tokens, self._clock(), num_tokens * num_rows, is_alone))
        self._num_under_way += 1
        track.refused = None
        num_drafts = num_tokens - (start < track.num_certain)
        first = start + num_tokens - num_drafts
        track.sent |= {first + place: proposal for place, proposal in enumerate(track.chosen[:num_drafts])}
        track.chosen = []

    def came(self, track: Track, *, num_tokens: int | None) -> None:
        """The sequence's oldest pass is back, with so many tokens that are certain now; None: it was of no use."""
        under_way = track.under_way.popleft()
        self._num_under_way -= 1
        track.num_void -= track.num_void > 0
        track.refused = None
        if num_tokens is None:
            self.figures.void += 1
            return
        self.figures.tokens += num_tokens
        away_s = self._clock() - under_way.sent_s - self.costs.lap(under_way.in_all)
        self._away.learn(under_way.in_all, away_s, is_alone=under_way.is_alone)

    def certain(self, track: Track, position: int, token_id: int) -> None:
        """What the head has chosen for a position, which judges the drafts for it; those behind a wrong one go."""
        track.num_certain = position + 1
        for acceptance, compared in zip(track.acceptances, track.compared, strict=True):
            if (proposal := compared.pop(position, None)) is not None:
                is_right = proposal.draft.token_id == token_id
                acceptance.learn(proposal.draft.confidence, is_right=is_right)
                if not is_right:
                    compared.clear()
        if (proposal := track.sent.pop(position, None)) is not None:
            is_right = proposal.draft.token_id == token_id
            self.figures.count(self._asked[proposal.drafter].drafter.name, proposal.depth, is_right=is_right)
            if not is_right:
                track.sent.clear()

    def _in_order(self, load: _Load) -> list[int]:
        """Drafters that cost little first; without `adapts`, as the user named them."""
        order = [index for index, asked in enumerate(self._asked) if not asked.is_broken]
        return sorted(order, key=lambda i: not self._is_free(i, load)) if self.limits.adapts else order

    def _is_free(self, index: int, load: _Load) -> bool:
        return self._asked[index].draft_s * self.limits.depth < _FREE * self._step_s(1, load)

    def _busy_s(self, num_tokens: int) -> float:
        """How far passes are apart at least, on the ranks and on the links."""
        return max(self.costs.busy(num_tokens), num_tokens * self._away.per_token_s / self._num_links)

    def _step_s(self, num_tokens: int, load: _Load) -> float:
        """Seconds from a sequence's pass to its next, where others take turns with it, or share its passes."""
        in_all = num_tokens * load.num_rows
        lap_s = self.costs.lap(in_all) + self._away.seconds(in_all)
        return max(lap_s, load.num_passes * self._busy_s(in_all), 1e-9)

    def _is_worth_asking(self, index: int, track: Track, load: _Load) -> bool:
        """Whether it has been lately, or it is time to see."""
        if not self.limits.adapts or self._is_free(index, load) or track.worth[index] > 0:
            return True
        if track.num_certain < track.next_probe[index]:
            return False
        track.next_probe[index] = track.num_certain + PROBE_EVERY
        return True

    def _draft(
        self, index: int, track: Track, slot: int, ids: Sequence[int], limit: int, value: _Value, load: _Load
    ) -> tuple[list[Proposal], int, float]:
        """(what a drafter gives, at most `limit`; how many of these are best sent; their value).

        One that costs time is not asked for more once what may still come is not worth it, nor a new one for a second.
        """
        acceptance, asked, is_free = track.acceptances[index], self._asked[index], self._is_free(index, load)
        drafts: list[Proposal] = []
        values, all_right, num_right = [value(0, 0.0)], 1.0, 0.0
        for draft in self._drafts(asked, slot, ids, limit if asked.times_s or not self.limits.adapts else 1):
            chance = acceptance.chance(draft.confidence)
            all_right *= chance
            num_right += all_right
            drafts.append(Proposal(draft, index, len(ids) + len(drafts) - track.num_certain + 1, chance))
            values.append(value(len(drafts), num_right))
            if not self.limits.adapts or is_free:
                continue
            best, draft_cost = max(values), track.rate * asked.draft_s
            more = _runs(acceptance.mean, all_right, limit - len(drafts))
            if not any(value(len(drafts) + k, num_right + r) - k * draft_cost > best for k, r in more):
                break
        compared = track.compared[index]
        _forget_from(compared, len(ids))
        compared |= {len(ids) + place: proposal for place, proposal in enumerate(drafts)}
        num_sent = max(range(len(values)), key=values.__getitem__) if self.limits.adapts else len(drafts)
        return drafts, num_sent, values[num_sent]

    def _drafts(self, asked: _Asked, slot: int, ids: Sequence[int], limit: int) -> Iterator[Draft]:
        """Up to `limit` drafts, timed. A drafter that raises, or gives what is no token, is asked no more."""
        start_s, num_ids = self._clock(), len(ids)
        try:
            drafts = iter(asked.drafter.draft(slot, ids))
            try:
                for _ in range(limit):
                    draft = next(drafts, None)
                    asked.took(self._clock() - start_s)
                    if len(ids) != num_ids:
                        raise ValueError("it has changed the ids that it was given")
                    if draft is None:
                        return
                    yield _checked(draft, self._vocab_size)
                    start_s = self._clock()
            finally:
                if isinstance(drafts, Generator):
                    drafts.close()  # now, and not when it is collected: it may have something to put back
        except Exception:
            if isinstance(ids, list):
                del ids[num_ids:]
            asked.is_broken = True
            logger.exception("drafter %s raised, and is not asked any more", asked.drafter.name)

    def _pays_ahead(self, track: Track, chance: float, num_tokens: int, index: int, load: _Load) -> bool:
        """Whether what a pass saves where all that it assumes is right outweighs what it costs where it is not."""
        first, last = track.under_way[track.num_void], track.under_way[-1]
        wait_s, next_s = self._due_in_s(last, load), self._due_in_s(first, load)
        work_s = load.num_passes * (self._busy_s(num_tokens) + num_tokens * self._asked[index].draft_s)
        return chance * wait_s > (1 - chance) * (max(0.0, work_s - next_s) + _WASTE * work_s)

    def _due_in_s(self, under_way: UnderWay, load: _Load) -> float:
        return under_way.sent_s + self._step_s(under_way.num_tokens, load) - self._clock()

    def _learn_rate(self, track: Track, load: _Load) -> None:
        """Tokens a second of the pass that is about to go, as its chances are."""
        spent_s = sum(self._asked[proposal.drafter].draft_s for proposal in track.chosen)
        tokens = 1 + sum(itertools.accumulate((proposal.chance for proposal in track.chosen), operator.mul))
        track.learn_rate(tokens, self._step_s(1 + len(track.chosen), load) + spent_s)


def _checked(draft: Draft, vocab_size: int | None) -> Draft:
    """With a confidence from 0 to 1. Raises ValueError for what is no token id."""
    token_id, confidence = draft
    if int(token_id) != token_id or token_id < 0 or (vocab_size is not None and token_id >= vocab_size):
        raise ValueError(f"{token_id!r} is no token id of a vocabulary of {vocab_size}")
    return Draft(int(token_id), min(1.0, max(0.0, confidence)) if confidence == confidence else 0.0)


def _forget_from(proposals: dict[int, Proposal], position: int) -> None:
    for later in [p for p in proposals if p >= position]:
        del proposals[later]


def _runs(chance: float, all_right: float, limit: int) -> Iterator[tuple[int, float]]:
    """(k, how many of k more drafts are right in the mean), where each is with a chance if those before it are."""
    num_right = 0.0
    for k in range(1, limit + 1):
        all_right *= chance
        num_right += all_right
        yield k, num_right
