"""What goes around the ring at once: one pass, some rows of tokens through all stages. Integers only.

Rank 0 decides on passes; the other ranks learn from frames what they must do.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["Pass", "PassKind", "Row"]


class PassKind(IntEnum):
    """SCORE: windows of a text that every rank knows. PREFILL and DECODE extend the sequences in slots.

    What distinguishes the latter two is the codec: a DECODE's tokens were sampled, one a row.
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
    """Rows of `num_tokens` each; `samples` asks for a next token after each row's last.

    A SCORE pass has the index of its micro-batch. Without rows it is a whole micro-batch, which no cache keeps; with
    rows those tokens of its windows that they name.
    """

    kind: PassKind
    rows: tuple[Row, ...] = ()
    num_tokens: int = 0
    samples: bool = False
    microbatch_index: int = 0
