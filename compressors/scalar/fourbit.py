"""nf4, fp4: 4-bit codes from a fixed table, blocks of 64 values within a token, one absmax a block.

    absmax = max |x|
    code   = the table's value nearest to x * (1 / max(absmax, 1e-38)), ties to the lower one
    x'     = table[code] * absmax

`nf4` is NormalFloat4, quantiles of the standard normal distribution with an exact zero (Dettmers et al. 2023,
"QLoRA", section 3 and appendix E); `fp4` has 1 sign, 2 exponent and 1 mantissa bits with bitsandbytes' bias,
scaled to [-1, 1]. Codes, their packing and absmax are those of bitsandbytes at widths divisible by 64; at
other widths the last block of a token is shorter, where theirs would run on into the next token.

Option `absmax`, the side information:
    fp32    4 bytes a block, as bitsandbytes.
    fp16    2 bytes a block; codes as above, an absmax above 65504 saturates.
    nested  QLoRA's double quantisation, 1 byte a block: offset = mean of the frame's absmax (float32), then
            absmax - offset in blocks of 256 (across tokens) with a float32 absmax of their own and the signed
            dynamic 8-bit code (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization"). The
            mean runs over the frame, so this is not causal, and a NaN spoils the whole frame.

Payload: fp32 or fp16 absmax [N, blocks], or nested offset [1], absmax of absmax [ceil(N * blocks / 256)] and
codes of absmax [N * blocks]; then codes [N, ceil(H / 2)], two in a byte.
"""

from __future__ import annotations

import functools

import torch

from compressors.base import LinkInfo
from compressors.bitpack import Section, pack_pairs, unpack_pairs
from compressors.options import check_choice
from compressors.rows import RowCodec

__all__ = ["FourBit", "blocks_of", "nearest_bounds"]

BLOCK = 64
NESTED_BLOCK = 256
SMALLEST_ABSMAX = 1e-38
QUIET_NAN_FP16 = 0x7E00

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)


_TABLES = {
    "nf4": torch.tensor(_NF4),
    "fp4": torch.tensor([*_FP4_MAGNITUDES, *(-m for m in _FP4_MAGNITUDES)]) / 12,
}


