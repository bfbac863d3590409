"""Kernels of the codecs with 4-bit codes from a table: compressors.fourbit, compressors.mxfp4."""

from __future__ import annotations

import numpy as np

from compressors.kernels.bits import INFINITY_BITS, absmax_bits, clamp_row, float_of_bits, jit

__all__ = ["decode", "encode", "encode_mx"]

SMALLEST_ABSMAX = np.float32(1e-38)
E8M0_NAN = np.uint8(255)


@jit
def _ranks(values, inverse, bounds, ranks):
    """How many of the 15 ascending `bounds` lie below values * inverse, by a search without branches.

    Each step picks the next bound with selects, so that the loop vectorises.
    """
    b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14 = bounds
    for j in range(values.size):
        v = values[j] * inverse
        bit3 = v > b7
        bit2 = v > (b11 if bit3 else b3)
        bit1 = v > ((b13 if bit2 else b9) if bit3 else (b5 if bit2 else b1))
        high = (b14 if bit1 else b12) if bit2 else (b10 if bit1 else b8)
        low = (b6 if bit1 else b4) if bit2 else (b2 if bit1 else b0)
        bit0 = v > (high if bit3 else low)
        ranks[j] = np.uint8(8 * bit3 + 4 * bit2 + 2 * bit1 + bit0)


@jit
def _pack_pairs(codes, packed):
    for j in range(packed.size):
        packed[j] = (codes[2 * j] << 4) | codes[2 * j + 1]


@jit
def _reorder(codes, order):
    for j in range(codes.size):
        codes[j] = order[codes[j]]


@jit
def encode(rows, block, bounds, order, absmax, packed, codes):
    """Rows float32 [N, H] to absmax float32 [N, blocks] and packed codes uint8 [N, ceil(H / 2)].

    `bounds` are the 15 midpoints of the sorted table, `order` [16] the code of each rank; `codes` uint8
    [H, rounded up to even] is scratch.
    """
    in_order = True
    for rank in range(16):
        in_order &= order[rank] == rank
    codes[-1] = 0
    for i in range(rows.shape[0]):
        for b in range(absmax.shape[1]):
            values = rows[i, b * block : (b + 1) * block]
            ranks = codes[b * block : b * block + values.size]
            largest = absmax_bits(values)
            if largest >= INFINITY_BITS:
                absmax[i, b] = np.float32(np.nan)
                ranks[:] = 0
                continue
            absmax[i, b] = float_of_bits(largest)
            _ranks(values, np.float32(1) / max(absmax[i, b], SMALLEST_ABSMAX), bounds, ranks)
            if not in_order:
                _reorder(ranks, order)
        _pack_pairs(codes, packed[i])


@jit
def encode_mx(rows, block, bounds, order, exponents, packed, codes):
    """`encode` with a power of two as scale: `exponents` uint8 [N, blocks] are E8M0, 255 for NaN."""
    codes[-1] = 0
    for i in range(rows.shape[0]):
        for b in range(exponents.shape[1]):
            values = rows[i, b * block : (b + 1) * block]
            ranks = codes[b * block : b * block + values.size]
            largest = absmax_bits(values)
            if largest >= INFINITY_BITS:
                exponents[i, b] = E8M0_NAN
                ranks[:] = 0
                continue
            exponent = max(np.int32(largest >> np.uint32(23)) - np.int32(2), np.int32(0))
            exponents[i, b] = np.uint8(exponent)
            _ranks(values, float_of_bits(np.uint32((254 - exponent) << 23)), bounds, ranks)
            _reorder(ranks, order)
        _pack_pairs(codes, packed[i])


@jit
def _look_up(pairs, value_pairs, row):
    for j in range(pairs.size):
        pair = 2 * np.intp(pairs[j])
        row[2 * j] = value_pairs[pair]
        row[2 * j + 1] = value_pairs[pair + 1]


@jit
def decode(packed, block, value_pairs, scale, limit, rows):
    """Packed codes to float32 rows, clamped to +-limit, NaN stays.

    `value_pairs` [512] holds the two table values of every byte, `scale` is float32 [N, blocks]. Look-up and
    scaling are loops of their own, since only the second vectorises.
    """
    limit, largest = np.float32(limit), np.max(np.abs(value_pairs))
    for i in range(rows.shape[0]):
        row, pairs, in_range = rows[i], packed[i], True
        _look_up(pairs[: row.size // 2], value_pairs, row)
        if row.size % 2:
            row[-1] = value_pairs[2 * np.intp(pairs[-1])]
        for b in range(scale.shape[1]):
            values, block_scale = row[b * block : (b + 1) * block], scale[i, b]
            in_range &= largest * abs(block_scale) <= limit
            for j in range(values.size):
                values[j] *= block_scale
        if not in_range:
            clamp_row(row, limit)
