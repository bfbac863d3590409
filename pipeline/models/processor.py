"""What the processor at hand has."""

from __future__ import annotations

import platform

import torch

__all__ = ["has_fused_multiply_add"]


def has_fused_multiply_add() -> bool:
    """Whether it multiplies and adds in one instruction; on others compiled loops call a function for each number."""
    return platform.machine() not in ("x86_64", "AMD64") or torch.backends.cpu.get_cpu_capability() != "DEFAULT"
