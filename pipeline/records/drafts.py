"""What a generation's record says of drafts: what came of them, and what decisions about them were made from.

A part of `generation_record`, made by `generation.record` of `drafting.policy.Drafting`. Counts are of rows:
what a pass has of one sequence.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from pipeline.records.base import Amount, Count, Part, Positive
from pipeline.records.run_record import check_ratio

__all__ = ["DrafterFigures", "Drafts", "DraftsAtDepth", "RecordedCosts", "RecordedLimits", "Undrafted"]


class DraftsAtDepth(Part):
    """Drafts that were judged, since all before them were right, and those of them that were right."""

    judged: Count
    right: Count

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.right > self.judged:
            raise ValueError(f"right is {self.right}, judged only {self.judged}")
        return self


class DrafterFigures(Part):
    """`by_depth` begins with the token behind the newest certain one. `draft_s`: seconds that one draft has taken."""

    name: str
    spec: str
    draft_s: Amount
    by_depth: tuple[DraftsAtDepth, ...]


class Undrafted(Part):
    """Rows without drafts: no drafter had one, or it would not have paid."""

    none: Count
    cost: Count


class RecordedLimits(Part):
    """Drafts in a row and passes of a sequence under way, at most, not counting those that are known to be of no use;
    without `adapts`, always so many.
    """

    depth: Positive
    passes: Positive
    adapts: bool


class RecordedCosts(Part):
    """Seconds of a pass by how many tokens of a sequence it has: of all ranks, one behind the other, and how long
    passes that follow each other are apart at least.
    """

    num_tokens: Annotated[tuple[Positive, ...], Field(min_length=1)]
    lap_s: tuple[Amount, ...]
    busy_s: tuple[Amount, ...]

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if not len(self.num_tokens) == len(self.lap_s) == len(self.busy_s):
            raise ValueError(f"{len(self.num_tokens)} num_tokens, {len(self.lap_s)} lap_s, {len(self.busy_s)} busy_s")
        if list(self.num_tokens) != sorted(set(self.num_tokens)):
            raise ValueError("num_tokens does not rise")
        return self


class Drafts(Part):
    """What came of a run's drafts, over all formings of the ring; `draft_s`, `costs` and `away_s` are of the last one.

    `passes`: rows of sampled tokens that went, `void` of them came back of no use, the others brought `tokens`;
    `tokens_per_pass` is over all of them, null where none went. `rows_by_tokens`: rows of one token, of two, and so on.
    `rows_by_in_flight`: rows that went while none of the sequence's passes was under way, while one was, and so on; the
    others' first token is a draft, where what is under way still counts. `away_s`: of a lap, what is no work of the
    ranks, at the end.
    """

    drafters: Annotated[tuple[DrafterFigures, ...], Field(min_length=1)]
    passes: Count
    void: Count
    tokens: Count
    tokens_per_pass: Amount | None
    rows_by_tokens: tuple[Count, ...]
    rows_by_in_flight: tuple[Count, ...]
    undrafted: Undrafted
    limits: RecordedLimits
    costs: RecordedCosts
    away_s: Amount

    @property
    def num_judged(self) -> int:
        return sum(at_depth.judged for drafter in self.drafters for at_depth in drafter.by_depth)

    @property
    def num_right(self) -> int:
        return sum(at_depth.right for drafter in self.drafters for at_depth in drafter.by_depth)

    @property
    def were_sent(self) -> bool:
        """Whether any draft went around the ring."""
        return any(self.rows_by_tokens[1:]) or any(self.rows_by_in_flight[1:])

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        names = [drafter.name for drafter in self.drafters]
        if len(set(names)) < len(names):
            raise ValueError("a drafter stands twice in drafters")
        for key in ("rows_by_tokens", "rows_by_in_flight"):
            if (total := sum(getattr(self, key))) != self.passes:
                raise ValueError(f"passes is {self.passes}, the sum over {key} {total}")
        if len(self.rows_by_tokens) > 1 + self.limits.depth:
            raise ValueError(f"rows_by_tokens has rows of {len(self.rows_by_tokens)} tokens, limits.depth allows fewer")
        num_tokens = sum(tokens * rows for tokens, rows in enumerate(self.rows_by_tokens, 1))
        num_drafts = num_tokens - sum(self.rows_by_in_flight[:1])
        for key, count, most in (
            ("void", self.void, self.passes),
            ("judged", self.num_judged, num_drafts),
            ("tokens", self.tokens, num_tokens),
        ):
            if count > most:
                raise ValueError(f"{key} is {count}, more than {most}, which the rows allow")
        check_ratio("tokens_per_pass", self.tokens_per_pass, self.tokens, self.passes)
        return self
