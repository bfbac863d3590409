"""Kernels of compressors.scalar.fp8.

Encoding rounds in integer arithmetic. A float32 with m of its 23 mantissa bits kept is rounded to nearest
even by adding half of the last kept place, less one, plus the last kept bit. Values below the smallest normal
float8 are rounded by adding a float whose last place is the float8's smallest step.
"""

from __future__ import annotations

import numpy as np

from compressors.kernels.bits import INFINITY_BITS, absmax_bits, bits_of_float, clamp, float_of_bits, jit

__all__ = ["decode", "encode_e4m3", "encode_e5m2"]


@jit
def _float8(value, mantissa, bias):
    """Bits of a finite float32, in range, as float8 with `mantissa` bits and exponent `bias`."""
    bits = bits_of_float(value)
    sign = (bits >> np.uint32(24)) & np.uint32(0x80)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    drop = np.uint32(23 - mantissa)
    rounded = (
        magnitude + ((np.uint32(1) << (drop - np.uint32(1))) - np.uint32(1)) + ((magnitude >> drop) & np.uint32(1))
    )
    normal = (rounded >> drop) - np.uint32((127 - bias) << mantissa)
    step_bits = np.uint32((127 + 23 + 1 - bias - mantissa) << 23)
    subnormal = bits_of_float(float_of_bits(magnitude) + float_of_bits(step_bits)) - step_bits
    is_subnormal = magnitude < np.uint32((127 + 1 - bias) << 23)
    return np.uint8((subnormal if is_subnormal else normal) | sign)


@jit
def _encode(rows, mantissa, bias, largest, scale, codes):
    for i in range(rows.shape[0]):
        row, row_codes = rows[i], codes[i]
        absmax = absmax_bits(row)
        if absmax >= INFINITY_BITS:
            scale[i] = np.float32(np.nan)
            row_codes[:] = 0
            continue
        row_scale = float_of_bits(absmax) / largest
        if row_scale == 0:
            row_scale = np.float32(1)
        scale[i] = row_scale
        for j in range(row.size):
            value = min(max(row[j] / row_scale, -largest), largest)
            row_codes[j] = _float8(value, mantissa, bias)


@jit
def encode_e4m3(rows, scale, codes):
    """Rows float32 [N, H] to scale float32 [N] and codes uint8 [N, H]."""
    _encode(rows, 3, 7, np.float32(448), scale, codes)


@jit
def encode_e5m2(rows, scale, codes):
    """Rows float32 [N, H] to scale float32 [N] and codes uint8 [N, H]."""
    _encode(rows, 2, 15, np.float32(57344), scale, codes)


@jit
def decode(codes, scale, values, limit, rows):
    """Codes to float32 rows through the table `values` [256]; clamped to +-limit, NaN stays."""
    largest, in_range = np.max(values[np.isfinite(values)]), True
    for i in range(rows.shape[0]):
        row, row_codes, row_scale = rows[i], codes[i], scale[i]
        for j in range(row.size):
            row[j] = values[row_codes[j]] * row_scale
        in_range &= largest * abs(row_scale) <= limit
    if not in_range:
        clamp(rows, limit)
