"""What goes around the ring at once: one pass, some rows of tokens through all stages. Integers only.

Rank 0 decides on passes; the other ranks learn from frames what they must do.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["Pass", "PassKind", "Row"]


class PassKind(IntEnum):
    """SCORE: windows of a known text, without a cache. PREFILL and DECODE extend the sequences in slots; of DECODE's rows,
    and of a PREFILL that is the last of its prompt, the last token's logits are sampled from.
    """

    SCORE = 1
    PREFILL = 2
    DECODE = 3


@dataclass(frozen=True)
class Row:
    """One sequence's part of a pass: tokens at positions `start`, `start + 1`, ... of the sequence in `slot`.

    What the slot held from `start` on is dropped. With `from_slot` its first `start` positions are those of that slot.
    """

    slot: int
    start: int
    from_slot: int | None = None


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Rows of `num_tokens` each. A SCORE pass has the index of its micro-batch, and no rows."""

    kind: PassKind
    rows: tuple[Row, ...] = ()
    num_tokens: int = 0
    microbatch_index: int = 0
