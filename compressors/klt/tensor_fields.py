"""How a dataclass of tensors says what its file must have: `calibration_file` checks it."""

from __future__ import annotations

import dataclasses

import torch

__all__ = ["tensor_field"]


def tensor_field(dtype: torch.dtype, *shape: str, mapped: bool = False) -> torch.Tensor:
    """A field with its dtype, the names of its sizes, which are equal where names are, and whether it stays mapped."""
    return dataclasses.field(metadata={"dtype": dtype, "shape": shape, "mapped": mapped})
