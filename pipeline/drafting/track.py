"""What is known of one sequence: how its drafts have done, those that wait to be judged, its passes under way.

Kept by `policy.Drafting`, a `Track` for each sequence.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.drafting.acceptance import Acceptance
from pipeline.drafting.drafter import Draft

__all__ = ["FADE", "Proposal", "Track", "UnderWay"]

FADE = 0.8  # of a rate's and a drafter's worth, at each new one


@dataclass(frozen=True)
class Proposal:
    """A draft for a position. `depth` is counted from what was certain when it was made."""

    draft: Draft
    drafter: int
    depth: int
    chance: float


@dataclass(eq=False)
class UnderWay:
    """`in_all`: tokens of all rows. `is_alone`: no other pass was under way when it went."""

    num_tokens: int
    sent_s: float
    in_all: int
    is_alone: bool


class Track:
    """A sequence: how its drafts have done, and those that wait to be judged, by position.

    `compared[drafter]` are those of each drafter, `sent` those that go around the ring.
    """

    def __init__(self, acceptances: Sequence[Acceptance], rate: float) -> None:
        self.acceptances = [Acceptance(prior) for prior in acceptances]
        self.worth = [math.inf] * len(acceptances)  # in tokens, of asking each drafter
        self.next_probe = [0] * len(acceptances)
        self._tokens, self._seconds = rate, 1.0  # of passes that have begun, faded
        self.compared: list[dict[int, Proposal]] = [{} for _ in acceptances]
        self.sent: dict[int, Proposal] = {}
        self.chosen: list[Proposal] = []  # for the next pass
        self.under_way: deque[UnderWay] = deque()
        self.num_void = 0  # of those under way, the oldest
        self.num_certain = 0
        self.refused: int | None = None  # at this length no further pass pays, while nothing comes

    @property
    def rate(self) -> float:
        """Tokens a second, as the chances of its last passes were."""
        return self._tokens / self._seconds

    def learn_rate(self, tokens: float, seconds: float) -> None:
        self._tokens, self._seconds = FADE * self._tokens + tokens, FADE * self._seconds + seconds

    def learn_worth(self, drafter: int, tokens: float) -> None:
        known = self.worth[drafter]
        self.worth[drafter] = tokens if math.isinf(known) else FADE * known + (1 - FADE) * tokens

    @property
    def assumed_chance(self) -> float:
        """That all drafts are right that have gone and are not judged."""
        return math.prod(proposal.chance for proposal in self.sent.values())
