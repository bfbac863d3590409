"""topk: the values of largest magnitude of each token, by position; the others decode to 0.

Of a token's H values, k = max(1, round(density * H)) are kept; an inner codec carries them, in the order of
their channels, as hidden states [B, T, k]. Positions take the smaller of a bitmap (H bits) and packed indices
(ceil(log2 H) bits each: the low 8 as bytes, the rest by compressors.bitpack). A NaN counts as the largest
value.

Source: magnitude sparsification, as for gradients in Aji and Heafield 2017, "Sparse communication for
distributed gradient descent"; here for activations, token by token and without error feedback, which keeps it
causal.

Side information: the positions. Payload: positions, then the inner codec's bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from compressors.base import CorruptPayload, LinkInfo, Payload
from compressors.bitpack import Section, pack, packed_nbytes, sections_nbytes, unpack
from compressors.options import option_error
from compressors.wrapper import InnerSpec, Wrapper

__all__ = ["TopK"]


class TopK(Wrapper):
    """Keep the fraction `density` of each token's values; `inner` carries them."""

    name = "topk"

    def __init__(self, *, density: float = 0.1, inner: InnerSpec = "bf16", link: LinkInfo | None = None) -> None:
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
            raise option_error(self.name, "density", density, "a number above 0, at most 1")
        self.density = float(density)
        inner_link = link and dataclasses.replace(link, hidden_size=self._num_kept(link.hidden_size))
        super().__init__(inner=inner, inner_link=inner_link, link=link)

    def _num_kept(self, width: int) -> int:
        return max(1, round(self.density * width))

    def _sections(self, shape: Sequence[int]) -> list[Section]:
        """[bitmap], or [low bits of the indices] or [low bits, high bits], each a section [N, bytes]."""
        num_rows, width = math.prod(shape[:-1]), shape[-1]
        packed = [packed_nbytes(self._num_kept(width), nbits) for nbits in _index_bits(width)]
        bitmap = packed_nbytes(width, 1)
        return [(torch.uint8, (num_rows, n)) for n in ([bitmap] if bitmap <= sum(packed) else packed)]

    def _uses_bitmap(self, width: int) -> bool:
        return self._sections((1, width)) == [(torch.uint8, (1, packed_nbytes(width, 1)))]

    def max_nbytes(self, shape: Sequence[int]) -> int:
        inner_shape = (*shape[:-1], self._num_kept(shape[-1]))
        return sections_nbytes(*self._sections(shape)) + self.inner.max_nbytes(inner_shape)

    @torch.no_grad()
    def compress(self, x: torch.Tensor, **side: Any) -> Payload:
        width = x.shape[-1]
        num_kept = self._num_kept(width)
        rows = x.reshape(math.prod(x.shape[:-1]), width)
        indices = rows.float().abs().topk(num_kept, dim=1).indices.sort(dim=1).values
        values = rows.gather(1, indices).view(*x.shape[:-1], num_kept)
        payload, positions = self._join(x.shape, self.inner.compress(values, **side), self._sections(x.shape))
        if self._uses_bitmap(width):
            kept = torch.zeros(rows.shape, dtype=torch.uint8, device=x.device).scatter_(1, indices, 1)
            positions[0].copy_(pack(kept, 1))
        else:
            for part, section, nbits in zip((indices & 255, indices >> 8), positions, _index_bits(width), strict=False):
                section.copy_(pack(part.to(torch.uint8), nbits))
        return payload

    @torch.no_grad()
    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype, **side: Any) -> torch.Tensor:
        num_rows, width = math.prod(payload.shape[:-1]), payload.shape[-1]
        num_kept = self._num_kept(width)
        inner_shape = (*payload.shape[:-1], num_kept)
        inner, positions = self._part(payload, inner_shape, device, self._sections(payload.shape))
        values = self.inner.decompress(inner, device, dtype, **side).view(num_rows, num_kept)
        if self._uses_bitmap(width):
            kept = unpack(positions[0], 1, width)
            _check_on_host(kept.sum(1) == num_kept, f"a token's bitmap does not have {num_kept} bits")
            if kept.device.type == "cpu":  # every row has num_kept bits
                x = values.new_zeros(num_rows, width).masked_scatter_(kept.bool(), values)
            else:
                rank = kept.cumsum(1) - 1
                x = values.gather(1, rank.clamp_(0, num_kept - 1)).masked_fill_(kept == 0, 0)
        else:
            indices = values.new_zeros((), dtype=torch.int64)
            for i, (part, nbits) in enumerate(zip(positions, _index_bits(width), strict=True)):
                indices = indices + (unpack(part, nbits, num_kept).long() << 8 * i)
            _check_on_host(indices.diff(dim=1) > 0, "a token's indices are not ascending")
            _check_on_host(indices < width, f"an index is not below {width}")
            x = values.new_zeros(num_rows, width).scatter_(1, indices.clamp_(max=width - 1), values)
        return x.view(payload.shape)


def _index_bits(width: int) -> list[int]:
    """Bits of an index below `width`: [all] up to 8, else [8, rest]. Raises ValueError above 65536."""
    nbits = max((width - 1).bit_length(), 1)
    if nbits > 16:
        raise ValueError(f"compressor 'topk' takes hidden states of a width up to 65536, got {width}")
    return [nbits] if nbits <= 8 else [8, nbits - 8]


def _check_on_host(valid: torch.Tensor, message: str) -> None:
    """Raise CorruptPayload unless all of `valid`; nothing on a device, where a check would wait for it."""
    if valid.device.type == "cpu" and not bool(valid.all()):
        raise CorruptPayload(f"topk: {message}")
