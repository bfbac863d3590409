"""What came of a ring's drafts, counted for its record."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["DepthCounts", "DraftFigures"]


@dataclass
class DepthCounts:
    """Of drafts that went around the ring, those that were judged (all before them were right) and those right."""

    judged: int = 0
    right: int = 0


@dataclass
class DraftFigures:
    """`counts[drafter][depth]`: depth 1 is the token behind the newest certain one.

    `passes`: rows of sampled tokens that went, `void` those that came back of no use, `tokens` what the others brought.
    `depths` and `in_flight`: rows by their drafts, and by how many passes of the sequence, not void, were under way.
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

    def num_judged_and_right(self) -> tuple[int, int]:
        """Over all drafters and depths; from any thread, while passes are counted."""
        judged = [counts for by_depth in list(self.counts.values()) for counts in list(by_depth.values())]
        return sum(counts.judged for counts in judged), sum(counts.right for counts in judged)
