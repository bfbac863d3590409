"""fp8_e4m3, fp8_e5m2: 8-bit floats with one float32 scale a token.

    scale = max |x| / max_float8          (448 for e4m3, 57344 for e5m2; 1 where that is 0)
    code  = float8(clamp(x / scale, -max_float8, max_float8))          round to nearest, ties to even
    x'    = float(code) * scale

Source: torchao's float8 primitives (`_choose_scale_float8` and `_quantize_affine_float8` with a block of one
token), in float32 whatever the input's dtype; formats: Micikevicius et al. 2022, "FP8 formats for deep
learning". Departure: a row of zeros, where theirs divides by zero.

Side information: a float32 scale, 4 bytes a token. Payload: scale [N], code [N, H].
"""

from __future__ import annotations

import torch

from compressors.base import LinkInfo
from compressors.bitpack import Section
from compressors.options import check_choice
from compressors.rows import RowCodec, divide

__all__ = ["Fp8"]

_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Fp8(RowCodec):
    """8-bit floats; `variant` is "e4m3" (finite only, more precision) or "e5m2" (more range)."""

    frame_invariant = True

    def __init__(self, *, variant: str, link: LinkInfo | None = None) -> None:
        super().__init__(link=link)
        self.variant = check_choice("fp8", "variant", variant, _DTYPES)
        self.name = f"fp8_{variant}"
        self._dtype = _DTYPES[variant]
        self._max = torch.finfo(self._dtype).max
        self._values = torch.arange(256, dtype=torch.uint8).view(self._dtype).float()

    def sections(self, num_rows: int, width: int) -> list[Section]:
        return [(torch.float32, (num_rows,)), (torch.uint8, (num_rows, width))]

    def encode(self, rows, scale, codes):
        scale.copy_(divide(rows.abs().amax(1), self._max))
        lost = ~scale.isfinite()
        scale.masked_fill_(scale == 0, 1.0).masked_fill_(lost, torch.nan)
        scaled = (rows / scale[:, None]).clamp_(-self._max, self._max).masked_fill_(lost[:, None], 0)
        codes.copy_(scaled.to(self._dtype).view(torch.uint8))

    def decode(self, rows, limit, scale, codes):
        torch.mul(codes.view(self._dtype).float(), scale[:, None], out=rows).clamp_(-limit, limit)

    def encode_cpu(self, rows, scale, codes):
        from compressors.kernels import fp8

        kernel = fp8.encode_e4m3 if self.variant == "e4m3" else fp8.encode_e5m2
        kernel(rows.numpy(), scale.numpy(), codes.numpy())

    def decode_cpu(self, rows, limit, scale, codes):
        from compressors.kernels import fp8

        fp8.decode(codes.numpy(), scale.numpy(), self._values.numpy(), limit, rows.numpy())
