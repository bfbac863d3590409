"""What a lap takes beside the work of the ranks, the links in the main: learnt from laps that met no others."""

from __future__ import annotations

import math
from collections import deque

__all__ = ["Away"]

_LAPS = 8  # of a width, the last ones, of which the fastest tells
_PLAIN_EVERY = 64  # laps, one of which has a single token, or delay and bytes could not be told apart


class Away:
    """Seconds by how many tokens a pass has: a delay, and what each token's bytes take."""

    def __init__(self) -> None:
        self._laps: dict[int, deque[float]] = {}
        self._most_s = math.inf  # while no lap was alone
        self._num_since_plain = 0
        self._delay_s = self._per_token_s = 0.0

    @property
    def per_token_s(self) -> float:
        return self._per_token_s

    def seconds(self, num_tokens: int) -> float:
        if not self._laps:
            return self._most_s if math.isfinite(self._most_s) else 0.0
        return self._delay_s + self._per_token_s * num_tokens

    @property
    def needs_plain(self) -> bool:
        """Whether the next lap should have one token."""
        return 1 not in self._laps or self._num_since_plain >= _PLAIN_EVERY

    def learn(self, num_tokens: int, seconds: float, *, is_alone: bool) -> None:
        """Of a lap; one that met others has taken longer, and is an upper bound."""
        if not is_alone:
            self._most_s = min(self._most_s, max(0.0, seconds))
            return
        self._num_since_plain = 0 if num_tokens == 1 else self._num_since_plain + 1
        self._laps.setdefault(num_tokens, deque(maxlen=_LAPS)).append(max(0.0, seconds))
        widths = sorted(self._laps)
        least = [min(self._laps[width]) for width in widths]
        mean_width, mean_s = sum(widths) / len(widths), sum(least) / len(least)
        spread = sum((width - mean_width) ** 2 for width in widths)
        shared = sum((width - mean_width) * (s - mean_s) for width, s in zip(widths, least, strict=True))
        self._per_token_s = max(0.0, shared / spread) if spread else 0.0
        self._delay_s = max(0.0, mean_s - self._per_token_s * mean_width)
