"""What goes around the ring at once: one pass, some rows of tokens through all stages. Integers only.

Rank 0 decides on passes; the other ranks learn from frames what they must do.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

__all__ = ["Pass", "PassKind", "Row"]


class PassKind(IntEnum):
    """SCORE: a micro-batch of a text that every rank knows, without a cache. PREFILL and DECODE: rows of slots.

    What distinguishes the latter two is the codec: a DECODE has what was generated, or is scored as if it were.
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
    """A SCORE pass names its micro-batch, the others have rows of `num_tokens` each.

    `samples` asks for next tokens: of a PREFILL after each row's last token; of a DECODE after each token, up to the
    first that is not the row's next one, so that the tokens behind a row's first are drafts. `echoes`, of a PREFILL
    that samples, asks for the log-probabilities of each row's own tokens behind its first as well. `scores` asks for
    the losses of a window's tokens, a row's window being that of the micro-batch.
    """

    kind: PassKind
    rows: tuple[Row, ...] = ()
    num_tokens: int = 0
    samples: bool = False
    echoes: bool = False
    scores: bool = False
    microbatch_index: int | None = None

    def __str__(self) -> str:
        if self.kind is PassKind.SCORE:
            return f"micro-batch {self.microbatch_index}"
        places = ", ".join(f"slot {row.slot} from {row.start}" for row in self.rows)
        return f"{self.kind.name.lower()} of {self.num_tokens} tokens ({places})"
