"""nf4: 4-bit codes from a fixed table, blocks of 64 values within a token, one absmax a block.

    absmax = max |x|
    code   = number of midpoints of neighbouring table values that lie below x * (1 / max(absmax, 1e-38))
    x'     = table[code] * absmax

`nf4` is NormalFloat4: quantiles of the standard normal distribution, with an exact zero, scaled to [-1, 1]
(Dettmers et al. 2023, "QLoRA", section 3 and appendix E). Codes and absmax are those of bitsandbytes at widths
divisible by the block; at other widths the last block of each token is shorter, where theirs would run on into
the next token.

Side information: a float32 absmax, 4 bytes a block. Payload: absmax [N, blocks], codes [N, ceil(H / 2)] packed
row by row (`compressors.bitpack`; bitsandbytes interleaves neighbours instead).
"""

from __future__ import annotations

import torch

from compressors.base import LinkInfo
from compressors.bitpack import Section, pack, packed_nbytes, unpack
from compressors.options import check_choice
from compressors.rows import RowCodec

__all__ = ["FourBit"]

BLOCK = 64
SMALLEST_ABSMAX = 1e-38

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


class FourBit(RowCodec):
    """4-bit codes from `TABLES[table]`, one absmax for each 64 values of a token."""

    TABLES = {"nf4": NF4}

    def __init__(self, *, table: str, link: LinkInfo | None = None) -> None:
        super().__init__(link=link)
        self.name = self.table = check_choice("4-bit", "table", table, self.TABLES)
        self._values = torch.tensor(self.TABLES[table], dtype=torch.float32)
        self._order = torch.argsort(self._values, stable=True)
        ranked = self._values[self._order]
        self._bounds = (ranked[:-1] + ranked[1:]) / 2

    def sections(self, num_rows: int, width: int) -> list[Section]:
        codes = (num_rows, packed_nbytes(width, 4))
        return [(torch.float32, (num_rows, -(-width // BLOCK))), (torch.uint8, codes)]

    def encode(self, rows, absmax, codes):
        blocks = _blocks(rows)
        torch.amax(blocks.abs(), 2, out=absmax)
        lost = ~absmax.isfinite()
        scaled = blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX))[:, :, None]
        rank = torch.bucketize(scaled, self._bounds.to(rows.device))
        code = self._order.to(rows.device)[rank].masked_fill_(lost[:, :, None], 0)
        absmax.masked_fill_(lost, torch.nan)
        codes.copy_(pack(code.to(torch.uint8).flatten(1)[:, : rows.shape[1]], 4))

    def decode(self, rows, limit, absmax, codes):
        values = _blocks(self._values.to(rows.device)[unpack(codes, 4, rows.shape[1]).int()])
        rows.copy_((values * absmax[:, :, None]).flatten(1)[:, : rows.shape[1]]).clamp_(-limit, limit)

    def encode_cpu(self, rows, absmax, codes):
        from compressors.kernels import fourbit

        row_codes = self._scratch.get("codes", (rows.shape[1],), torch.uint8, rows.device)
        fourbit.encode(
            rows.numpy(),
            BLOCK,
            self._bounds.numpy(),
            self._order.numpy(),
            absmax.numpy(),
            codes.numpy(),
            row_codes.numpy(),
        )

    def decode_cpu(self, rows, limit, absmax, codes):
        from compressors.kernels import fourbit

        row_codes = self._scratch.get("codes", (rows.shape[1],), torch.uint8, rows.device)
        fourbit.decode(
            codes.numpy(), BLOCK, self._values.numpy(), absmax.numpy(), limit, rows.numpy(), row_codes.numpy()
        )


def _blocks(rows: torch.Tensor) -> torch.Tensor:
    """[N, H] as [N, blocks, 64], the last block of each row filled up with zeros."""
    num_rows, width = rows.shape
    num_blocks = -(-width // BLOCK)
    return torch.nn.functional.pad(rows, (0, num_blocks * BLOCK - width)).view(num_rows, num_blocks, BLOCK)
