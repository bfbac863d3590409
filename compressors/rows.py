"""RowCodec: the frame of every codec that encodes tokens one by one, with a size that follows from the shape.

It turns hidden states [B, T, H] into float32 rows [N, H], N = B * T, and hands a subclass typed views of one
byte buffer to fill or to read; lengths, scratch memory, dtypes and devices are settled here. On the CPU
`encode_cpu` and `decode_cpu` run (compiled loops where a codec has them), elsewhere `encode` and `decode`
(torch operations without host synchronisation); both write the same bytes and the same floats, which the
tests hold.

Rules that all row codecs share:

* A NaN or an infinity makes every value that shares its scale (a token, or a block of it) decode to NaN: a
  fault upstream stays visible and does not spread to other tokens.
* Finite input decodes to finite output: what rounding pushes beyond the largest float of the target dtype is
  clamped to it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from compressors.base import Compressor, LinkInfo, Payload
from compressors.bitpack import Section, sections_nbytes, split_bytes

__all__ = ["RowCodec", "Scratch", "divide"]


def divide(x: torch.Tensor, divisor: float) -> torch.Tensor:
    """`x / divisor`, rounded once on every device.

    Torch on CUDA multiplies by the rounded reciprocal when the divisor is a Python number or lies on the CPU, which
    moves half of the quotients by a bit. Powers of two need no such care.
    """
    return x / x.new_full((), divisor)


class Scratch:
    """Named buffers that grow and are reused from call to call; fresh memory costs page faults on a CPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised tensor of `shape`, valid until the next call with the same name."""
        key, numel = (name, dtype, torch.device(device)), math.prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < numel:
            with torch.inference_mode(False):  # else it could not be written to outside inference mode
                buffer = self._buffers[key] = torch.empty(numel, dtype=dtype, device=device)
        return buffer[:numel].view(*shape)

    def constant(
        self, name: str, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """`tensor` on `device`, and in `dtype`, copied once: a copy to an accelerator makes the host wait."""
        dtype = dtype or tensor.dtype
        if tensor.device == torch.device(device) and tensor.dtype == dtype:
            return tensor
        key = (name, dtype, torch.device(device))
        if key not in self._buffers:
            self._buffers[key] = tensor.to(device).to(dtype)
        return self._buffers[key]


class RowCodec(Compressor):
    """A subclass says which `sections` its bytes have and how to `encode` and `decode` rows."""

    fixed_size = True

    def __init__(self, *, link: LinkInfo | None = None) -> None:
        super().__init__(link=link)
        self._scratch = Scratch()

    def row_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """(N, H) of hidden states of `shape` [..., H]: N rows that are encoded independently."""
        return math.prod(shape[:-1]), int(shape[-1])

    @abstractmethod
    def sections(self, num_rows: int, width: int) -> list[Section]:
        """(dtype, shape) of the parts of the payload in their order, by falling element size."""

    @abstractmethod
    def encode(self, rows: torch.Tensor, *sections: torch.Tensor) -> None:
        """Fill `sections` from float32 `rows` [N, H], which may be the input; any device."""

    @abstractmethod
    def decode(self, rows: torch.Tensor, limit: float, *sections: torch.Tensor) -> None:
        """Fill float32 `rows` [N, H] from `sections`, clamped to +-`limit` (NaN stays NaN)."""

    def encode_cpu(self, rows: torch.Tensor, *sections: torch.Tensor) -> None:
        """`encode` for the CPU, the same bytes."""
        self.encode(rows, *sections)

    def decode_cpu(self, rows: torch.Tensor, limit: float, *sections: torch.Tensor) -> None:
        """`decode` for the CPU, the same floats."""
        self.decode(rows, limit, *sections)

    def max_nbytes(self, shape: Sequence[int]) -> int:
        return sections_nbytes(*self.sections(*self.row_shape(shape)))

    def compress(self, x: torch.Tensor, **side: Any) -> Payload:
        shape = self.row_shape(x.shape)
        rows = x.detach().reshape(shape)
        if rows.dtype != torch.float32 or not rows.is_contiguous():
            rows = self._scratch.get("rows", shape, torch.float32, x.device).copy_(rows)
        sections = self.sections(*shape)
        data = self._scratch.get("data", (sections_nbytes(*sections),), torch.uint8, x.device)
        encode = self.encode_cpu if x.device.type == "cpu" else self.encode
        encode(rows, *split_bytes(data, *sections))
        return Payload(data, tuple(x.shape))

    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype, **side: Any) -> torch.Tensor:
        shape, device = self.row_shape(payload.shape), torch.device(device)
        sections = split_bytes(self._data_without_meta(payload).to(device), *self.sections(*shape))
        x = torch.empty(payload.shape, dtype=dtype, device=device)
        if dtype == torch.float32:
            rows = x.view(shape)
        else:
            rows = self._scratch.get("decoded", shape, torch.float32, device)
        decode = self.decode_cpu if device.type == "cpu" else self.decode
        decode(rows, min(torch.finfo(dtype).max, torch.finfo(torch.float32).max), *sections)
        return x if dtype == torch.float32 else x.copy_(rows.view(payload.shape))
