"""The best placement, found exactly: a dynamic program over layers and nodes under a cap on each node's seconds.

Seconds become integers first, each rounded by itself, so what costs the same differs by at most `slack`: every
comparison between placements allows for it. The steps stand in docs/planner.md: with a cap, a node can hold layers
from i to j for a window of i's that moves on with j, and its cost is a difference of prefix sums, so a node's best
value for all j takes one pass with a sliding minimum. Node 0 of a ring holds both ends; its first range is tried in
every length.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.partition.plan import default_plan
from pipeline.planner.forecast import cuts_of
from pipeline.planner.problem import PlannerError, Problem

__all__ = ["MemoryLimitError", "best_cuts"]

_RESOLUTION = 2**48  # of a lap on the slowest node


class MemoryLimitError(PlannerError):
    """The nodes' memory does not hold the model."""


def best_cuts(problem: Problem) -> tuple[int, ...]:
    """Stage i of the best placement has layers [cuts[i], cuts[i + 1]).

    Of placements with the least `forecast.s_per_token`, one with the shortest lap, and of those, one whose slowest
    node is fastest: the default plan where it is such a one, an even placement elsewhere. Raises MemoryLimitError
    where no placement fits.
    """
    search = _Search(problem)
    least_cap = search.least_cap()
    highest = search.best_cap(least_cap)
    longest = search.least_total(highest) + search.slack
    caps = search.caps_between(least_cap, highest)
    cap = _first(caps, lambda c: search.least_total(c) <= longest) + search.slack
    default = cuts_of(problem, default_plan(problem.num_layers, len(problem.nodes), wrap=problem.wrap))
    return default if search.comes_to(default, cap, longest) else search.cuts(cap, longest)


def _first(values: Sequence[int], holds: Callable[[int], bool]) -> int:
    """The smallest of sorted values for which it holds; it holds for all behind that, and for the last."""
    return values[bisect_left(values, True, hi=len(values) - 1, key=holds)]


@dataclass(frozen=True)
class _Node:
    """Integer seconds and bytes of one node; `s` and `nbytes` are prefix sums over the layers."""

    s: tuple[int, ...]
    end_s: int
    nbytes: tuple[int, ...]
    room: int | None  # beside the ends that it holds

    def reach(self, start: int, cap: int | None) -> int:
        """The largest j for which the node can hold layers [start, j)."""
        reached = len(self.s) - 1
        if cap is not None:
            reached = bisect_right(self.s, cap - self.end_s + self.s[start]) - 1
        if self.room is not None:
            reached = min(reached, bisect_right(self.nbytes, self.room + self.nbytes[start]) - 1)
        return reached  # below `start` where not even its ends fit

    def starts(self, cap: int | None) -> list[int]:
        """For every j the smallest i for which the node can hold layers [i, j)."""
        first = [0] * len(self.s)
        if cap is not None:
            first = [bisect_left(self.s, end - cap + self.end_s) for end in self.s]
        if self.room is not None:
            by_room = (bisect_left(self.nbytes, end - self.room) for end in self.nbytes)
            first = [max(pair) for pair in zip(first, by_room, strict=True)]
        return first


