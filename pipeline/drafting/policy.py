"""How many drafts a pass takes, and whether one more goes while others are under way.

One `Drafting` for a ring, on rank 0, a `Track` for each sequence. The scheduler asks for tokens, and tells of passes
that go and come and of tokens that are certain; seconds are of its clock. docs/drafts.md has the rules and why.

* A pass with k drafts behind the newest token comes to E(k) = 1 + a1 + a1 a2 + ... tokens, a being the chances of its
  drafts (`Acceptance`), and takes step(k). With `rate`, the tokens a second that the sequence makes, the best k has the
  most E(k) - rate x step(k), which is the choice of the highest rate in the long run.
* One more pass behind others is right with a chance q, of all that it takes for granted. It then saves the wait for
  them, and else delays what is right by what is left of its own work once the first of them is back: it goes where
  q x wait > (1 - q) x delay, in which a part of the work counts in any case.
* Where drafts do not pay, they go on being compared with the tokens that come: all those that cost nothing, others
  every `PROBE_EVERY` tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.drafting.acceptance import Acceptance
from pipeline.planner.pass_costs import PassCosts
from pipeline.drafting.drafter import Draft, Drafter

__all__ = ["DepthCounts", "DraftFigures", "DraftLimits", "Drafting", "Track"]

PROBE_EVERY = 16
_LAPS = 32  # last laps that the way between ranks is told from
_FADE = 0.8  # of a rate's and a drafter's seconds, at each new one
_FREE = 0.01  # a drafter that takes less of a step for a draft is asked always
_WASTE = 0.125  # of the work that comes to nothing, what is taken for a loss even where nothing waits for it

# Of so many drafts, of which so many are right in the mean, each of which takes so many seconds to make.
_Value = Callable[[int, float, float], float]


@dataclass(frozen=True, kw_only=True)
class DraftLimits:
    """`depth` drafts in a pass and `passes` of a sequence under way; without `adapts`, always so many."""

    depth: int
    passes: int
    adapts: bool = True


@dataclass
class DepthCounts:
    """Of drafts that went around the ring, those that were judged (all before them were right) and those right."""

    judged: int = 0
    right: int = 0


@dataclass
class DraftFigures:
    """What came of a ring's drafts. `counts[drafter][depth]`: depth 1 is the token behind the newest certain one.

    `passes`: rows of sampled tokens that went, `void` those that came back of no use, `tokens` what the others brought.
    `depths` and `in_flight`: rows by their drafts, and by how many passes of the sequence were under way before.
    `undrafted`: rows without drafts by why: no drafter had one (`none`), or it would not pay (`cost`).
    """

    passes: int = 0
    void: int = 0
    tokens: int = 0
    counts: dict[str, dict[int, DepthCounts]] = field(default_factory=dict)
    depths: Counter[int] = field(default_factory=Counter)
    in_flight: Counter[int] = field(default_factory=Counter)
    undrafted: Counter[str] = field(default_factory=Counter)

    def count(self, drafter: str, depth: int, *, is_right: bool) -> None:
        counts = self.counts.setdefault(drafter, {}).setdefault(depth, DepthCounts())
        counts.judged += 1
        counts.right += is_right


@dataclass(frozen=True)
class _Proposal:
    """A draft for a position. `is_sent`: it goes around the ring, and is not only compared."""

    draft: Draft
    drafter: int
    depth: int
    chance: float
    is_sent: bool = False


@dataclass(eq=False)
class _UnderWay:
    num_tokens: int
    sent_s: float


class Track:
    """A sequence: how its drafts have done, and those that wait to be judged, by position."""

    def __init__(self, acceptances: Sequence[Acceptance], rate: float) -> None:
        self.acceptances = [Acceptance(prior) for prior in acceptances]
        self._tokens, self._seconds = rate, 1.0  # of passes that have begun, faded
        self.proposals: dict[int, _Proposal] = {}
        self.under_way: deque[_UnderWay] = deque()
        self.num_void = 0  # of those under way, the oldest
        self.num_certain = 0
        self.next_probe = [0] * len(acceptances)
        self.refused: int | None = None  # at this length no further pass pays, while nothing comes

    @property
    def rate(self) -> float:
        """Tokens a second, as the chances of its last passes were."""
        return self._tokens / self._seconds

    def learn_rate(self, tokens: float, seconds: float) -> None:
        self._tokens, self._seconds = _FADE * self._tokens + tokens, _FADE * self._seconds + seconds

    @property
    def assumed_chance(self) -> float:
        """That all drafts are right that have gone and are not judged."""
        return math.prod(proposal.chance for proposal in self.proposals.values() if proposal.is_sent)


class Drafting:
    """Rank 0's drafters and what it knows of their worth.

    Attributes:
        figures: what has come of them.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        costs: PassCosts,
        limits: DraftLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.figures = DraftFigures()
        self.costs, self.limits = costs, limits
        self._drafters, self._clock = drafters, clock
        self._acceptances = [Acceptance() for _ in drafters]
        self._draft_s: list[float | None] = [None] * len(drafters)  # of one draft
        self._away_s: deque[float] = deque(maxlen=_LAPS)

    @property
    def away_s(self) -> float:
        """Of a lap, what is no work of the ranks: the links, as the fastest of the last laps tell."""
        return min(self._away_s, default=0.0)

    @property
    def draft_s(self) -> dict[str, float]:
        """Seconds of one draft, by drafter."""
        return {drafter.name: seconds or 0.0 for drafter, seconds in zip(self._drafters, self._draft_s, strict=True)}

    def track(self) -> Track:
        """Of a sequence that begins."""
        return Track(self._acceptances, 1 / self._step_s(1, 0.0, 1))

    def behind(self, track: Track, slot: int, ids: Sequence[int], *, room: int, num_sequences: int) -> list[int]:
        """Drafts for a pass behind the newest of `ids`, of which nothing is under way; at most `room`.

        `num_sequences` are those that decode at the time.
        """
        track.num_certain = len(ids)
        track.num_void = len(track.under_way)
        track.proposals.clear()
        limit = min(self.limits.depth, room)

        def value(num_drafts: int, num_right: float, draft_s: float) -> float:
            return 1 + num_right - track.rate * self._step_s(1 + num_drafts, num_drafts * draft_s, num_sequences)

        best: list[_Proposal] = []
        compared: list[_Proposal] = []
        best_value = value(0, 0.0, 0.0)
        for index in self._in_order():
            if limit < 1 or not self._is_worth_asking(index, track, limit, value, best_value):
                continue
            drafts, chosen_value = self._draft(index, track, slot, ids, limit, value)
            chosen = [proposal for proposal in drafts if proposal.is_sent]
            if chosen and (chosen_value > best_value or not self.limits.adapts):
                best, best_value, compared = chosen, chosen_value, drafts
            elif drafts and not best:
                compared = drafts
            if best and not self.limits.adapts:
                break
        track.proposals |= {len(ids) + place: proposal for place, proposal in enumerate(compared)}
        self._learn_rate(track, best, num_sequences)
        if not best:
            self.figures.undrafted["cost" if compared else "none"] += 1
        return [proposal.draft.token_id for proposal in best]

    def ahead(self, track: Track, slot: int, ids: Sequence[int], *, room: int, num_sequences: int) -> list[int]:
        """Tokens of one more pass behind those under way, which `ids` takes for granted; none where it does not pay.

        At most `room`; the first is a draft like the others.
        """
        limit, assumed = min(self.limits.depth + 1, room), track.assumed_chance
        num_live = len(track.under_way) - track.num_void
        if limit < 1 or not 0 < num_live < self.limits.passes or track.refused == len(ids):
            return []

        def value(num_drafts: int, num_right: float, draft_s: float) -> float:
            work_s = num_sequences * (self.costs.busy(max(1, num_drafts)) + num_drafts * draft_s)
            return assumed * num_right - track.rate * work_s

        for index in self._in_order():
            mean = self._acceptances[index].mean
            if self.limits.adapts and not self._pays_ahead(track, assumed * mean, 1, index, num_sequences):
                if not self._is_free(index):
                    continue
            drafts, _ = self._draft(index, track, slot, ids, limit, value)
            chosen = [proposal for proposal in drafts if proposal.is_sent]
            if not chosen:
                continue
            chance = assumed * chosen[0].chance
            if not self.limits.adapts or self._pays_ahead(track, chance, len(chosen), index, num_sequences):
                track.proposals |= {len(ids) + place: proposal for place, proposal in enumerate(chosen)}
                return [proposal.draft.token_id for proposal in chosen]
        track.refused = len(ids)
        return []

    def sent(self, track: Track, start: int, num_tokens: int) -> None:
        """A pass of the sequence goes, with so many tokens, perhaps fewer than were drafted."""
        figures = self.figures
        figures.passes += 1
        figures.depths[num_tokens - 1] += 1
        figures.in_flight[len(track.under_way)] += 1
        track.under_way.append(_UnderWay(num_tokens, self._clock()))
        track.refused = None
        for position in [p for p in track.proposals if p >= start + num_tokens]:
            track.proposals[position] = dataclasses.replace(track.proposals[position], is_sent=False)

    def came(self, track: Track, *, num_tokens: int | None) -> None:
        """The sequence's oldest pass is back, with so many tokens that are certain now; None: it was of no use."""
        under_way = track.under_way.popleft()
        track.num_void -= track.num_void > 0
        track.refused = None
        if num_tokens is None:
            self.figures.void += 1
            return
        self.figures.tokens += num_tokens
        self._away_s.append(max(0.0, self._clock() - under_way.sent_s - self.costs.lap(under_way.num_tokens)))

    def certain(self, track: Track, position: int, token_id: int) -> None:
        """What the head has chosen for a position, which judges the draft for it; those behind a wrong one are gone."""
        track.num_certain = position + 1
        proposal = track.proposals.pop(position, None)
        if proposal is None:
            return
        is_right = proposal.draft.token_id == token_id
        track.acceptances[proposal.drafter].learn(proposal.draft.confidence, is_right=is_right)
        if proposal.is_sent:
            self.figures.count(self._drafters[proposal.drafter].name, proposal.depth, is_right=is_right)
        if not is_right:
            track.proposals.clear()

    def _in_order(self) -> list[int]:
        """Drafters that cost little first; without `adapts`, as the user named them."""
        order = range(len(self._drafters))
        return sorted(order, key=lambda i: not self._is_free(i)) if self.limits.adapts else list(order)

    def _is_free(self, index: int) -> bool:
        return (self._draft_s[index] or 0.0) < _FREE * self._step_s(1, 0.0, 1)

    def _step_s(self, num_tokens: int, draft_s: float, num_sequences: int) -> float:
        """Seconds from a sequence's pass to its next, where `num_sequences` take turns."""
        lap_s = self.costs.lap(num_tokens) + self.away_s + draft_s
        return max(lap_s, num_sequences * (self.costs.busy(num_tokens) + draft_s), 1e-9)

    def _is_worth_asking(self, index: int, track: Track, limit: int, value: _Value, best_value: float) -> bool:
        """Whether drafts as good as this drafter's on average would pay, or it is time to compare some again.

        A new drafter is asked.
        """
        if not self.limits.adapts or self._is_free(index):
            return True
        mean, draft_s = track.acceptances[index].mean, self._draft_s[index] or 0.0
        if any(value(k, right, draft_s) > best_value for k, right in _runs(mean, 1.0, limit)):
            return True
        if track.num_certain < track.next_probe[index]:
            return False
        track.next_probe[index] = track.num_certain + PROBE_EVERY
        return True

    def _draft(
        self, index: int, track: Track, slot: int, ids: Sequence[int], limit: int, value: _Value
    ) -> tuple[list[_Proposal], float]:
        """What a drafter gives, at most `limit`, of which the best number is marked to be sent; and its value.

        One that costs time is not asked for more once what may still come is not worth it.
        """
        acceptance, is_free = track.acceptances[index], self._is_free(index)
        drafts: list[_Proposal] = []
        values, all_right, num_right = [value(0, 0.0, 0.0)], 1.0, 0.0
        for draft in self._timed(index, self._drafters[index].draft(slot, ids), limit):
            chance = acceptance.chance(draft.confidence)
            all_right *= chance
            num_right += all_right
            depth = len(ids) + len(drafts) - track.num_certain + 1
            drafts.append(_Proposal(draft, index, depth, chance))
            draft_s, num_drafts = self._draft_s[index] or 0.0, len(drafts)
            values.append(value(num_drafts, num_right, draft_s))
            if not self.limits.adapts or is_free:
                continue
            more = _runs(acceptance.mean, all_right, limit - num_drafts)
            if max((value(num_drafts + k, num_right + r, draft_s) for k, r in more), default=-math.inf) <= max(values):
                break
        num_sent = max(range(len(values)), key=values.__getitem__) if self.limits.adapts else len(drafts)
        sent = [dataclasses.replace(proposal, is_sent=True) for proposal in drafts[:num_sent]]
        return [*sent, *drafts[num_sent:]], values[num_sent]

    def _timed(self, index: int, drafts: Iterator[Draft], limit: int) -> Iterator[Draft]:
        for _ in range(limit):
            start_s = self._clock()
            draft = next(drafts, None)
            if draft is None:
                return
            seconds, known = self._clock() - start_s, self._draft_s[index]
            self._draft_s[index] = seconds if known is None else _FADE * known + (1 - _FADE) * seconds
            yield draft

    def _pays_ahead(self, track: Track, chance: float, num_tokens: int, index: int, num_sequences: int) -> bool:
        """Whether what a pass saves where all that it assumes is right outweighs what it costs where it is not."""
        first, last = track.under_way[track.num_void], track.under_way[-1]
        wait_s, next_s = self._due_in_s(last, num_sequences), self._due_in_s(first, num_sequences)
        work_s = num_sequences * (self.costs.busy(num_tokens) + num_tokens * (self._draft_s[index] or 0.0))
        return chance * wait_s > (1 - chance) * (max(0.0, work_s - next_s) + _WASTE * work_s)

    def _due_in_s(self, under_way: _UnderWay, num_sequences: int) -> float:
        return under_way.sent_s + self._step_s(under_way.num_tokens, 0.0, num_sequences) - self._clock()

    def _learn_rate(self, track: Track, sent: Sequence[_Proposal], num_sequences: int) -> None:
        """Tokens a second of the pass that is about to go, as its chances are."""
        spent_s = sum(self._draft_s[proposal.drafter] or 0.0 for proposal in sent)
        tokens = 1 + sum(itertools.accumulate((proposal.chance for proposal in sent), operator.mul))
        track.learn_rate(tokens, self._step_s(1 + len(sent), spent_s, num_sequences))


def _runs(chance: float, all_right: float, limit: int) -> Iterator[tuple[int, float]]:
    """(k, how many of k more drafts are right in the mean), where each is with a chance if those before it are."""
    num_right = 0.0
    for k in range(1, limit + 1):
        all_right *= chance
        num_right += all_right
        yield k, num_right
