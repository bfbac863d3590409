"""Shared pieces of the kernels: float bits, bf16 rounding, packing of a row (layout: compressors.bitpack)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = [
    "INFINITY_BITS",
    "QUIET_NAN_BF16",
    "absmax_bits",
    "bf16_of_float",
    "bits_of_float",
    "clamp",
    "float_of_bf16",
    "float_of_bits",
    "fused_multiply_add",
    "inlined",
    "jit",
    "pack_row",
    "pack_rows",
    "pack_words",
    "prefetch",
    "unpack_row",
    "unpack_rows",
    "unpack_words",
]

logger = logging.getLogger(__name__)

_told_of_cache: list[str] = []


def _compiled(**options: str) -> Callable[[Callable], Any]:
    """`numba.njit`, cached on disk where the disk lets it: what cannot be kept there is compiled anew at each start."""

    def decorate(function: Callable) -> Any:
        if numba.config.DISABLE_JIT:
            raise ImportError("NUMBA_DISABLE_JIT is set, and codecs on the CPU need compiled kernels: unset it")
        dispatcher = numba.njit(nogil=True, error_model="numpy", **options)(function)
        try:
            dispatcher.enable_caching()
        except (RuntimeError, OSError) as e:  # no folder that may be written to
            _tell_of_cache(e)
            return dispatcher
        cache = dispatcher._cache
        cache.load_overload = _tolerant(cache.load_overload)
        cache.save_overload = _tolerant(cache.save_overload)
        return dispatcher

    return decorate


def _tolerant(operation: Callable) -> Callable:
    """A cache's operation that gives None where the disk or a damaged file makes it fail."""

    def tried(*arguments: Any) -> Any:
        try:
            return operation(*arguments)
        except Exception as e:  # of unpickling, too
            _tell_of_cache(e)
            return None

    return tried


def _tell_of_cache(error: Exception) -> None:
    """Once a process."""
    if not _told_of_cache:
        _told_of_cache.append(str(error))
        logger.warning(
            "compiled kernels cannot be kept on disk, each start compiles them anew: %s; name a folder that can be "
            "written to, with room, in the environment variable NUMBA_CACHE_DIR",
            error,
        )


jit = _compiled()
# Calls that are not inlined keep reference counts of their arrays, which takes as long as decoding a symbol.
inlined = _compiled(inline="always")

QUIET_NAN_BF16 = np.uint16(0x7FC0)
INFINITY_BITS = np.uint32(0x7F800000)


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


@intrinsic
def fused_multiply_add(typing_context, a, b, c):
    """a * b + c of float32, rounded once; in a vector as alone."""

    def codegen(context, builder, signature, args):
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def prefetch(typing_context, array, offset):
    """Ask for the cache line `offset` bytes behind the first element of an array; beyond its end it does nothing."""

    def codegen(context, builder, signature, args):
        values = context.make_array(signature.args[0])(context, builder, args[0])
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        line = builder.gep(builder.bitcast(values.data, byte), [args[1]])
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        for_reading, in_second_level, of_data = flag(0), flag(2), flag(1)
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [line, for_reading, in_second_level, of_data])
        return context.get_dummy_value()

    return types.none(array, types.int64), codegen


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
def absmax_bits(values):
    """Bits of the largest magnitude as uint32; INFINITY_BITS or more if any value is infinite or NaN.

    Integer maxima vectorise where float maxima must keep the order of NaNs, and they do not lose a NaN.
    """
    largest = np.uint32(0)
    for j in range(values.size):
        largest = max(largest, np.uint32(bits_of_float(values[j]) & np.uint32(0x7FFFFFFF)))
    return largest


@jit
def clamp(rows, limit):
    """Clamp float32 rows [N, H] to +-limit in place, NaN stays.

    Decoders run it after their loops and only where needed: inside a loop it would cost a fifth of the speed.
    """
    limit = np.float32(limit)
    for i in range(rows.shape[0]):
        row = rows[i]
        for j in range(row.size):
            if row[j] > limit:
                row[j] = limit
            elif row[j] < -limit:
                row[j] = -limit


# Loops below run over whole slices: numba checks `array[start + j]` for a negative index, which keeps the
# compiler from vectorising, and `array[start:][j]` is free of that.


@jit
def _set_bits(source, down, mask, target):
    for j in range(target.size):
        target[j] = (source[j] >> down) & mask


@jit
def _add_bits(source, down, mask, up, target):
    for j in range(target.size):
        target[j] |= np.uint8(((source[j] >> down) & mask) << up)


@jit
def pack_row(codes, nbits, packed):
    """`compressors.bitpack.pack` of one row, nbits below 8: uint8 codes [length] to uint8 packed."""
    start, shift = 0, 0
    for width in (4, 2, 1):
        if nbits & width:
            stride, mask = (codes.size * width + 7) // 8, np.uint8((1 << width) - 1)
            plane = packed[start : start + stride]
            _set_bits(codes[:stride], np.uint8(shift), mask, plane)
            for lane in range(1, 8 // width):
                part = codes[lane * stride : (lane + 1) * stride]
                _add_bits(part, np.uint8(shift), mask, np.uint8(lane * width), plane[: part.size])
            start, shift = start + stride, shift + width


@jit
def unpack_row(packed, nbits, codes):
    """`compressors.bitpack.unpack` of one row, nbits below 8: uint8 packed to uint8 codes [length]."""
    start, shift = 0, 0
    for width in (4, 2, 1):
        if nbits & width:
            stride, mask = (codes.size * width + 7) // 8, np.uint8((1 << width) - 1)
            plane = packed[start : start + stride]
            for lane in range(8 // width):
                part = codes[lane * stride : (lane + 1) * stride]
                if shift == 0:
                    _set_bits(plane, np.uint8(lane * width), mask, part)
                else:
                    _add_bits(plane, np.uint8(lane * width), mask, np.uint8(shift), part)
            start, shift = start + stride, shift + width


@jit
def pack_rows(codes, nbits, packed):
    """`pack_row` of every row."""
    for i in range(codes.shape[0]):
        pack_row(codes[i], nbits, packed[i])


@jit
def unpack_rows(packed, nbits, codes):
    """`unpack_row` of every row."""
    for i in range(codes.shape[0]):
        unpack_row(packed[i], nbits, codes[i])


@jit
def pack_words(codes, words):
    """3-bit codes uint8 [N, H] to int32 [N, W], W = ceil(H / 10): word j has codes j, j + W, ..., from bit 27 down."""
    num_words = words.shape[1]
    words[:] = 0
    for i in range(words.shape[0]):
        for lane in range(10):
            part, up = codes[i, lane * num_words : (lane + 1) * num_words], np.int32(27 - 3 * lane)
            row = words[i, : part.size]
            for j in range(part.size):
                row[j] |= np.int32(part[j]) << up


@jit
def unpack_words(words, codes):
    """Inverse of `pack_words`."""
    num_words = words.shape[1]
    for i in range(words.shape[0]):
        for lane in range(10):
            part, down = codes[i, lane * num_words : (lane + 1) * num_words], np.int32(27 - 3 * lane)
            row = words[i, : part.size]
            for j in range(part.size):
                part[j] = np.uint8((row[j] >> down) & np.int32(7))