class _Search:
    """`inner` are the nodes of one stage; `outer` is node 0 where it has the first stage and the last."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        costs, slowest = problem.costs, min(node.speed for node in problem.nodes)
        lap = (sum(costs.layer_s) + costs.embedding_s + costs.head_s) / slowest + problem.microbatch_s
        self._unit = lap / _RESOLUTION or 1.0
        nbytes = tuple(itertools.accumulate(costs.layer_bytes, initial=0))
        nodes = []
        for index, node in enumerate(problem.nodes):
            layer_s = (self._ticks(seconds / node.speed) for seconds in costs.layer_s)
            limit = node.memory_bytes
            nodes.append(
                _Node(
                    tuple(itertools.accumulate(layer_s, initial=0)),
                    self._ticks(problem.end_s(index) / node.speed + node.fixed_s),
                    nbytes,
                    None if limit is None else limit - problem.end_bytes(index),
                )
            )
        self._num_layers = problem.num_layers
        self._outer = nodes[0] if problem.wraps else None
        self._inner = nodes[1:] if problem.wraps else nodes
        self._ends_s = sum(node.end_s for node in nodes)
        fixed = sum(self._ticks(node.fixed_s) for node in problem.nodes)
        self._rest = self._ticks(problem.microbatch_s) - problem.microbatch_tokens * fixed
        self._links_s = max((self._ticks(link.s_per_token) for link in problem.links), default=0)
        self.slack = 2 * (self._num_layers + len(nodes))  # half a tick a layer and node of two placements, and room
        self._least_totals: dict[int | None, int] = {}

    def _ticks(self, seconds: float) -> int:
        return round(seconds / self._unit)

    # Caps on a node's seconds

    @cached_property
    def _caps(self) -> list[int]:
        """Everything that a node's seconds can be, sorted."""
        found: set[int] = set()
        for node in (*self._inner, *([self._outer] if self._outer else [])):
            ranges = {end - start for start, end in itertools.combinations_with_replacement(node.s, 2)}
            if node is self._outer:  # all but a range in the middle
                ranges = {node.s[-1] - seconds for seconds in ranges}
            found.update(node.end_s + seconds for seconds in ranges)
        return sorted(found)

    def caps_between(self, low: int, high: int | None) -> list[int]:
        """Possible caps from `low` to `high`, both included where they are possible."""
        caps = self._caps
        return caps[bisect_left(caps, low) : None if high is None else bisect_right(caps, high)]

    def least_cap(self) -> int:
        """The least seconds of the slowest node. Raises MemoryLimitError where the memory holds no placement."""
        if not self._fits(None):
            raise MemoryLimitError(self._shortage())
        return _first(self._caps, self._fits)

    def best_cap(self, least_cap: int) -> int | None:
        """The seconds that a node may have in placements with the least s_per_token; None: any."""
        problem = self._problem
        if problem.objective == "decode":
            return None
        per_lap = problem.in_flight * problem.microbatch_tokens

        def lap(cap: int) -> int:
            return problem.microbatch_tokens * self.least_total(cap) + self._rest

        def bound(cap: int) -> int:
            return per_lap * max(cap, self._links_s)

        # A higher cap is a longer bound and a shorter lap: the best is where they cross, or just before.
        highest = max(least_cap, -(-lap(least_cap) // per_lap))
        caps = [least_cap, *(cap for cap in self.caps_between(least_cap + 1, highest))]
        crossing = bisect_left(caps, True, key=lambda cap: lap(cap) <= bound(cap))
        best = min(max(lap(cap), bound(cap)) for cap in caps[max(0, crossing - 1) : crossing + 1])
        return best // per_lap + self.slack

    # Whether and how layers fit under a cap

    def _middles(self, cap: int | None) -> Iterator[tuple[int, range]]:
        """Where the inner nodes begin, and where they may end for the outer one to hold the rest."""
        num_layers, outer = self._num_layers, self._outer
        if outer is None:
            yield 0, range(num_layers, num_layers + 1)
            return
        for start in range(num_layers + 1):
            # What the outer node holds is a range of the layers that begins behind the inner ones' end.
            spare = None if cap is None else cap - outer.end_s - outer.s[start]
            room = None if outer.room is None else outer.room - outer.nbytes[start]
            if (spare is not None and spare < 0) or (room is not None and room < 0):
                return
            end = start
            if spare is not None:
                end = max(end, bisect_left(outer.s, outer.s[-1] - spare))
            if room is not None:
                end = max(end, bisect_left(outer.nbytes, outer.nbytes[-1] - room))
            yield start, range(end, num_layers + 1)

    def _fits(self, cap: int | None) -> bool:
        for start, ends in self._middles(cap):
            reached = start
            for node in self._inner:
                further = node.reach(reached, cap)
                if further < reached:
                    return False
                reached = further
            if reached >= ends.start:
                return True
        return False

    def least_total(self, cap: int | None) -> int:
        """The least sum of all nodes' seconds under a cap that some placement keeps."""
        if cap not in self._least_totals:
            self._least_totals[cap] = min(total for total, _, _ in self._totals(cap))
        return self._least_totals[cap]

    def _totals(self, cap: int | None) -> Iterator[tuple[int, int, int]]:
        """(sum of all nodes' seconds, start and end of the inner nodes' layers), the least for every start and end."""
        windows = [node.starts(cap) for node in self._inner]
        for start, ends in self._middles(cap):
            best: dict[int, int] = {start: self._ends_s}
            for node, first in zip(self._inner, windows, strict=True):
                best = self._behind(node, first, best, node.reach(max(best), cap))
                if not best:
                    break
            outer = 0 if self._outer is None else self._outer.s[start] + self._outer.s[-1]
            for end in ends:
                if end in best:
                    yield best[end] + outer - (self._outer.s[end] if self._outer else 0), start, end

    @staticmethod
    def _behind(node: _Node, first: Sequence[int], before: dict[int, int], last: int) -> dict[int, int]:
        """The least sums behind a node, by the end of its layers, from those behind the one before, by its start."""
        after: dict[int, int] = {}
        waiting: deque[tuple[int, int]] = deque()  # (start, sum up to it less the node's prefix), sums rising
        s = node.s
        for end in range(min(before), last + 1):
            if end in before:
                value = before[end] - s[end]
                while waiting and waiting[-1][1] >= value:
                    waiting.pop()
                waiting.append((end, value))
            while waiting and waiting[0][0] < first[end]:
                waiting.popleft()
            if waiting:
                after[end] = waiting[0][1] + s[end]
        return after

    # The placement itself

    def comes_to(self, cuts: Sequence[int], cap: int, most: int) -> bool:
        """Whether a placement fits, under the cap and with no more than this sum."""
        if any(self._outer_cuts(cuts) in ((start, end) for end in ends) for start, ends in self._middles(cap)):
            inner = cuts[1:-1] if self._outer else cuts
            parts = zip(self._inner, itertools.pairwise(inner), strict=True)
            return all(node.reach(a, cap) >= b for node, (a, b) in parts) and self._total(cuts) <= most
        return False

    def _outer_cuts(self, cuts: Sequence[int]) -> tuple[int, int]:
        return (cuts[1], cuts[-2]) if self._outer else (cuts[0], cuts[-1])

    def _total(self, cuts: Sequence[int]) -> int:
        inner = cuts[1:-1] if self._outer else cuts
        total = sum(node.s[b] - node.s[a] for node, (a, b) in zip(self._inner, itertools.pairwise(inner), strict=True))
        if self._outer:
            total += self._outer.s[cuts[1]] + self._outer.s[-1] - self._outer.s[cuts[-2]]
        return self._ends_s + total

    def cuts(self, cap: int, most: int) -> tuple[int, ...]:
        """An even placement under the cap with no more than this sum.

        Node 0's layers are halved, as by default, if they can be.
        """
        found = [(start, end) for own, start, end in self._totals(cap) if own <= most]
        start, end = min(found, key=lambda ends: (self._unevenness(ends[0], ends[1], most), ends))
        steps: list[dict[int, tuple[int, int, int]]] = [{start: (0, 0, start)}]  # (sum, squares, the node's start)
        for node in self._inner:
            steps.append(self._evenly_behind(node, node.starts(cap), steps[-1], node.reach(max(steps[-1]), cap)))
        inner = [end]
        for step in reversed(steps[1:]):
            inner.append(step[inner[-1]][2])
        middle = tuple(reversed(inner))
        return (0, *middle, self._num_layers) if self._outer else middle

    def _unevenness(self, start: int, end: int, total: int) -> tuple[int, int]:
        """How far node 0 is from the mean of all nodes, and its first layers from half of its layers."""
        if self._outer is None:
            return 0, 0
        own = self._outer.end_s + self._outer.s[start] + self._outer.s[-1] - self._outer.s[end]
        num_layers = start + self._num_layers - end
        return abs((len(self._inner) + 1) * own - total), abs(2 * start - num_layers)

    @staticmethod
    def _evenly_behind(
        node: _Node, first: Sequence[int], before: dict[int, tuple[int, int, int]], last: int
    ) -> dict[int, tuple[int, int, int]]:
        """As `_behind`; of equal sums those with the least sum of squares."""
        after = {}
        for end in range(min(before), last + 1):
            values = []
            for start in range(first[end], end + 1):
                if start in before:
                    total, squares, _ = before[start]
                    own = node.end_s + node.s[end] - node.s[start]
                    values.append((total + own, squares + own * own, start))
            if values:
                after[end] = min(values)
        return after

    def _shortage(self) -> str:
        """How many layers and bytes find no room, or at which node the ends do not."""
        problem = self._problem
        for index, node in enumerate(problem.nodes):
            lacking = 0 if node.memory_bytes is None else problem.end_bytes(index) - node.memory_bytes
            if lacking > 0:
                held = [name for name, holder in (("embedding", 0), ("head", problem.last_node)) if holder == index]
                needed = f"{' and '.join(held)} take {_size(problem.end_bytes(index))}"
                return f"node {index} lacks {_size(lacking)} of memory: {needed}, of {_size(node.memory_bytes)}"
        left = []  # (bytes, number) of the layers that find no room, for every number of first layers
        for start, ends in self._middles(None):
            end = start
            for inner in self._inner:
                end = inner.reach(end, None)
            left.append((sum(problem.costs.layer_bytes[end : ends.start]), ends.start - end))
        nbytes, number = min(left)
        limits = (
            f"node {index} {'without a limit' if node.memory_bytes is None else _size(node.memory_bytes)}"
            for index, node in enumerate(problem.nodes)
        )
        return (
            f"the nodes lack {_size(nbytes)} of memory: {number} of {self._num_layers} layers find no room "
            f"({', '.join(limits)}; embedding and head take {_size(problem.end_bytes(0))} of node 0"
            f"{'' if problem.last_node == 0 else f' and {_size(problem.end_bytes(problem.last_node))} of the last'})"
        )


def _size(nbytes: int | None) -> str:
    assert nbytes is not None
    return f"{nbytes / 2**30:.3g} GiB" if nbytes >= 2**30 / 100 else f"{nbytes:,} bytes"
