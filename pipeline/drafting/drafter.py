"""What a drafter is: token ids in, token ids that may follow them out.

Drafters live on rank 0 and are asked by the scheduler (`generation.scheduler`) through `policy.Drafting`, which takes
as many drafts as are worth a pass. A draft is accepted where it equals what the head chooses, so a drafter can make
generation faster or slower, and never other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # or who writes a drafter without a model would wait for torch
    from pipeline.models.stage import Stage
    from pipeline.partition.plan import Plan
    from pipeline.runtime.worker import Tap

__all__ = ["Draft", "Drafter", "DrafterContext"]


class Draft(NamedTuple):
    """`confidence`, 0 to 1: how likely the drafter takes it to be that the model goes on so, where all drafts before
    it are right. What it has been worth is measured; drafts of like confidence should be right alike often.
    """

    token_id: int
    confidence: float


class Drafter(Protocol):
    """Options of a spec, `ngram(longest=4)`, are keyword arguments of its class, beside `context`."""

    name: str

    def draft(self, slot: int, ids: Sequence[int]) -> Iterator[Draft]:
        """What may follow `ids`, one token behind the other: those of the prompt, the answer, and what is assumed of it
        while passes are under way. It may end at any token, and the caller takes as many as it has use for: what
        costs time is best done when the next one is asked for.

        `slot` is the sequence's until it ends; another may have it afterwards. Ids behind the certain ones may be
        others the next time. They are not to be changed.
        """


@dataclass(frozen=True, kw_only=True)
class DrafterContext:
    """What a drafter may be made from. `stages` are rank 0's, by stage index, with their slots open.

    `watch` is `StageWorker.watch` of rank 0's worker, for drafters that want to see passes; None where none will go.
    """

    plan: Plan
    stages: Mapping[int, Stage]
    model_config: Any
    checkpoint_digest: str
    eos_ids: tuple[int, ...]
    watch: Callable[[Tap, Tap], None] | None = None