class FourBit(RowCodec):
    """4-bit codes from a table, one absmax for each 64 values of a token."""

    def __init__(self, *, table: str, absmax: str = "fp32", link: LinkInfo | None = None) -> None:
        super().__init__(link=link)
        self.name = self.table = check_choice("4-bit", "table", table, _TABLES)
        self.absmax = check_choice(self.name, "absmax", absmax, ("fp32", "fp16", "nested"))
        self.causal = self.frame_invariant = absmax != "nested"
        self._values = _TABLES[table]
        self._bounds, self._order = nearest_bounds(self._values)
        self._kernel_bounds = tuple(self._bounds.numpy())

    def sections(self, num_rows: int, width: int) -> list[Section]:
        num_blocks = -(-width // BLOCK)
        codes = (torch.uint8, (num_rows, -(-width // 2)))
        if self.absmax == "nested":
            total = num_rows * num_blocks
            nested = (torch.float32, (min(total, 1),)), (torch.float32, (-(-total // NESTED_BLOCK),))
            return [*nested, (torch.uint8, (total,)), codes]
        dtype = torch.float32 if self.absmax == "fp32" else torch.float16
        return [(dtype, (num_rows, num_blocks)), codes]

    def encode(self, rows, *sections):
        *stored, codes = sections
        blocks = blocks_of(rows, BLOCK)
        absmax = blocks.abs().amax(2)
        lost = ~absmax.isfinite()
        scaled = blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX))[:, :, None]
        rank = torch.bucketize(scaled, self._scratch.constant("bounds", self._bounds, rows.device))
        code = self._scratch.constant("order", self._order, rows.device)[rank]
        code.masked_fill_(lost[:, :, None], 0)
        codes.copy_(pack_pairs(code.flatten(1)[:, : rows.shape[1]]))
        self._store(absmax.masked_fill_(lost, torch.nan), *stored)

    def decode(self, rows, limit, *sections):
        *stored, codes = sections
        table = self._scratch.constant("values", self._values, rows.device)
        values = table[unpack_pairs(codes, rows.shape[1]).int()]
        values = blocks_of(values, BLOCK) * self._load(rows.shape, *stored)[:, :, None]
        rows.copy_(values.flatten(1)[:, : rows.shape[1]]).clamp_(-limit, limit)

    def encode_cpu(self, rows, *sections):
        from compressors.kernels import fourbit

        *stored, codes = sections
        num_rows, width = rows.shape
        absmax = self._scratch.get("absmax", (num_rows, -(-width // BLOCK)), torch.float32, rows.device)
        code = self._scratch.get("codes", (width + width % 2,), torch.uint8, rows.device)
        bounds, order = self._kernel_bounds, self._order.numpy()
        fourbit.encode(rows.numpy(), BLOCK, bounds, order, absmax.numpy(), codes.numpy(), code.numpy())
        self._store(absmax, *stored)

    def decode_cpu(self, rows, limit, *sections):
        from compressors.kernels import fourbit

        *stored, codes = sections
        absmax, table = self._load(rows.shape, *stored), self._values.numpy()
        fourbit.decode(codes.numpy(), BLOCK, table, absmax.numpy(), limit, rows.numpy())

    def _store(self, absmax: torch.Tensor, *stored: torch.Tensor) -> None:
        """Write float32 `absmax` [N, blocks] into the sections before the codes."""
        if self.absmax == "nested":
            _store_nested(absmax.flatten(), *stored)
        elif self.absmax == "fp16":
            saturated = absmax.clamp(max=torch.finfo(torch.float16).max)
            stored[0].copy_(saturated).view(torch.int16).masked_fill_(absmax.isnan(), QUIET_NAN_FP16)
        else:
            stored[0].copy_(absmax)

    def _load(self, shape: tuple[int, int], *stored: torch.Tensor) -> torch.Tensor:
        """Float32 absmax [N, blocks] of rows of `shape`."""
        if self.absmax != "nested":
            return stored[0].float()
        offset, nested_absmax, nested_codes = stored
        values = _dynamic_code(offset.device)[0][nested_codes.int()]
        scale = nested_absmax.repeat_interleave(NESTED_BLOCK)[: values.numel()]
        limit = torch.finfo(torch.float32).max
        return (values * scale + offset).clamp_(-limit, limit).view(shape[0], -1 if shape[0] else 0)


def _store_nested(absmax, offset, nested_absmax, nested_codes):
    """Double quantisation of `absmax` [n]. The mean is taken in float64, where it cannot overflow."""
    if absmax.numel() == 0:
        return
    offset.copy_(absmax.mean(dtype=torch.float64))
    blocks = blocks_of((absmax - offset)[None], NESTED_BLOCK)[0]
    torch.amax(blocks.abs(), 1, out=nested_absmax)
    scaled = blocks * (1.0 / nested_absmax.clamp(min=SMALLEST_ABSMAX))[:, None]
    rank = torch.bucketize(scaled, _dynamic_code(absmax.device)[1])
    nested_codes.copy_(rank.flatten()[: absmax.numel()])


@functools.cache
def _dynamic_code(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(the 256 values of the signed dynamic 8-bit code, ascending; their 255 midpoints).

    A zero-run of e bits gives the decade 10^-e, the remaining 6 - e bits divide it linearly.
    """
    magnitudes = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        magnitudes += ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
    values = torch.tensor(sorted([*magnitudes, *(-m for m in magnitudes), 0.0, 1.0]))
    return values.to(device), nearest_bounds(values)[0].to(device)


def nearest_bounds(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(midpoints of the sorted `values`, code of each rank as uint8): the bounds of nearest-value coding."""
    order = torch.argsort(values, stable=True)
    ranked = values[order]
    return (ranked[:-1] + ranked[1:]) / 2, order.to(torch.uint8)


def blocks_of(rows: torch.Tensor, block: int) -> torch.Tensor:
    """[N, H] as [N, blocks, block], the last block of each row filled up with zeros."""
    num_rows, width = rows.shape
    num_blocks = -(-width // block)
    return torch.nn.functional.pad(rows, (0, num_blocks * block - width)).view(num_rows, num_blocks, block)
