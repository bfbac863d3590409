"""hadamard: rotate blocks of channels before another codec, so that no channel stands out.

    y = H_b (s * x) / sqrt(b) in blocks of b channels; x' = s * H_b y' / sqrt(b)

b is the largest power of two that divides the width (5120 = 5 x 1024, 576 = 9 x 64), H_b the Walsh-Hadamard
matrix in Sylvester's order, s fixed signs made from `seed`. The rotation is orthogonal: it spreads an outlier
over its block and adds no error of its own. At an odd width it only flips signs.

Source: Ashkboos et al. 2024, "QuaRot", section 3; Tseng et al. 2024, "QuIP#", section 3 (random signs).
Departure: they fold rotations into the weights; here both ends compute them.

The rotation runs in float32 with additions in a fixed order, so every device makes the same values. Values
beyond 1.7e38 / b are clamped to that first; a NaN or an infinity makes its block NaN.

Side information: none. Payload: the inner codec's, of the rotated float32 values.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from compressors.base import LinkInfo, Payload
from compressors.options import check_int
from compressors.saturation import saturating_cast
from compressors.wrapper import InnerSpec, Wrapper

__all__ = ["Hadamard", "rotate_back_by_torch", "rotate_by_torch", "rotation"]


class Hadamard(Wrapper):
    """A block rotation in front of `inner`; both ends need the same `seed`."""

    name = "hadamard"

    def __init__(self, *, inner: InnerSpec, seed: int = 0, link: LinkInfo | None = None) -> None:
        super().__init__(inner=inner, inner_link=link and dataclasses.replace(link, dtype=torch.float32), link=link)
        self.seed = check_int(self.name, "seed", seed, 0, 2**31 - 1)

    def max_nbytes(self, shape: Sequence[int]) -> int:
        return self.inner.max_nbytes(shape)

    @torch.no_grad()
    def compress(self, x: torch.Tensor, **side: Any) -> Payload:
        shape = (math.prod(x.shape[:-1]), x.shape[-1])
        rows = self._scratch.get("rotated", shape, torch.float32, x.device).copy_(x.reshape(shape))
        block, factors = rotation(self.seed, shape[1], x.device)
        limit = torch.finfo(torch.float32).max / (2 * block)
        if x.device.type == "cpu":
            from compressors.kernels import hadamard

            hadamard.rotate(rows.numpy(), block, factors.numpy(), limit)
        else:
            rows = rotate_by_torch(rows, block, factors, limit)
        return self.inner.compress(rows.view(x.shape), **side)

    @torch.no_grad()
    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype, **side: Any) -> torch.Tensor:
        shape = (math.prod(payload.shape[:-1]), payload.shape[-1])
        rows = self.inner.decompress(payload, device, torch.float32, **side).reshape(shape)
        block, factors = rotation(self.seed, shape[1], torch.device(device))
        if rows.device.type == "cpu":
            from compressors.kernels import hadamard

            hadamard.rotate_back(rows.numpy(), block, factors.numpy())
        else:
            rows = rotate_back_by_torch(rows, block, factors)
        return saturating_cast(rows.view(payload.shape), dtype)


def rotate_by_torch(rows: torch.Tensor, block: int, factors: torch.Tensor, limit: float) -> torch.Tensor:
    """H_b (factors * rows) for float32 rows [N, H] by torch operations, for any device.

    The compiled loops are held to it.
    """
    # the second term is 0, or NaN where clamping would hide an infinity
    return _walsh_hadamard((rows.clamp(-limit, limit) + (rows - rows)) * factors, block)


def rotate_back_by_torch(rows: torch.Tensor, block: int, factors: torch.Tensor) -> torch.Tensor:
    """The inverse of `rotate_by_torch` where nothing was clamped."""
    return _walsh_hadamard(rows, block) * factors


def _walsh_hadamard(rows: torch.Tensor, block: int) -> torch.Tensor:
    """H_b of every `block` of values, by butterflies of stride 1, 2, 4, ..."""
    num_rows, width = rows.shape
    stride = 1
    while stride < block:
        low, high = rows.view(num_rows, width // (2 * stride), 2, stride).unbind(2)
        rows = torch.stack([low + high, low - high], dim=2).view(num_rows, width)
        stride *= 2
    return rows


@functools.cache
def rotation(seed: int, width: int, device: torch.device) -> tuple[int, torch.Tensor]:
    """(b, signs / sqrt(b) float32 [width]); signs are the lowest bits of SplitMix64 (Steele et al. 2014)."""
    z = (np.arange(1, width + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    signs = 1.0 - 2.0 * ((z ^ (z >> np.uint64(31))) & np.uint64(1)).astype(np.float64)
    block = width & -width
    return block, torch.from_numpy((signs / math.sqrt(block)).astype(np.float32)).to(device)
