"""GGUF's block types by name: how many weights a block has, in how many bytes.

A block is `num_weights` weights of a matrix's row: codes of a few bits, and what makes weights of them. How they lie in
it is told by `readers`, which stands on a compiler; this does not, since sizes are wanted where nothing is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LAYOUTS", "RUN", "Layout"]

RUN = 32  # weights that share a least one, in every type that has those


@dataclass(frozen=True)
class Layout:
    """A block type, by the name that GGUF has for it."""

    name: str
    num_weights: int
    nbytes: int

    @property
    def has_leasts(self) -> bool:
        """Whether runs, which are of `RUN` weights then, have a least weight: a product needs their inputs' sums."""
        return self.name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")

    def row_nbytes(self, num_weights: int) -> int:
        """Of a row of `num_weights`. Raises ValueError unless these are whole blocks."""
        if num_weights % self.num_weights:
            raise ValueError(f"rows of {num_weights} weights are no whole blocks of {self.name} ({self.num_weights})")
        return num_weights // self.num_weights * self.nbytes


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("BF16", 16, 32),
        Layout("Q8_0", 32, 34),
        Layout("Q4_0", 32, 18),
        Layout("Q4_1", 32, 20),
        Layout("Q5_0", 32, 22),
        Layout("Q5_1", 32, 24),
        Layout("Q4_K", 256, 144),
        Layout("Q5_K", 256, 176),
        Layout("Q6_K", 256, 210),
    )
}
