"""Prompt lookup: what has followed the newest tokens before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.drafting.drafter import Draft, DrafterContext

__all__ = ["Ngram"]


class Ngram:
    name = "ngram"

    def __init__(self, *, context: DrafterContext, longest: int = 4, shortest: int = 1) -> None:
        self.longest, self.shortest = longest, shortest

    def draft(self, slot: int, ids: Sequence[int]) -> Iterator[Draft]:
        raise NotImplementedError
