"""Shared pieces of the kernels: float bits, bf16 rounding, packing of a row (layout: compressors.bitpack)."""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

__all__ = ["bf16_of_float", "bits_of_float", "float_of_bf16", "float_of_bits", "jit", "pack_row", "unpack_row"]

jit = numba.njit(nogil=True, cache=True, error_model="numpy")

QUIET_NAN_BF16 = np.uint16(0x7FC0)


@intrinsic
def bits_of_float(typing_context, value):
    """The bits of a float32 as uint32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@intrinsic
def float_of_bits(typing_context, value):
    """The float32 with these uint32 bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@jit
def bf16_of_float(value):
    """Bits of a float32 rounded to bfloat16, ties to even; every NaN becomes the one that torch writes."""
    if np.isnan(value):
        return QUIET_NAN_BF16
    bits = bits_of_float(value)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@jit
def float_of_bf16(bits):
    """The float32 value of bfloat16 bits."""
    return float_of_bits(np.uint32(np.uint32(bits) << np.uint32(16)))


@jit
def _pack_plane(codes, shift, width, out):
    """Pack `width` bits of each code from `shift` up into `out`."""
    length, stride = codes.size, out.size
    mask = np.uint8((1 << width) - 1)
    for j in range(stride):
        out[j] = (codes[j] >> shift) & mask
    for lane in range(1, 8 // width):
        start, up = lane * stride, np.uint8(lane * width)
        for j in range(min(stride, length - start)):
            out[j] |= np.uint8(((codes[start + j] >> shift) & mask) << up)


@jit
def _unpack_plane(packed, shift, width, codes):
    """Add `width` bits of each code, at `shift`, from `packed`."""
    length, stride = codes.size, packed.size
    mask = np.uint8((1 << width) - 1)
    for lane in range(8 // width):
        start, down = lane * stride, np.uint8(lane * width)
        for j in range(min(stride, length - start)):
            codes[start + j] |= np.uint8(((packed[j] >> down) & mask) << shift)


@jit
def pack_row(codes, nbits, out):
    """`compressors.bitpack.pack` of one row: uint8 codes [length] to uint8 out."""
    length = codes.size
    if nbits == 8:
        out[:] = codes
        return
    start = 0
    if nbits & 4:
        stop = (length + 1) // 2
        _pack_plane(codes, np.uint8(0), 4, out[:stop])
        start = stop
    if nbits & 2:
        stop = start + (length + 3) // 4
        _pack_plane(codes, np.uint8(nbits & 4), 2, out[start:stop])
        start = stop
    if nbits & 1:
        stop = start + (length + 7) // 8
        _pack_plane(codes, np.uint8(nbits & 6), 1, out[start:stop])


@jit
def unpack_row(packed, nbits, codes):
    """`compressors.bitpack.unpack` of one row: uint8 packed to uint8 codes [length]."""
    length = codes.size
    if nbits == 8:
        codes[:] = packed
        return
    codes[:] = 0
    start = 0
    if nbits & 4:
        stop = (length + 1) // 2
        _unpack_plane(packed[:stop], np.uint8(0), 4, codes)
        start = stop
    if nbits & 2:
        stop = start + (length + 3) // 4
        _unpack_plane(packed[start:stop], np.uint8(nbits & 4), 2, codes)
        start = stop
    if nbits & 1:
        stop = start + (length + 7) // 8
        _unpack_plane(packed[start:stop], np.uint8(nbits & 6), 1, codes)
