"""zstd: lossless compression of the bytes of another codec.

The inner codec's bytes go through Zstandard (RFC 8878). `item_size` n > 1 first regroups them into n planes,
byte 0 of every n-byte item, then byte 1, ...: exponents of neighbouring floats are alike, their low mantissa
bits are noise (the shuffle filter of HDF5 and Blosc). Bytes that do not shrink are stored as they are, so
that a frame is at most one byte above the inner codec's. The size depends on the values: nothing is known of
it before compressing.

The work is done in host memory; on an accelerator the bytes are copied there, which waits for it.

Side information: one byte, 0 for stored bytes and 1 for a Zstandard frame. Payload: that byte, then the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import zstandard

from compressors.base import CorruptPayload, LinkInfo, Payload
from compressors.options import check_int
from compressors.wrapper import InnerSpec, Wrapper

__all__ = ["Zstd"]

STORED, COMPRESSED = 0, 1


class Zstd(Wrapper):
    """Zstandard at `level` over the bytes of `inner`."""

    name = "zstd"

    def __init__(
        self, *, inner: InnerSpec = "none", level: int = 3, item_size: int = 1, link: LinkInfo | None = None
    ) -> None:
        super().__init__(inner=inner, inner_link=link, link=link)
        self.level = check_int(self.name, "level", level, 1, 22)
        self.item_size = check_int(self.name, "item_size", item_size, 1, 8)
        self.fixed_size = False
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=False)
        self._decompressor = zstandard.ZstdDecompressor()

    def max_nbytes(self, shape: Sequence[int]) -> int:
        return 1 + self.inner.max_nbytes(shape)

    @torch.no_grad()
    def compress(self, x: torch.Tensor, **side: Any) -> Payload:
        inner = self.inner.compress(x, **side)
        raw = inner.data.cpu().numpy()
        packed = np.frombuffer(self._compressor.compress(_shuffle(raw, self.item_size).data), np.uint8)
        flag, body = (COMPRESSED, packed) if packed.size < raw.size else (STORED, raw)
        data = self._scratch.get("data", (1 + body.size,), torch.uint8, torch.device("cpu"))
        data[0] = flag
        data.numpy()[1:] = body
        return Payload(data.to(x.device), tuple(x.shape), inner.meta)

    @torch.no_grad()
    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype, **side: Any) -> torch.Tensor:
        data = payload.data.cpu().numpy()
        if data.size == 0:
            raise CorruptPayload("zstd payload is empty")
        flag, body = int(data[0]), data[1:]
        if flag not in (STORED, COMPRESSED):
            raise CorruptPayload(f"zstd payload starts with {flag}, allowed: {STORED}, {COMPRESSED}")
        if flag == COMPRESSED:
            body = _unshuffle(self._inflate(body, self.inner.max_nbytes(payload.shape)), self.item_size)
        inner = Payload(torch.from_numpy(body), payload.shape, payload.meta)
        return self.inner.decompress(inner, device, dtype, **side)

    def _inflate(self, frame: np.ndarray, max_nbytes: int) -> np.ndarray:
        """The content of one Zstandard frame; its length is checked before anything is allocated."""
        try:
            content_nbytes = zstandard.get_frame_parameters(frame.data).content_size
            if content_nbytes > max_nbytes:
                raise CorruptPayload(f"zstd frame holds {content_nbytes} bytes, at most {max_nbytes} are possible")
            content = self._decompressor.decompress(frame.data, allow_extra_data=False)
        except zstandard.ZstdError as e:
            raise CorruptPayload(f"zstd frame cannot be read: {e}") from e
        return np.frombuffer(bytearray(content), np.uint8)


def _shuffle(data: np.ndarray, item_size: int) -> np.ndarray:
    """Byte 0 of every item, then byte 1, ...; bytes after the last whole item stay at the end."""
    whole = data.size - data.size % item_size
    planes = data[:whole].reshape(-1, item_size).T.reshape(-1)
    return np.concatenate([planes, data[whole:]])


def _unshuffle(data: np.ndarray, item_size: int) -> np.ndarray:
    """Inverse of `_shuffle`."""
    whole = data.size - data.size % item_size
    items = data[:whole].reshape(item_size, -1).T.reshape(-1)
    return np.concatenate([items, data[whole:]])
