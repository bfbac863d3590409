"""Kernels of the codecs with 4-bit codes from a table: compressors.scalar.fourbit, compressors.scalar.mxfp4."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from compressors.kernels.bits import INFINITY_BITS, absmax_bits, clamp, float_of_bits, jit

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


@intrinsic
def _decode_sixteen(typing_context, table, scale, pairs, values, start):
    """values[start : start + 16] = table[codes] * scale, from the 8 bytes of pairs at start / 2.

    Written as vector IR: LLVM turns the sixteen look-ups into one permutation of a register where the CPU has
    that (AVX-512), and into loads elsewhere; from a loop it always makes loads.
    """
    byte, lane, number = ir.IntType(8), ir.IntType(64), ir.FloatType()
    sixteen = ir.VectorType(number, 16)

    def codegen(context, builder, signature, args):
        def pointer(index, offset, vector):
            array = context.make_array(signature.args[index])(context, builder, args[index])
            return builder.bitcast(builder.gep(array.data, [offset]), ir.PointerType(vector))

        def splat(constant):
            return ir.Constant(ir.VectorType(lane, 8), [constant] * 8)

        at = args[4]
        table_values = builder.load(pointer(0, ir.Constant(lane, 0), sixteen), align=4)
        half = builder.lshr(at, ir.Constant(lane, 1))
        packed = builder.load(pointer(2, half, ir.VectorType(byte, 8)), align=1)
        packed = builder.zext(packed, ir.VectorType(lane, 8))
        # each byte becomes two 32-bit indices, the high half of the byte in the lower one
        second = builder.shl(builder.and_(packed, splat(15)), splat(32))
        codes = builder.bitcast(builder.or_(builder.lshr(packed, splat(4)), second), ir.VectorType(ir.IntType(32), 16))
        looked_up = factors = ir.Constant(sixteen, ir.Undefined)
        for k in (ir.Constant(ir.IntType(32), n) for n in range(16)):
            value = builder.extract_element(table_values, builder.extract_element(codes, k))
            looked_up = builder.insert_element(looked_up, value, k)
            factors = builder.insert_element(factors, args[1], k)
        builder.store(builder.fmul(looked_up, factors), pointer(3, at, sixteen), align=4)
        return context.get_dummy_value()

    return types.void(table, scale, pairs, values, start), codegen


@jit
def decode(packed, block, table, scale, limit, rows):
    """Packed codes to float32 rows, clamped to +-limit, NaN stays.

    `table` float32 [16] has the value of each code, `scale` is float32 [N, blocks]; block is 32, 64, 128, ...
    """
    largest = np.max(np.abs(table)) * float_of_bits(absmax_bits(scale.reshape(-1)))
    shift = 0
    while 32 << shift < block:
        shift += 1
    for i in range(rows.shape[0]):
        row, pairs, row_scale = rows[i], packed[i], scale[i]
        for k in range(row.size >> 5):
            block_scale = row_scale[k >> shift]
            _decode_sixteen(table, block_scale, pairs, row, 32 * k)
            _decode_sixteen(table, block_scale, pairs, row, 32 * k + 16)
        for j in range(row.size & ~31, row.size):
            pair = np.intp(pairs[j // 2])
            row[j] = table[pair & 15 if j % 2 else pair >> 4] * row_scale[-1]
    if not largest <= limit:
        clamp(rows, limit)
