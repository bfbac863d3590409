"""How each of GGUF's block types is read, told as the LLVM instructions that read one block.

A reader gets an IRBuilder and a pointer to a block's bytes (`layouts`), and makes no branches. It writes the
instructions that load the block; what it gives are runs of weights with one scale:

    weight = scale * code + least

rounded after each operation, as ggml does (ggml-common.h and ggml-quants.c of ggml-org/llama.cpp have the layouts, the
`gguf` package the same in NumPy, with which the tests compare bit for bit). Codes come as vectors of `LANES` float32,
which LLVM cuts to what the processor has.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llvmlite import binding, ir

from pipeline.models.compiled import FLOAT, FLOATS, LANES, constant, splat

__all__ = ["READERS", "Run"]

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_INTEGERS = ir.VectorType(_I32, LANES)
_BYTES = ir.VectorType(_I8, LANES)


@dataclass(frozen=True)
class Run:
    """Weights with one scale: vectors of codes by the place in the block of their first weight.

    `scale` and `least` are float32 values, None where there is none. Codes are as they are multiplied: what a type
    takes off them is off. (Taken off a product's sum instead, it costs more than here and a digit of the result.)
    """

    codes: dict[int, Any]
    scale: Any
    least: Any = None


def _load(builder: Any, block: Any, place: int, kind: Any) -> Any:
    pointer = builder.gep(block, [constant(place)])
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1)


@functools.cache
def _converts_halves() -> bool:
    """Whether this processor has an instruction for it; where it has none, LLVM calls a function that is not there."""
    return platform.machine() in ("aarch64", "arm64") or bool(binding.get_host_cpu_features().get("f16c"))


def _half(builder: Any, block: Any, place: int) -> Any:
    """An fp16 as float32, exactly, also to a thread that flushes subnormal float32.

    Without instructions for it by integers: exponent and mantissa where a float32's are, the exponent's bias changed; a
    subnormal one gets an exponent as if it were normal, and what that adds is taken away again. Infinity and NaN come
    out as large numbers there; conversions make neither.
    """
    bits = builder.zext(_load(builder, block, place, _I16), _I32)
    if _converts_halves():
        # Among zeros: loaded as a half it would be put into a register beside what that held, and wait for it.
        four = ir.VectorType(_I32, 4)
        halves = builder.bitcast(
            builder.insert_element(ir.Constant(four, None), bits, ir.Constant(_I32, 0)), ir.VectorType(ir.HalfType(), 8)
        )
        lower = builder.shuffle_vector(halves, halves, ir.Constant(four, [0, 1, 2, 3]))
        return builder.extract_element(builder.fpext(lower, ir.VectorType(FLOAT, 4)), ir.Constant(_I32, 0))
    magnitude = builder.shl(builder.and_(bits, ir.Constant(_I32, 0x7FFF)), ir.Constant(_I32, 13))
    sign = builder.shl(builder.and_(bits, ir.Constant(_I32, 0x8000)), ir.Constant(_I32, 16))
    normal = builder.add(magnitude, ir.Constant(_I32, (127 - 15) << 23))
    above = builder.bitcast(builder.add(magnitude, ir.Constant(_I32, (127 - 14) << 23)), FLOAT)
    subnormal = builder.bitcast(builder.fsub(above, ir.Constant(FLOAT, 2.0**-14)), _I32)
    is_subnormal = builder.icmp_unsigned("<", magnitude, ir.Constant(_I32, 1 << 23))
    return builder.bitcast(builder.or_(builder.select(is_subnormal, subnormal, normal), sign), FLOAT)


def _each(value: int) -> Any:
    return ir.Constant(_INTEGERS, [value] * LANES)


def _octets(builder: Any, block: Any, place: int) -> Any:
    """LANES unsigned bytes as int32."""
    return builder.zext(_load(builder, block, place, _BYTES), _INTEGERS)


def _bits(builder: Any, octets: Any, first: int, count: int) -> Any:
    """Bits [first, first + count) of each byte."""
    if first:
        octets = builder.lshr(octets, _each(first))
    return octets if first + count == 8 else builder.and_(octets, _each((1 << count) - 1))


def _above(builder: Any, low: Any, high: Any, shift: int) -> Any:
    return builder.or_(low, builder.shl(high, _each(shift)))


def _floats(builder: Any, codes: Any, less: int = 0) -> Any:
    return builder.sitofp(builder.sub(codes, _each(less)) if less else codes, FLOATS)


def _small(builder: Any, value: Any) -> Any:
    """An unsigned byte as float32."""
    return builder.uitofp(value, FLOAT)


def _bf16(builder: Any, block: Any) -> Iterator[Run]:
    halves = builder.zext(_load(builder, block, 0, ir.VectorType(_I16, LANES)), _INTEGERS)
    yield Run({0: builder.bitcast(builder.shl(halves, _each(16)), FLOATS)}, None)


def _q8_0(builder: Any, block: Any) -> Iterator[Run]:
    codes = {
        place: _floats(builder, builder.sext(_load(builder, block, 2 + place, _BYTES), _INTEGERS)) for place in (0, 16)
    }
    yield Run(codes, _half(builder, block, 0))


def _four_bits(builder: Any, block: Any, place: int) -> dict[int, Any]:
    """32 weights in 16 bytes: the first half in the low nibbles, the second in the high ones."""
    octets = _octets(builder, block, place)
    return {0: _bits(builder, octets, 0, 4), 16: _bits(builder, octets, 4, 4)}


def _fifth_bits(builder: Any, block: Any, place: int, codes: dict[int, Any]) -> dict[int, Any]:
    """Codes with a fifth bit each, from a word of 32 bits in the order of the weights."""
    word = splat(builder, _load(builder, block, place, _I32))
    with_fifth = {}
    for first, low in codes.items():
        shifted = builder.lshr(word, ir.Constant(_INTEGERS, list(range(first, first + LANES))))
        with_fifth[first] = _above(builder, low, builder.and_(shifted, _each(1)), 4)
    return with_fifth


def _as_floats(builder: Any, codes: dict[int, Any], less: int = 0) -> dict[int, Any]:
    return {place: _floats(builder, vector, less) for place, vector in codes.items()}


def _q4_0(builder: Any, block: Any) -> Iterator[Run]:
    yield Run(_as_floats(builder, _four_bits(builder, block, 2), less=8), _half(builder, block, 0))


def _q4_1(builder: Any, block: Any) -> Iterator[Run]:
    codes = _as_floats(builder, _four_bits(builder, block, 4))
    yield Run(codes, _half(builder, block, 0), _half(builder, block, 2))


def _q5_0(builder: Any, block: Any) -> Iterator[Run]:
    codes = _fifth_bits(builder, block, 2, _four_bits(builder, block, 6))
    yield Run(_as_floats(builder, codes, less=16), _half(builder, block, 0))


def _q5_1(builder: Any, block: Any) -> Iterator[Run]:
    codes = _fifth_bits(builder, block, 4, _four_bits(builder, block, 8))
    yield Run(_as_floats(builder, codes), _half(builder, block, 0), _half(builder, block, 2))


def _six_bit_pairs(builder: Any, block: Any, place: int) -> list[tuple[Any, Any]]:
    """The 8 scales and leasts, of 6 bits each, in the 12 bytes of a Q4_K or Q5_K block; as float32.

    Four bytes of scales, four of leasts, whose upper two bits belong to the later four, and their lower four bits.
    """
    octets = [_load(builder, block, place + i, _I8) for i in range(12)]

    def masked(value: Any, mask: int) -> Any:
        return builder.and_(value, ir.Constant(_I8, mask))

    def upper(value: Any) -> Any:
        return masked(builder.lshr(value, ir.Constant(_I8, 2)), 0x30)

    pairs = [(masked(octets[i], 63), masked(octets[i + 4], 63)) for i in range(4)]
    for i in range(4):
        low, high = masked(octets[i + 8], 15), builder.lshr(octets[i + 8], ir.Constant(_I8, 4))
        pairs.append((builder.or_(low, upper(octets[i])), builder.or_(high, upper(octets[i + 4]))))
    return [(_small(builder, scale), _small(builder, least)) for scale, least in pairs]


def _k_runs(builder: Any, block: Any, codes_at: int, high_at: int | None) -> Iterator[Run]:
    """Of Q4_K and Q5_K: 32 bytes have 64 weights, the first half in the low nibbles; a fifth bit of each in 32 more."""
    scale, least = _half(builder, block, 0), _half(builder, block, 2)
    pairs = _six_bit_pairs(builder, block, 4)
    high = {} if high_at is None else {place: _octets(builder, block, high_at + place) for place in (0, 16)}
    for run, (scale_code, least_code) in enumerate(pairs):
        codes = {}
        for place in (0, 16):
            vector = _bits(builder, _octets(builder, block, codes_at + run // 2 * 32 + place), run % 2 * 4, 4)
            if high:
                vector = _above(builder, vector, _bits(builder, high[place], run, 1), 4)
            codes[run * 32 + place] = _floats(builder, vector)
        yield Run(codes, builder.fmul(scale, scale_code), builder.fneg(builder.fmul(least, least_code)))


def _q4_k(builder: Any, block: Any) -> Iterator[Run]:
    yield from _k_runs(builder, block, 16, None)


def _q5_k(builder: Any, block: Any) -> Iterator[Run]:
    yield from _k_runs(builder, block, 48, 16)


def _q6_k(builder: Any, block: Any) -> Iterator[Run]:
    """Each half of 128 weights: four times 32, with low bits in 64 bytes' nibbles and two upper bits in 32 bytes."""
    scale = _half(builder, block, 208)
    for half in (0, 1):
        for quarter in range(4):
            for place in (0, 16):
                low = _octets(builder, block, half * 64 + quarter % 2 * 32 + place)
                high = _octets(builder, block, 128 + half * 32 + place)
                codes = _bits(builder, low, quarter // 2 * 4, 4)
                codes = _above(builder, codes, _bits(builder, high, quarter * 2, 2), 4)
                first = half * 128 + quarter * 32 + place
                own = builder.sitofp(_load(builder, block, 192 + first // 16, _I8), FLOAT)
                yield Run({first: _floats(builder, codes, less=32)}, builder.fmul(scale, own))


READERS: dict[str, Callable[[Any, Any], Iterator[Run]]] = {
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
