"""Kernels of compressors.wrappers.hadamard."""

from __future__ import annotations

import numpy as np

from compressors.kernels.bits import jit

__all__ = ["rotate", "rotate_back"]


@jit
def _first_three_stages(row):
    """Butterflies with strides 1, 2 and 4, where a loop over a stride would be too short to vectorise."""
    for i in range(0, row.size, 8):
        a0, a1, a2, a3 = row[i], row[i + 1], row[i + 2], row[i + 3]
        a4, a5, a6, a7 = row[i + 4], row[i + 5], row[i + 6], row[i + 7]
        b0, b1, b2, b3, b4, b5, b6, b7 = (
            a0 + a1,
            a0 - a1,
            a2 + a3,
            a2 - a3,
            a4 + a5,
            a4 - a5,
            a6 + a7,
            a6 - a7,
        )
        a0, a1, a2, a3, a4, a5, a6, a7 = (
            b0 + b2,
            b1 + b3,
            b0 - b2,
            b1 - b3,
            b4 + b6,
            b5 + b7,
            b4 - b6,
            b5 - b7,
        )
        row[i], row[i + 1], row[i + 2], row[i + 3] = a0 + a4, a1 + a5, a2 + a6, a3 + a7
        row[i + 4], row[i + 5], row[i + 6], row[i + 7] = a0 - a4, a1 - a5, a2 - a6, a3 - a7


@jit
def _walsh_hadamard(row, block):
    stride = 1
    if block >= 8:
        _first_three_stages(row)
        stride = 8
    while stride < block:
        for start in range(0, row.size, 2 * stride):
            low, high = row[start : start + stride], row[start + stride : start + 2 * stride]
            for j in range(stride):
                a, b = low[j], high[j]
                low[j], high[j] = a + b, a - b
        stride *= 2


@jit
def rotate(rows, block, factors, limit):
    """`compressors.wrappers.hadamard.rotate_by_torch` of float32 rows [N, H], in place."""
    limit = np.float32(limit)
    for i in range(rows.shape[0]):
        row = rows[i]
        for j in range(row.size):
            value = row[j]
            row[j] = (min(max(value, -limit), limit) + (value - value)) * factors[j]
        _walsh_hadamard(row, block)


@jit
def rotate_back(rows, block, factors):
    """`compressors.wrappers.hadamard.rotate_back_by_torch` of float32 rows [N, H], in place."""
    for i in range(rows.shape[0]):
        row = rows[i]
        _walsh_hadamard(row, block)
        for j in range(row.size):
            row[j] *= factors[j]
