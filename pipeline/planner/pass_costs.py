"""What a pass costs, by how many tokens of a sequence it has; `runtime.pass_costs` measures it."""

from __future__ import annotations

import itertools
import math
import operator
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

__all__ = ["PassCosts", "predicted_rate"]

_LONGEST_RUN = 10_000  # passes, where nearly all drafts are right


@dataclass(frozen=True, kw_only=True)
class PassCosts:
    """Seconds of passes with `num_tokens` (rising, from 1) tokens in a row; between those it goes in a straight line.

    `lap_s`: the work of all ranks, one behind the other. `busy_s`: how long passes that follow each other are apart at
    least: the slowest rank's work, or, where ranks share cores, all of it over as many as compute at once.
    """

    num_tokens: tuple[int, ...]
    lap_s: tuple[float, ...]
    busy_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.num_tokens) == len(self.lap_s) == len(self.busy_s) or self.num_tokens[:1] != (1,):
            raise ValueError(f"costs of {self.num_tokens} tokens: {len(self.lap_s)} laps, {len(self.busy_s)} busy_s")
        if list(self.num_tokens) != sorted(set(self.num_tokens)):
            raise ValueError(f"num_tokens {self.num_tokens} must rise")
        if not all(math.isfinite(s) and s >= 0 for s in (*self.lap_s, *self.busy_s)):
            raise ValueError("seconds must be finite and at least 0")

    # More tokens take no less, whatever was measured.

    @cached_property
    def _rising_lap_s(self) -> list[float]:
        return list(itertools.accumulate(self.lap_s, max))

    @cached_property
    def _rising_busy_s(self) -> list[float]:
        return list(itertools.accumulate(self.busy_s, max))

    def lap(self, num_tokens: int) -> float:
        return self._at(self._rising_lap_s, num_tokens)

    def busy(self, num_tokens: int) -> float:
        return self._at(self._rising_busy_s, num_tokens)

    def _at(self, seconds: Sequence[float], num_tokens: int) -> float:
        known = self.num_tokens
        if len(known) == 1:
            return seconds[0]
        if num_tokens > known[-1]:
            return seconds[-1] + (seconds[-1] - seconds[0]) / (known[-1] - 1) * (num_tokens - known[-1])
        right = min(max(bisect_right(known, num_tokens), 1), len(known) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (known[right] - known[left])
        return seconds[left] + slope * (num_tokens - known[left])


def predicted_rate(
    acceptance: Sequence[float], *, depth: int, passes: int, costs: PassCosts, away_s: float, draft_s: float = 0.0
) -> float:
    """Tokens a second of one sequence with always `depth` drafts in a pass and up to `passes` of it under way.

    `acceptance[i]`: how often the draft of depth i + 1 is right where those before it are; the last stands for deeper
    ones, and none for no drafts. `away_s`: of a lap, what is no work of the ranks; `draft_s`: seconds of one draft.

    A run begins with a pass of the newest token and k = `depth` drafts; each pass behind it has k + 1 drafts, the
    first of which is for the token that follows the pass before it. Pass j of the run starts at t(j), which is
    t(j - 1) + busy or when pass j - `passes` is back, if that is later, and is back at t(j) + step, where step =
    lap(k + 1) + away_s + drafting. Where it is reached it brings e(j) = 1 + a1 + a1 a2 + ... tokens, over its k drafts,
    and the next is reached with the chance c(j) that all of them and the first draft of the next are right. Otherwise
    the run ends when it is back, or once the ring has begun the last void pass. The rate is the mean of a run's tokens
    over that of its seconds.
    """
    num_drafts = depth if acceptance else 0
    passes = passes if num_drafts else 1
    drafting_s = draft_s * (num_drafts + 1 if passes > 1 else num_drafts)
    step_s = costs.lap(1 + num_drafts) + away_s + drafting_s
    apart_s = costs.busy(1 + num_drafts) + drafting_s

    def chance(place: int) -> float:
        return acceptance[min(place, len(acceptance) - 1)] if acceptance else 0.0

    starts = [0.0]
    tokens = seconds = 0.0
    reached, place = 1.0, 0
    for j in range(_LONGEST_RUN):
        while len(starts) <= j + passes:  # all that may have begun when pass j is back
            full_s = starts[len(starts) - passes] + step_s if len(starts) >= passes else 0.0
            starts.append(max(starts[-1] + apart_s, full_s))
        right = [chance(place + i) for i in range(num_drafts)]
        tokens += reached * (1 + sum(itertools.accumulate(right, operator.mul)))
        goes_on = math.prod(right) * chance(place + num_drafts) if passes > 1 else 0.0
        back_s = starts[j] + step_s
        void_s = [start + apart_s for start in starts[j : j + passes] if start < back_s]
        seconds += reached * (1 - goes_on) * max(back_s, *void_s)
        reached, place = reached * goes_on, place + num_drafts + 1
        if reached < 1e-9:
            break
    else:
        seconds += reached * starts[_LONGEST_RUN]
    return tokens / seconds
