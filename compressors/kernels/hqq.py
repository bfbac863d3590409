"""Kernels of compressors.scalar.hqq."""

from __future__ import annotations

import numpy as np

from compressors.kernels.bits import bits_of_float, clamp, float_of_bits, jit
from compressors.kernels.hqq_constants import BETA, GROUP, ITERATIONS, PATIENCE, POWER, POWER_OFFSET

__all__ = ["decode", "refine"]

_POWER, _POWER_OFFSET, _INVERSE_BETA = np.float32(POWER), np.float32(POWER_OFFSET), np.float32(1 / BETA)
_ZERO = np.float32(0)


@jit
def _tree_sum(values):
    """Sum of 64 values, halves added to halves; spoils `values`."""
    half = values.size // 2
    while half > 0:
        low, high = values[:half], values[half : 2 * half]
        for j in range(half):
            low[j] += high[j]
        half //= 2
    return values[0]


@jit
def _quantise(values, inverse, zero, levels, q):
    for j in range(values.size):
        q[j] = min(max(np.rint(values[j] * inverse + zero), _ZERO), levels)


@jit
def _refined_zero(values, scale, zero, levels, q, terms):
    """The zero with the smallest mean error; q and terms float32 [64] are scratch."""
    inverse, best, smallest, failures = np.float32(1) / scale, zero, np.float32(np.inf), 0
    terms[:] = 0
    for _ in range(ITERATIONS + 1):
        _quantise(values, inverse, zero, levels, q)
        for j in range(values.size):
            terms[j] = abs(values[j] - (q[j] - zero) * scale)
        terms[values.size :] = 0
        error = _tree_sum(terms)
        if error < smallest:
            smallest, best, failures = error, zero, 0
        else:
            failures += 1
            if failures == PATIENCE:
                break
        for j in range(values.size):
            e = values[j] - (q[j] - zero) * scale
            power = _POWER * np.float32(np.int32(bits_of_float(abs(e)))) + _POWER_OFFSET
            kept = max(abs(e) - float_of_bits(np.uint32(np.int32(power))) * _INVERSE_BETA, _ZERO)
            kept = kept if e >= 0 else -kept
            terms[j] = q[j] - (values[j] - kept) * inverse
        terms[values.size :] = 0
        zero = _tree_sum(terms) / np.float32(values.size)
    return best


@jit
def refine(rows, levels, scale, zero, codes):
    """Refine `zero` float32 [N, groups] and write codes uint8 [N, H]; a NaN scale marks a lost group."""
    q, terms = np.empty(GROUP, np.float32), np.empty(GROUP, np.float32)
    levels = np.float32(levels)
    for i in range(rows.shape[0]):
        for g in range(scale.shape[1]):
            values = rows[i, g * GROUP : (g + 1) * GROUP]
            group_codes = codes[i, g * GROUP : g * GROUP + values.size]
            if np.isnan(scale[i, g]):
                group_codes[:] = 0
                continue
            zero[i, g] = _refined_zero(values, scale[i, g], zero[i, g], levels, q, terms)
            _quantise(values, np.float32(1) / scale[i, g], zero[i, g], levels, q)
            for j in range(values.size):
                group_codes[j] = np.uint8(np.int32(q[j]))


@jit
def decode(codes, scale, zero, limit, rows):
    """Codes uint8 [N, H] to float32 rows, clamped to +-limit; scale and zero are float32 [N, groups]."""
    in_range = True
    for i in range(rows.shape[0]):
        for g in range(scale.shape[1]):
            values, group_scale, group_zero = rows[i, g * GROUP : (g + 1) * GROUP], scale[i, g], zero[i, g]
            group_codes = codes[i, g * GROUP : g * GROUP + values.size]
            for j in range(values.size):
                values[j] = (np.float32(group_codes[j]) - group_zero) * group_scale
            in_range &= (np.float32(255) + abs(group_zero)) * abs(group_scale) <= limit
    if not in_range:
        clamp(rows, limit)
