"""A ring that is not there: one sequence, drafters of known acceptance, and a clock that passes and drafts move on.

A pass starts at the earliest when the one before it has been going for its `busy` time, and is back after its `lap` and
`away_s`. Void passes take as long as others.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from pipeline.drafting.drafter import Draft
from pipeline.drafting.policy import Drafting, DraftLimits
from pipeline.planner.pass_costs import PassCosts

__all__ = ["Clock", "Guesser", "World", "flat_costs", "stepped_costs"]

SLOWEST = 0.28  # of a lap's work, the share of the slowest of four ranks

WRONG = 1_000_000


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


@dataclass
class Guesser:
    """Right with a chance that may change with the position; its drafts take `draft_s` each.

    Where ids behind the first `sure` are not the truth, it is lost.
    """

    clock: Clock
    truth: list
    is_right: list  # by position
    draft_s: float = 0.0
    confidence: float = 0.5
    name: str = "guesser"
    sure: int = 0
    num_asked: int = 0

    def draft(self, slot, ids):
        is_lost = ids[self.sure :] != self.truth[self.sure : len(ids)]
        for position in range(len(ids), len(self.truth)):
            self.clock.now_s += self.draft_s
            self.num_asked += 1
            is_lost = is_lost or not self.is_right[position]
            yield Draft(WRONG if is_lost else self.truth[position], self.confidence)


@dataclass
class World:
    costs: PassCosts
    away_s: float
    chance_at: object
    num_tokens: int = 1500
    draft_s: float = 0.0
    seed: int = 0
    per_token_s: float = 0.0  # of a lap's links
    clock: Clock = field(default_factory=Clock)

    def rate(self, limits: DraftLimits | None) -> float:
        """Tokens a second; without limits, of one token after the other."""
        return self.run(limits)[0]

    def run(self, limits: DraftLimits | None) -> tuple[float, Drafting, Guesser]:
        clock = self.clock = Clock()
        draw = random.Random(self.seed)
        truth = [draw.randrange(1000) for _ in range(self.num_tokens + 200)]
        is_right = [draw.random() < self.chance_at(position) for position in range(len(truth))]
        guesser = Guesser(clock, truth, is_right, self.draft_s)
        drafters = [] if limits is None else [guesser]
        drafting = Drafting(drafters, self.costs, limits or DraftLimits(depth=1, passes=1), clock)
        _Ring(self, drafting, guesser).run()
        return self.num_tokens / clock.now_s, drafting, guesser


class _Ring:
    """The scheduler's part for one sequence."""

    def __init__(self, world, drafting, guesser):
        self.world, self.drafting, self.guesser, self.truth = world, drafting, guesser, guesser.truth
        self.clock = world.clock
        self.track = drafting.track()
        self.certain = 1  # tokens of `truth` that are known
        self.ids = self.truth[:1]  # those and what is assumed behind them, of passes that are under way
        self.under_way = deque()  # (back at, start, tokens), `start` None for a void one
        self.free_s = 0.0
        self.is_refused = False

    def run(self):
        while self.certain < self.world.num_tokens:
            is_idle = all(start is None for _, start, _ in self.under_way)
            if self.clock.now_s >= self.free_s and (is_idle or not self.is_refused):
                self._start(is_idle)
                continue
            events = [self.under_way[0][0]] if self.under_way else []
            if self.clock.now_s < self.free_s and (is_idle or not self.is_refused):
                events.append(self.free_s)
            self.clock.now_s = max(self.clock.now_s, min(events))
            while self.under_way and self.under_way[0][0] <= self.clock.now_s:
                self._take()

    def _start(self, is_idle):
        self.guesser.sure, ids, start = self.certain, self.ids, len(self.ids)
        if is_idle:
            tokens = ids[-1:] + self.drafting.behind(self.track, 0, ids, room=100, num_sequences=1)
            start -= 1
        else:
            tokens = self.drafting.ahead(self.track, 0, ids, room=100, num_sequences=1)
            if not tokens:
                self.is_refused = True
                return
        ids[start:] = tokens
        costs, now_s = self.world.costs, self.clock.now_s
        away_s = self.world.away_s + self.world.per_token_s * len(tokens)
        self.drafting.sent(self.track, start, len(tokens))
        self.under_way.append((now_s + costs.lap(len(tokens)) + away_s, start, tokens))
        self.free_s = now_s + max(costs.busy(len(tokens)), self.world.per_token_s * len(tokens))
        self.is_refused = False

    def _take(self):
        _, start, tokens = self.under_way.popleft()
        self.is_refused = False
        if start is None:
            self.drafting.came(self.track, num_tokens=None)
            return
        chosen = []
        for place in range(len(tokens)):
            chosen.append(self.truth[start + 1 + place])
            if place + 1 < len(tokens) and tokens[place + 1] != chosen[-1]:
                break
        self.drafting.came(self.track, num_tokens=len(chosen))
        for token in chosen:
            self.drafting.certain(self.track, self.certain, token)
            self.certain += 1
        if self.ids[self.certain - 1 : self.certain] != chosen[-1:]:  # nothing was assumed, or something else
            self.ids[self.certain - 1 :] = chosen[-1:]
            self.under_way = deque((back_s, None, tokens) for back_s, _, tokens in self.under_way)


def flat_costs(lap_s: float = 0.04) -> PassCosts:
    return _costs(lap_s, [1.0] * 5)


def stepped_costs(lap_s: float = 0.04) -> PassCosts:
    """As measured of SmolLM2 on a CPU: two to eight tokens take about 1.9 times as long as one."""
    return _costs(lap_s, [1, 1.9, 1.9, 1.9, 2.0])


def _costs(lap_s, times):
    return PassCosts(
        num_tokens=(1, 2, 4, 8, 9),
        lap_s=tuple(lap_s * n for n in times),
        busy_s=tuple(lap_s * SLOWEST * n for n in times),
    )
