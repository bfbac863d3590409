"""intN, N = 2..8: asymmetric affine quantisation, one scale and zero point a token or a tensor.

With lo = min(x, 0), hi = max(x, 0) over the values that share a scale, q_min = -2^(N-1), q_max = 2^(N-1) - 1:

    scale = (hi - lo) / (q_max - q_min), at least the smallest normal float32
    zero  = clamp(q_min - round(lo / scale), q_min, q_max)
    scale = bf16(scale)
    q     = clamp(round(x * (1 / scale)) + zero, q_min, q_max)          round: ties to even
    x'    = (q - zero) * scale

Source: torchao's affine primitives (`choose_qparams_affine` with ASYMMETRIC mapping, scale in bfloat16 and
zero point in int16, then `quantize_affine` and `dequantize_affine`), in float32 whatever the input's dtype;
codes and floats are the same as theirs for finite input. Departure: a range whose width overflows float32 is
divided before it is subtracted, so that huge finite values keep a finite scale.

Side information: bf16 scale and int16 zero point, 4 bytes a token (or a tensor).

Payload: scale [N], zero [N], codes + 2^(N-1) packed row by row (`compressors.bitpack`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compressors.base import LinkInfo
from compressors.bitpack import Section, pack, packed_nbytes, unpack
from compressors.options import check_choice
from compressors.rows import RowCodec, divide

__all__ = ["IntN"]

SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal
QUIET_NAN_BF16 = 0x7FC0  # as bits: which NaN a cast writes depends on the device


class IntN(RowCodec):
    """Integers of `nbits` bits. `granularity="tensor"` shares one scale in a frame and is not causal."""

    def __init__(self, *, nbits: int, granularity: str = "token", link: LinkInfo | None = None) -> None:
        super().__init__(link=link)
        self.name = f"int{nbits}"
        self.nbits = check_choice(self.name, "nbits", nbits, range(2, 9))
        self.granularity = check_choice(self.name, "granularity", granularity, ("token", "tensor"))
        self.causal = self.frame_invariant = granularity == "token"
        self._q_min, self._q_max = -(2 ** (nbits - 1)), 2 ** (nbits - 1) - 1

    def row_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        num_tokens, width = super().row_shape(shape)
        if self.granularity == "token":
            return num_tokens, width
        return min(num_tokens, 1), num_tokens * width

    def sections(self, num_rows: int, width: int) -> list[Section]:
        codes = (num_rows, packed_nbytes(width, self.nbits))
        return [(torch.bfloat16, (num_rows,)), (torch.int16, (num_rows,)), (torch.uint8, codes)]

    def encode(self, rows, scale, zero, codes):
        if rows.numel() == 0:
            return
        lo, hi = rows.amin(1).clamp_(max=0), rows.amax(1).clamp_(min=0)
        levels = self._q_max - self._q_min
        width = hi - lo
        row_scale = torch.where(width.isinf(), divide(hi, levels) - divide(lo, levels), divide(width, levels))
        row_scale = row_scale.clamp_(min=SMALLEST_NORMAL)
        row_zero = (self._q_min - (lo / row_scale).round_()).clamp_(self._q_min, self._q_max)
        lost = ~row_scale.isfinite()
        scale.copy_(row_scale).view(torch.int16).masked_fill_(lost, QUIET_NAN_BF16)
        zero.copy_(row_zero.masked_fill_(lost, 0))
        q = (rows * (1.0 / scale.float())[:, None]).round_().add_(row_zero[:, None])
        q = q.clamp_(self._q_min, self._q_max).sub_(self._q_min).masked_fill_(lost[:, None], 0)
        codes.copy_(pack(q.to(torch.uint8), self.nbits))

    def decode(self, rows, limit, scale, zero, codes):
        q = unpack(codes, self.nbits, rows.shape[1]).to(torch.float32)
        offset = zero.float() - self._q_min
        torch.mul(q.sub_(offset[:, None]), scale.float()[:, None], out=rows).clamp_(-limit, limit)

    def encode_cpu(self, rows, scale, zero, codes):
        from compressors.kernels import affine

        scale_bits, row_codes = scale.view(torch.uint16), self._row_codes(rows)
        affine.encode(rows.numpy(), self.nbits, scale_bits.numpy(), zero.numpy(), codes.numpy(), row_codes.numpy())

    def decode_cpu(self, rows, limit, scale, zero, codes):
        from compressors.kernels import affine

        scale_bits, row_codes = scale.view(torch.uint16), self._row_codes(rows)
        affine.decode(
            codes.numpy(),
            self.nbits,
            scale_bits.numpy(),
            zero.numpy(),
            limit,
            rows.numpy(),
            row_codes.numpy(),
        )

    def _row_codes(self, rows: torch.Tensor) -> torch.Tensor:
        """Scratch for the unpacked codes of one row."""
        return self._scratch.get("codes", (rows.shape[1],), torch.uint8, rows.device)
