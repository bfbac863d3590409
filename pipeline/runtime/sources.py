"""Micro-batches of a known text as passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.models.stage import TokenWindows
from pipeline.partition.passes import Pass, PassKind
from pipeline.runtime.engine import Entry, Failure, Result

__all__ = ["MicroBatches"]


def _ignore(*_: Any) -> None:
    pass


class MicroBatches:
    """The source of SCORE passes: micro-batches from `first` on, until one fails; `failure` says why.

    `on_start` is told the index of one that enters, `on_result` takes those that come back before a failure.
    """

    def __init__(
        self,
        tokens: TokenWindows,
        *,
        first: int = 0,
        on_start: Callable[[int], None] = _ignore,
        on_result: Callable[[int, Result], None] = _ignore,
    ) -> None:
        self.failure: str | None = None
        self._tokens, self._following = tokens, first
        self._on_start, self._on_result = on_start, on_result

    @property
    def is_done(self) -> bool:
        return self.failure is not None or self._following == len(self._tokens.microbatches)

    def next(self) -> Entry | None:
        if self.is_done:
            return None
        index, self._following = self._following, self._following + 1
        self._on_start(index)
        return Entry(work=Pass(kind=PassKind.SCORE, microbatch_index=index), token_ids=self._tokens.input_ids(index))

    def is_void(self, work: Pass) -> bool:
        return False

    def take(self, work: Pass, result: Result | Failure) -> None:
        assert work.microbatch_index is not None
        if isinstance(result, Failure):
            self.failure = self.failure or result.cause
        elif self.failure is None:
            self._on_result(work.microbatch_index, result)
