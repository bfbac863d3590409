"""Kernels of compressors.klt.transform: matrix products and the transforms of tokens.

What a token becomes does not depend on the others of its frame, to the last bit. Every sum runs in one order, element
by element, however many tokens there are; a matrix product has its columns side by side in a vector, never its sum, and
adds each product in one fused operation wherever it runs.
Powers of two come from a table, since a library's vectors and scalars may differ.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from compressors.kernels.bits import float_of_bf16, fused_multiply_add, inlined, jit, prefetch

__all__ = ["TransformTables", "analyse", "multiply_rows", "steps", "synthesise"]

# A tile's sums and a row of the panel fill the registers: 32 of 16 floats, or 16 of 8.
_HAS_AVX512 = "+avx512f" in (numba.config.CPU_FEATURES or get_host_cpu_features())
LANES, VECTORS = (16, 4) if _HAS_AVX512 else (8, 2)
TILE_ROWS, TILE_COLUMNS = 6, LANES * VECTORS
PAGE_NBYTES = 4096
BLOCK_ROWS = 240  # rows that stay in the second-level cache while the panels of the matrix pass
_OCTAVE = np.array([2.0 ** (n / 8) for n in range(8)])


class TransformTables(NamedTuple):
    """What both ends of a link know."""

    mean: np.ndarray  # float32 [H]
    encode: np.ndarray  # uint16 [H, H], bf16
    decode: np.ndarray  # uint16 [H, H], bf16
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


@intrinsic
def _multiply_tile(typing_context, rows, panel, product):
    """product [TILE_ROWS, TILE_COLUMNS] = rows [TILE_ROWS, K] @ panel [K, TILE_COLUMNS], all float32.

    The tile's sums stay in vector registers, which no loop in Python can ask for.
    """

    def codegen(context, builder, signature, args):
        rows, panel, product = (
            context.make_array(kind)(context, builder, value) for kind, value in zip(signature.args, args, strict=True)
        )
        vector = ir.VectorType(ir.FloatType(), LANES)
        zeros, undefined = ir.Constant(vector, None), ir.Constant(vector, ir.Undefined)
        first_lane = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
        fma_type = ir.FunctionType(vector, [vector] * 3)
        fma = cgutils.get_or_insert_function(builder.module, fma_type, f"llvm.fma.v{LANES}f32")

        def pointer(array, i, j, kind):
            """To element [i, j]; those of a row lie side by side."""
            row = cgutils.pointer_add(builder, array.data, builder.mul(i, builder.extract_value(array.strides, 0)))
            element = builder.gep(builder.bitcast(row, ir.FloatType().as_pointer()), [j])
            return builder.bitcast(element, kind.as_pointer())

        def number(n):
            return context.get_constant(types.intp, n)

        sums = [[cgutils.alloca_once_value(builder, zeros) for _ in range(VECTORS)] for _ in range(TILE_ROWS)]
        for total in itertools.chain(*sums):
            builder.store(zeros, total)
        with cgutils.for_range(builder, cgutils.unpack_tuple(builder, rows.shape)[1]) as loop:
            k = loop.index
            factors = [builder.load(pointer(panel, k, number(LANES * v), vector), align=4) for v in range(VECTORS)]
            for i, totals in enumerate(sums):
                value = builder.load(pointer(rows, number(i), k, ir.FloatType()))
                lane = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
                values = builder.shuffle_vector(lane, undefined, first_lane)
                for factor, total in zip(factors, totals, strict=True):
                    builder.store(builder.call(fma, [values, factor, builder.load(total)]), total)
        for i, totals in enumerate(sums):
            for v, total in enumerate(totals):
                builder.store(builder.load(total), pointer(product, number(i), number(LANES * v), vector), align=4)
        return context.get_dummy_value()

    return types.none(rows, panel, product), codegen


@jit
def _widen(source, target):
    for j in range(target.size):
        target[j] = float_of_bf16(source[j])


@jit
def _multiply_by_tiles(rows, matrix, product):
    """For at least TILE_ROWS rows and TILE_COLUMNS columns. The last tiles overlap those before them."""
    num_rows, length = rows.shape
    width = matrix.shape[1]
    room = np.empty(length * TILE_COLUMNS + 16, np.float32)
    start = (-room.ctypes.data % 64) // 4  # vectors that cross cache lines take twice as long
    panel = room[start : start + length * TILE_COLUMNS].reshape(length, TILE_COLUMNS)
    for first in range(0, num_rows, BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, num_rows)
        for column in range(0, width, TILE_COLUMNS):
            begin = min(column, width - TILE_COLUMNS)
            end = begin + TILE_COLUMNS
            for k in range(length):
                _widen(matrix[k, begin:end], panel[k])
            for row in range(first, last, TILE_ROWS):
                i = min(row, num_rows - TILE_ROWS)
                _multiply_tile(rows[i : i + TILE_ROWS], panel, product[i : i + TILE_ROWS, begin:end])


@jit
def _add_products(values, matrix, sums):
    """sums [M] += values [8] @ matrix [8, M], one product after the other."""
    v0, v1, v2, v3 = values[0], values[1], values[2], values[3]
    v4, v5, v6, v7 = values[4], values[5], values[6], values[7]
    m0, m1, m2, m3 = matrix[0], matrix[1], matrix[2], matrix[3]
    m4, m5, m6, m7 = matrix[4], matrix[5], matrix[6], matrix[7]
    for j in range(sums.size):
        total = fused_multiply_add(v0, float_of_bf16(m0[j]), sums[j])
        total = fused_multiply_add(v1, float_of_bf16(m1[j]), total)
        total = fused_multiply_add(v2, float_of_bf16(m2[j]), total)
        total = fused_multiply_add(v3, float_of_bf16(m3[j]), total)
        total = fused_multiply_add(v4, float_of_bf16(m4[j]), total)
        total = fused_multiply_add(v5, float_of_bf16(m5[j]), total)
        total = fused_multiply_add(v6, float_of_bf16(m6[j]), total)
        sums[j] = fused_multiply_add(v7, float_of_bf16(m7[j]), total)


@jit
def _add_product(value, matrix_row, sums):
    for j in range(sums.size):
        sums[j] = fused_multiply_add(value, float_of_bf16(matrix_row[j]), sums[j])


@jit
def _multiply_by_rows(rows, matrix, product):
    """For few rows: the matrix is read from memory once."""
    num_rows, length = rows.shape
    whole, row_nbytes = length - length % 8, 2 * matrix.shape[1]
    product[:] = 0
    for k in range(0, whole, 8):
        if row_nbytes < PAGE_NBYTES:  # too short a run for a processor to foresee the next
            for offset in range((k + 8) * row_nbytes, (k + 16) * row_nbytes, 64):
                prefetch(matrix, offset)
        for i in range(num_rows):
            _add_products(rows[i, k : k + 8], matrix[k : k + 8], product[i])
    for k in range(whole, length):
        for i in range(num_rows):
            _add_product(rows[i, k], matrix[k], product[i])


@jit
def multiply_rows(rows, matrix, product):
    """product float32 [N, M] = rows float32 [N, K] @ matrix [K, M], bf16 as uint16.

    Each element is the sum of its products from the first to the last, every one added with one rounding.
    """
    if rows.shape[0] < TILE_ROWS or matrix.shape[1] < TILE_COLUMNS:
        _multiply_by_rows(rows, matrix, product)
    else:
        _multiply_by_tiles(rows, matrix, product)


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
