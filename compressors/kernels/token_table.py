"""Kernel of compressors.klt.token_table.TokenTable: packed rows of the ids asked for, to float features."""

from __future__ import annotations

import numpy as np

from compressors.kernels.bits import jit, unpack_row

__all__ = ["unpack_features"]


@jit
def _scale(codes, half, steps, features):
    for j in range(features.size):
        features[j] = (np.float32(codes[j]) - half) * steps[j]


@jit
def unpack_features(ids, frequent, rare, rows, group_sizes, steps, features):
    """Features float32 [N, D] of ids int64 [N]; returns whether the table has all of them.

    rows int32 [V] are those of each id in two tables, packed uint8 [F, P] and [R, Q]; the second's begin at F. Of each
    table, group_sizes int64 [2, 8] are numbers of features of 8, 7, ..., 1 bits, the others are 0, and steps float32
    [2, D]. Bounds are checked of ids alone.
    """
    codes = np.empty(features.shape[1], np.uint8)
    for i in range(ids.size):
        if not 0 <= ids[i] < rows.size:
            return False
        row = rows[ids[i]]
        table = 0 if row < len(frequent) else 1
        packed = rare[row - len(frequent)] if table else frequent[row]
        begin, first = 0, 0
        for nbits in range(8, 0, -1):
            size = group_sizes[table, 8 - nbits]
            if size == 0:
                continue
            last, end = first + size, begin
            if nbits == 8:
                end += size
                codes[first:last] = packed[begin:end]
            else:
                for width in (4, 2, 1):
                    if nbits & width:
                        end += (size * width + 7) // 8
                unpack_row(packed[begin:end], nbits, codes[first:last])
            half = np.float32((1 << (nbits - 1)) - 0.5)
            _scale(codes[first:last], half, steps[table, first:last], features[i, first:last])
            begin, first = end, last
        features[i, first:] = 0
    return True
