"""Kernels of compressors.fourbit (nf4)."""

from __future__ import annotations

import numpy as np

from compressors.kernels.bits import bits_of_float, float_of_bits, jit, pack_row, unpack_row

__all__ = ["decode", "encode"]

INFINITY_BITS = np.uint32(0x7F800000)
SMALLEST_ABSMAX = np.float32(1e-38)


@jit
def encode(rows, block, bounds, order, absmax, packed, codes):
    """Rows float32 [N, H] to absmax float32 [N, blocks] and packed codes uint8 [N, ceil(H / 2)].

    `bounds` [15] are the midpoints of the sorted table, `order` [16] the code of each rank; codes uint8 [H] is
    scratch. The fifteen comparisons stand one by one because that vectorises and a search does not.
    """
    num_rows, width = rows.shape
    b0, b1, b2, b3, b4 = bounds[0], bounds[1], bounds[2], bounds[3], bounds[4]
    b5, b6, b7, b8, b9 = bounds[5], bounds[6], bounds[7], bounds[8], bounds[9]
    b10, b11, b12, b13, b14 = bounds[10], bounds[11], bounds[12], bounds[13], bounds[14]
    in_order = True
    for rank in range(16):
        in_order &= order[rank] == rank
    for i in range(num_rows):
        row = rows[i]
        for b in range(absmax.shape[1]):
            start, stop = b * block, min((b + 1) * block, width)
            largest = np.uint32(0)
            for j in range(start, stop):
                largest = max(largest, np.uint32(bits_of_float(row[j]) & np.uint32(0x7FFFFFFF)))
            if largest >= INFINITY_BITS:
                absmax[i, b] = np.float32(np.nan)
                codes[start:stop] = 0
                continue
            absmax[i, b] = float_of_bits(largest)
            inverse = np.float32(1) / max(float_of_bits(largest), SMALLEST_ABSMAX)
            for j in range(start, stop):
                v = row[j] * inverse
                low = (v > b0) + (v > b1) + (v > b2) + (v > b3) + (v > b4) + (v > b5) + (v > b6) + (v > b7)
                high = (v > b8) + (v > b9) + (v > b10) + (v > b11) + (v > b12) + (v > b13) + (v > b14)
                codes[j] = np.uint8(low + high)
            if not in_order:
                for j in range(start, stop):
                    codes[j] = order[codes[j]]
        pack_row(codes, 4, packed[i])


@jit
def decode(packed, block, values, absmax, limit, rows, codes):
    """Packed codes to float32 rows through the table `values` [16]; clamped to +-limit, NaN stays."""
    num_rows, width = rows.shape
    limit = np.float32(limit)
    for i in range(num_rows):
        row = rows[i]
        unpack_row(packed[i], 4, codes)
        for b in range(absmax.shape[1]):
            scale = absmax[i, b]
            for j in range(b * block, min((b + 1) * block, width)):
                value = values[codes[j] & 15] * scale
                if value > limit:
                    value = limit
                elif value < -limit:
                    value = -limit
                row[j] = value
