"""mxfp4: 4-bit floats (E2M1) in blocks of 32 within a token, scaled by a power of two (E8M0).

    exponent = clamp(floor(log2(max |x|)) - 2, -127, 127)          stored as exponent + 127, 255 is NaN
    code     = E2M1 nearest to x / 2^exponent, ties to even, saturating at +-6
    x'       = {0, 0.5, 1, 1.5, 2, 3, 4, 6} with sign, times 2^exponent

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.2 and 6.3; 2 is the largest exponent of
E2M1. At widths not divisible by 32 the last block of a token is shorter.

Side information: 1 byte a block. Payload: exponents [N, blocks], codes [N, ceil(H / 2)], two in a byte, the
first in the high half (as in compressors.scalar.fourbit).
"""

from __future__ import annotations

import math

import torch

from compressors.base import LinkInfo
from compressors.bitpack import Section, pack_pairs, unpack_pairs
from compressors.rows import RowCodec
from compressors.scalar.fourbit import blocks_of

__all__ = ["MxFp4"]

BLOCK = 32
E8M0_NAN = 255
MAX_ELEMENT_EXPONENT = 2

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class MxFp4(RowCodec):
    """E2M1 codes with one E8M0 exponent for each 32 values of a token."""

    name = "mxfp4"
    frame_invariant = True

    def __init__(self, *, link: LinkInfo | None = None) -> None:
        super().__init__(link=link)
        self._values = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)])
        self._bounds, self._order = _bounds_with_ties_to_even(self._values)
        self._kernel_bounds = tuple(self._bounds.numpy())

    def sections(self, num_rows: int, width: int) -> list[Section]:
        exponents, codes = (num_rows, -(-width // BLOCK)), (num_rows, -(-width // 2))
        return [(torch.uint8, exponents), (torch.uint8, codes)]

    def encode(self, rows, exponents, codes):
        blocks = blocks_of(rows, BLOCK)
        absmax = blocks.abs().amax(2)
        lost = ~absmax.isfinite()
        exponent = ((absmax.view(torch.int32) >> 23) - MAX_ELEMENT_EXPONENT).clamp_(min=0)
        inverse = ((254 - exponent) << 23).view(torch.float32)
        bounds = self._scratch.constant("bounds", self._bounds, rows.device)
        rank = torch.bucketize(blocks * inverse[:, :, None], bounds)
        code = self._scratch.constant("order", self._order, rows.device)[rank]
        code.masked_fill_(lost[:, :, None], 0)
        exponents.copy_(exponent.masked_fill_(lost, E8M0_NAN))
        codes.copy_(pack_pairs(code.flatten(1)[:, : rows.shape[1]]))

    def decode(self, rows, limit, exponents, codes):
        table = self._scratch.constant("values", self._values, rows.device)
        values = table[unpack_pairs(codes, rows.shape[1]).int()]
        values = blocks_of(values, BLOCK) * _scale(exponents)[:, :, None]
        rows.copy_(values.flatten(1)[:, : rows.shape[1]]).clamp_(-limit, limit)

    def encode_cpu(self, rows, exponents, codes):
        from compressors.kernels import fourbit

        width = rows.shape[1]
        code = self._scratch.get("codes", (width + width % 2,), torch.uint8, rows.device)
        bounds, order = self._kernel_bounds, self._order.numpy()
        fourbit.encode_mx(rows.numpy(), BLOCK, bounds, order, exponents.numpy(), codes.numpy(), code.numpy())

    def decode_cpu(self, rows, limit, exponents, codes):
        from compressors.kernels import fourbit

        scale, table = _scale(exponents).numpy(), self._values.numpy()
        fourbit.decode(codes.numpy(), BLOCK, table, scale, limit, rows.numpy())


def _scale(exponents: torch.Tensor) -> torch.Tensor:
    """Float32 value of E8M0 exponents: 2^(e - 127), a subnormal float for 0 and NaN for 255."""
    scale = (exponents.int() << 23).view(torch.float32)
    return scale.masked_fill_(exponents == 0, 2.0**-127).masked_fill_(exponents == E8M0_NAN, torch.nan)


def _bounds_with_ties_to_even(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 15 midpoints of the sorted table and the code of each rank, for a search by `value > bound`.

    That search leaves a tie with the lower neighbour, so a bound whose upper neighbour has the even code
    moves down by one float. It moves the bound between -0 and +0 as well: zero is written as +0.
    """
    order = torch.tensor([*range(15, 7, -1), *range(8)], dtype=torch.uint8)
    ranked = values[order.int()]
    bounds = (ranked[:-1] + ranked[1:]) / 2
    lowered = torch.nextafter(bounds, torch.tensor(-math.inf))
    return torch.where(order[1:] % 2 == 0, lowered, bounds), order
