"""none, fp16, bf16: hidden states cast to another float type, no side information.

`none` sends the bytes of the link's own dtype and is lossless. `fp16` and `bf16` round to nearest, ties to
even; finite values beyond fp16's range saturate at +-65504 (torch's cast would make them infinite), and bf16
saturates likewise at its own largest value. NaN and infinities keep their place and decode to themselves.

Payload: the values in row-major order, little-endian.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compressors.base import Compressor, LinkInfo, Payload
from compressors.bitpack import sections_nbytes, split_bytes
from compressors.options import check_choice
from compressors.rows import Scratch
from compressors.saturation import saturating_cast, saturating_copy_

__all__ = ["Cast", "Identity"]

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Identity(Compressor):
    """`none`: the raw bytes, in the link's dtype or, without a link, float32."""

    name = "none"
    frame_invariant = True
    fixed_size = True

    @property
    def _dtype(self) -> torch.dtype:
        return self.link.dtype if self.link else torch.float32

    def max_nbytes(self, shape: Sequence[int]) -> int:
        return sections_nbytes((self._dtype, shape))

    def compress(self, x: torch.Tensor, **side: Any) -> Payload:
        if x.dtype != self._dtype:
            raise ValueError(
                f"compressor 'none' sends {self._dtype} here, got hidden states in {x.dtype}; "
                "make the codec with a LinkInfo of their dtype"
            )
        return Payload(x.detach().contiguous().reshape(-1).view(torch.uint8), tuple(x.shape))

    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype, **side: Any) -> torch.Tensor:
        (x,) = split_bytes(self._data_without_meta(payload), (self._dtype, payload.shape))
        return saturating_cast(x.to(device, copy=True), dtype)


class Cast(Compressor):
    """`fp16` and `bf16`: every value in 16 bits."""

    frame_invariant = True
    fixed_size = True

    def __init__(self, *, to: str, link: LinkInfo | None = None) -> None:
        super().__init__(link=link)
        self.name = self.to = check_choice("cast", "to", to, _DTYPES)
        self._dtype = _DTYPES[to]
        self._scratch = Scratch()

    def max_nbytes(self, shape: Sequence[int]) -> int:
        return sections_nbytes((self._dtype, shape))

    @torch.no_grad()
    def compress(self, x: torch.Tensor, **side: Any) -> Payload:
        values = self._scratch.get("data", x.shape, self._dtype, x.device)
        saturating_copy_(values, x)
        return Payload(values.view(-1).view(torch.uint8), tuple(x.shape))

    @torch.no_grad()
    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype, **side: Any) -> torch.Tensor:
        (values,) = split_bytes(self._data_without_meta(payload).to(device), (self._dtype, payload.shape))
        decoded = saturating_cast(values, dtype)
        return decoded.clone() if decoded is values else decoded
