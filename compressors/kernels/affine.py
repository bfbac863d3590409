"""Kernels of compressors.scalar.affine (intN)."""

from __future__ import annotations

import numpy as np

from compressors.kernels.bits import (
    QUIET_NAN_BF16,
    bf16_of_float,
    bits_of_float,
    clamp,
    float_of_bf16,
    float_of_bits,
    jit,
    pack_row,
    unpack_row,
)

__all__ = ["decode", "encode"]

SMALLEST_NORMAL = np.float32(2.0**-126)
LOW_31_BITS = np.uint32(0x7FFFFFFF)


@jit
def _ordered(value):
    """An int32 that orders like the float32; a NaN lies beyond the infinities.

    Integer minima vectorise where float minima must keep the order of NaNs, and they do not lose a NaN.
    """
    bits = np.int32(bits_of_float(value))
    return bits ^ ((bits >> np.int32(31)) & np.int32(LOW_31_BITS))


@jit
def _float_of_ordered(ordered):
    return float_of_bits(np.uint32(ordered ^ ((ordered >> np.int32(31)) & np.int32(LOW_31_BITS))))


@jit
def encode(rows, nbits, scale, zero, packed, codes):
    """Rows float32 [N, H] to scale (bf16 bits), zero int16 [N], packed uint8 [N, P]; codes [H] is scratch."""
    q_min, q_max = np.float32(-(1 << (nbits - 1))), np.float32((1 << (nbits - 1)) - 1)
    levels = q_max - q_min
    for i in range(rows.shape[0]):
        row, row_codes = rows[i], (packed[i] if nbits == 8 else codes)
        lowest, highest = np.int32(0), np.int32(0)
        for j in range(row.size):
            key = _ordered(row[j])
            lowest, highest = min(lowest, key), max(highest, key)
        lo, hi = _float_of_ordered(lowest), _float_of_ordered(highest)
        row_scale = (hi - lo) / levels
        if np.isinf(hi - lo):
            row_scale = hi / levels - lo / levels
        if not np.isfinite(row_scale):
            scale[i], zero[i] = QUIET_NAN_BF16, 0
            row_codes[:] = 0
        else:
            row_scale = max(row_scale, SMALLEST_NORMAL)
            row_zero = min(max(q_min - np.rint(lo / row_scale), q_min), q_max)
            scale[i], zero[i] = bf16_of_float(row_scale), np.int16(row_zero)
            inverse = np.float32(1.0) / float_of_bf16(scale[i])
            for j in range(row.size):
                q = np.rint(row[j] * inverse) + row_zero
                q = min(max(q, q_min), q_max) - q_min
                row_codes[j] = np.uint8(np.int32(q))
        if nbits < 8:
            pack_row(codes, nbits, packed[i])


@jit
def decode(packed, nbits, scale, zero, limit, rows, codes):
    """Inverse of `encode`; values are clamped to +-limit, NaN stays."""
    levels, q_min, in_range = np.float32((1 << nbits) - 1), np.float32(-(1 << (nbits - 1))), True
    for i in range(rows.shape[0]):
        row, row_codes = rows[i], (packed[i] if nbits == 8 else codes)
        if nbits < 8:
            unpack_row(packed[i], nbits, codes)
        row_scale, offset = float_of_bf16(scale[i]), np.float32(zero[i]) - q_min
        for j in range(row.size):
            row[j] = (np.float32(row_codes[j]) - offset) * row_scale
        in_range &= max(abs(offset), abs(levels - offset)) * abs(row_scale) <= limit
    if not in_range:
        clamp(rows, limit)
