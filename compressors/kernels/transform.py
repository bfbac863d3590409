"""Kernels of compressors.klt.transform.TokenTransform: the transforms of single tokens.

What a token becomes does not depend on the others of its frame, to the last bit. Every sum runs in one order, element
by element, however many tokens there are; a matrix product has its columns side by side in a vector, never its sum.
Powers of two come from a table, since a library's vectors and scalars may differ.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from compressors.kernels.bits import inlined, jit

__all__ = ["TransformTables", "analyse", "multiply_rows", "steps", "synthesise"]

# A tile of the product stays in the second-level cache, 8 rows of the matrix in the first.
TILE_ROWS, TILE_COLUMNS = 64, 1024
_OCTAVE = np.array([2.0 ** (n / 8) for n in range(8)])


class TransformTables(NamedTuple):
    """What both ends of a link know."""

    mean: np.ndarray  # float32 [H]
    encode: np.ndarray  # float32 [H, H]
    decode: np.ndarray  # float32 [H, H]
    median_eighths: int  # 8 log2 of the median of u, the tokens' root mean square
    raw_eighths: int  # a token whose u lies so far from the median, or further, is raw
    # Quarter octaves by which a step is finer: components @ weights + constant + per_octave log2 u, in a range.
    finer_weights: np.ndarray  # float32 [H]
    finer_constant: float
    finer_per_octave: float
    finer_range: tuple[int, int]


@inlined
def _power(eighths):
    """2 ** (eighths / 8) as float32, of an integer."""
    return np.float32(math.ldexp(_OCTAVE[eighths & 7], eighths >> 3))


@jit
def _add_products(values, matrix, begin, end, sums):
    """sums [n] += values [8] @ matrix [8, begin : end], one product after the other."""
    v0, v1, v2, v3 = values[0], values[1], values[2], values[3]
    v4, v5, v6, v7 = values[4], values[5], values[6], values[7]
    m0, m1, m2, m3 = matrix[0, begin:end], matrix[1, begin:end], matrix[2, begin:end], matrix[3, begin:end]
    m4, m5, m6, m7 = matrix[4, begin:end], matrix[5, begin:end], matrix[6, begin:end], matrix[7, begin:end]
    for j in range(sums.size):
        first = (((sums[j] + v0 * m0[j]) + v1 * m1[j]) + v2 * m2[j]) + v3 * m3[j]
        sums[j] = (((first + v4 * m4[j]) + v5 * m5[j]) + v6 * m6[j]) + v7 * m7[j]


@jit
def _add_product(value, matrix_row, sums):
    for j in range(sums.size):
        sums[j] += value * matrix_row[j]


@jit
def multiply_rows(rows, matrix, product):
    """product [N, M] = rows [N, K] @ matrix [K, M], all float32. The matrix is read once for every TILE_ROWS rows."""
    num_rows, length = rows.shape
    width, whole = matrix.shape[1], length - length % 8
    product[:] = 0
    for first in range(0, num_rows, TILE_ROWS):
        last = min(first + TILE_ROWS, num_rows)
        for begin in range(0, width, TILE_COLUMNS):
            end = min(begin + TILE_COLUMNS, width)
            for k in range(0, whole, 8):
                for i in range(first, last):
                    _add_products(rows[i, k : k + 8], matrix[k : k + 8], begin, end, product[i, begin:end])
            for k in range(whole, length):
                for i in range(first, last):
                    _add_product(rows[i, k], matrix[k, begin:end], product[i, begin:end])


@jit
def analyse(rows, tables, centred, y, rms, finer, is_raw):
    """Tokens float32 [N, H] to components y [N, H], eighths of u less their median and quarter octaves by which the
    step is finer int32 [N].

    Marks in `is_raw` bool [N] the tokens whose u is too far from the median, or not finite; they are treated as zeros.
    `centred` [N, H] is scratch.
    """
    num_rows, width = rows.shape
    mean, median, weights = tables.mean, tables.median_eighths, tables.finer_weights
    least, most = tables.finer_range
    for i in range(num_rows):
        squares = 0.0
        for k in range(width):
            squares += np.float64(rows[i, k]) * np.float64(rows[i, k])
        distance = np.rint(4 * np.log2(squares / width)) - median
        is_raw[i] = not abs(distance) < tables.raw_eighths
        rms[i] = 0 if is_raw[i] else np.int32(distance)
        u = _power(rms[i] + median)
        for k in range(width):
            centred[i, k] = (np.float32(0) if is_raw[i] else rows[i, k] / u) - mean[k]
    multiply_rows(centred, tables.encode, y)
    for i in range(num_rows):
        total = tables.finer_constant + tables.finer_per_octave * (rms[i] + median) / 8
        for k in range(width):
            total += np.float64(y[i, k]) * np.float64(weights[k])
        finer[i] = np.int32(min(max(np.rint(total), least), most))


@jit
def steps(step, finer, token_steps):
    """Steps float32 [N] of tokens from their refinements int32 [N]."""
    for i in range(finer.size):
        token_steps[i] = np.float32(step) * _power(-2 * finer[i])


@jit
def synthesise(components, rms, tables, rows):
    """Inverse of `analyse`: components float32 [N, H] to tokens."""
    multiply_rows(components, tables.decode, rows)
    mean = tables.mean
    for i in range(rows.shape[0]):
        u = _power(rms[i] + tables.median_eighths)
        for k in range(rows.shape[1]):
            rows[i, k] = (rows[i, k] + mean[k]) * u
