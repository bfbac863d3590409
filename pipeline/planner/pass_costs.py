"""What a pass costs, by how many tokens of a sequence it has; `runtime.pass_costs` measures it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["PassCosts"]


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

    def lap(self, num_tokens: int) -> float:
        return self._at(self.lap_s, num_tokens)

    def busy(self, num_tokens: int) -> float:
        return self._at(self.busy_s, num_tokens)

    def _at(self, seconds: Sequence[float], num_tokens: int) -> float:
        known = self.num_tokens
        if len(known) == 1:
            return seconds[0]
        right = min(max(bisect_right(known, num_tokens), 1), len(known) - 1)
        left = right - 1
        slope = (seconds[right] - seconds[left]) / (known[right] - known[left])
        return max(0.0, seconds[left] + slope * (num_tokens - known[left]))
