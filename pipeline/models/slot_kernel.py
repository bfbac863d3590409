"""Attention of one token a row over slots, in one call for all rows: what decoding does in every layer.

Of float32 on a CPU. Each of `num_outputs` is a head of keys in one row: its key and value are put where the slot goes
on, and the queries that share the head attend over what the slot then holds. In one order of summation whatever else is
in the pass, without copies, and with one product, one softmax and one sum in float32, as the definition has it.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir

from pipeline.models.compiled import (
    FLOAT,
    FLOATS,
    LANES,
    compile_function,
    constant,
    each_output,
    float_at,
    floats_at,
    fma,
    loop,
    pointer,
    run,
    splat,
    task_type,
    total,
)

__all__ = ["SeenPositions", "attend_one_token", "compile_attention"]

# Addresses of contiguous tensors: queries, keys, values and outputs [rows, heads, D], int64 [rows] of slots and of the
# positions that are seen, [firsts, ends), and views of a cache [slots, heads, positions, D] with the bytes from one
# slot and from one head to the next. `scores` is room for float32 [rows * heads of keys, positions].
_FIELDS = (
    *("next", "num_outputs", "chunk", "queries", "keys", "values", "outputs", "num_heads", "num_shared", "scale"),
    *("slots", "firsts", "ends", "cached_keys", "cached_values", "slot_stride", "head_stride"),
    *("scores", "scores_stride"),
)
_Task = task_type(_FIELDS)

# With fewer bytes of keys and values, waking other threads takes longer than they save.
MIN_NBYTES_FOR_THREADS = 256 << 10
_LEAST_EXPONENT = -87.0  # e to it is the smallest that is not subnormal


class SeenPositions:
    """Which positions of which slots the rows of a pass see.

    Args:
        slots: of each row.
        seen: positions [first, end) of each row, the last of which is that of its own token.
    """

    def __init__(self, slots: Sequence[int], seen: Sequence[tuple[int, int]]) -> None:
        self.num_rows = len(slots)
        firsts, ends = zip(*seen, strict=True)
        self.places = torch.tensor([slots, firsts, ends], device="cpu")
        lengths = [end - first for first, end in seen]
        self.num_positions = sum(lengths)
        self._longest = -(-max(lengths) // LANES) * LANES
        self._scores = torch.empty(0)

    def scores(self, num_heads: int) -> torch.Tensor:
        """Room for those of a layer with so many heads of keys: float32 [rows * heads, positions, and some more]."""
        if len(self._scores) != self.num_rows * num_heads:
            self._scores = torch.empty(self.num_rows * num_heads, self._longest, dtype=torch.float32, device="cpu")
        return self._scores


def attend_one_token(
    new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    cached: tuple[torch.Tensor, torch.Tensor],
    seen: SeenPositions,
    scale: float,
) -> torch.Tensor:
    """Attention float32 [B, heads, 1, D] of one token in each row, whose key and value are written into the cache.

    Args:
        new: its queries [B, heads, 1, D], and keys and values [B, heads / n, 1, D], where n queries share a head.
        cached: keys and values [slots, heads / n, positions, D], contiguous from the third dimension on.
        scale: what the products of queries and keys are multiplied with.
    """
    queries, keys, values = (part.contiguous() for part in new)
    batch, num_queries, num_tokens, head_dim = queries.shape
    assert num_tokens == 1 and queries.dtype == keys.dtype == cached[0].dtype == torch.float32, queries.dtype
    num_heads = keys.shape[1]
    slot_stride, head_stride, position_stride, one = cached[0].stride()
    assert cached[1].stride() == cached[0].stride() and (position_stride, one) == (head_dim, 1), cached[0].stride()
    assert seen.num_rows == batch, (seen.num_rows, batch)
    outputs = torch.empty_like(queries)
    places, scores = seen.places.data_ptr(), seen.scores(num_heads)
    task = _Task(
        *(0, batch * num_heads, 1, queries.data_ptr(), keys.data_ptr(), values.data_ptr(), outputs.data_ptr()),
        *(num_heads, num_queries // num_heads, struct.unpack("<I", struct.pack("<f", scale))[0]),
        *(places, places + 8 * batch, places + 16 * batch, cached[0].data_ptr(), cached[1].data_ptr()),
        *(4 * slot_stride, 4 * head_stride, scores.data_ptr(), 4 * scores.shape[1]),
    )
    nbytes = 8 * head_dim * num_heads * seen.num_positions
    run(compile_attention(head_dim), task, torch.get_num_threads() if nbytes >= MIN_NBYTES_FOR_THREADS else 1)
    return outputs


@functools.cache
def compile_attention(head_dim: int) -> int:
    """Address of the function for heads of this size, a multiple of 16."""
    return compile_function(f"attend_{head_dim}", _FIELDS, functools.partial(_attend, head_dim=head_dim))


def _attend(builder: Any, fields: dict[str, Any], head_dim: int) -> None:
    integer, byte = ir.IntType(64), ir.IntType(8).as_pointer()
    places = range(0, head_dim, LANES)
    scale = builder.bitcast(builder.trunc(fields["scale"], ir.IntType(32)), FLOAT)
    of_vectors = fma(builder, FLOATS)

    def address(base: Any, *steps: tuple[Any, Any]) -> Any:
        for index, stride in steps:
            base = builder.add(base, builder.mul(index, stride))
        return builder.inttoptr(base, byte)

    def at(row: Any, place: int) -> Any:
        return floats_at(builder, row, constant(4 * place))

    def unit(n: Any) -> None:
        row, head = builder.sdiv(n, fields["num_heads"]), builder.srem(n, fields["num_heads"])
        slot, first, end = (
            builder.load(builder.bitcast(address(fields[name], (row, constant(8))), integer.as_pointer()))
            for name in ("slots", "firsts", "ends")
        )
        count = builder.sub(end, first)
        size = constant(4 * head_dim)
        scores = address(fields["scores"], (n, fields["scores_stride"]))
        cached = []
        for name in ("keys", "values"):
            base = fields[f"cached_{name}"]
            positions = address(
                base, (slot, fields["slot_stride"]), (head, fields["head_stride"]), (first, size)
            )
            own, last = address(fields[name], (n, size)), builder.mul(builder.sub(count, constant(1)), size)
            for place in places:
                to = pointer(builder, positions, builder.add(last, constant(4 * place)), FLOATS)
                builder.store(at(own, place), to, align=4)
            cached.append(positions)

        def of_query(shared: Any, _: list[Any]) -> list[Any]:
            index = builder.add(builder.mul(n, fields["num_shared"]), shared)
            query = [at(address(fields["queries"], (index, size)), place) for place in places]
            largest = _scores(builder, (cached[0], query, scores), count, scale)
            sum_of = _exponentials(builder, scores, count, largest)

            def add_value(position: Any, sums: list[Any]) -> list[Any]:
                weight = splat(builder, float_at(builder, scores, builder.mul(position, constant(4))))
                own = builder.gep(cached[1], [builder.mul(position, size)])
                return [
                    builder.call(of_vectors, [weight, at(own, place), part])
                    for place, part in zip(places, sums, strict=True)
                ]

            sums = loop(builder, count, [ir.Constant(FLOATS, None)] * len(places), add_value)
            output = address(fields["outputs"], (index, size))
            for place, part in zip(places, sums, strict=True):
                share = builder.fdiv(part, splat(builder, sum_of))
                builder.store(share, pointer(builder, output, constant(4 * place), FLOATS), align=4)
            return []

        loop(builder, fields["num_shared"], [], of_query)

    each_output(builder, fields, unit)


def _scores(builder: Any, what: tuple[Any, list[Any], Any], count: Any, scale: Any) -> Any:
    """Write scale * (query . key) of `count` keys to the scores, and -inf up to a whole vector; returns the largest."""
    keys, query, scores = what
    of_vectors, infinity = fma(builder, FLOATS), ir.Constant(FLOAT, float("-inf"))

    def score(position: Any, carried: list[Any]) -> list[Any]:
        key = builder.gep(keys, [builder.mul(position, constant(4 * LANES * len(query)))])
        part = builder.fmul(query[0], floats_at(builder, key, constant(0)))
        for place, own in enumerate(query[1:], 1):
            part = builder.call(of_vectors, [own, floats_at(builder, key, constant(4 * LANES * place)), part])
        value = builder.fmul(total(builder, part), scale)
        builder.store(value, pointer(builder, scores, builder.mul(position, constant(4)), FLOAT))
        return [builder.select(builder.fcmp_ordered(">", value, carried[0]), value, carried[0])]

    # Before the scores, or there would be a loop that may have nothing to do.
    last = builder.mul(builder.sdiv(builder.sub(count, constant(1)), constant(LANES)), constant(4 * LANES))
    builder.store(splat(builder, infinity), pointer(builder, scores, last, FLOATS), align=4)
    (largest,) = loop(builder, count, [infinity], score)
    return largest


def _exponentials(builder: Any, scores: Any, count: Any, largest: Any) -> Any:
    """Replace scores by e to what they are above the largest; returns the sum."""
    most = splat(builder, largest)

    def of_vector(index: Any, carried: list[Any]) -> list[Any]:
        place = builder.mul(index, constant(4 * LANES))
        values = _exponential(builder, builder.fsub(floats_at(builder, scores, place), most))
        builder.store(values, pointer(builder, scores, place, FLOATS), align=4)
        return [builder.fadd(carried[0], values)]

    vectors = builder.sdiv(builder.add(count, constant(LANES - 1)), constant(LANES))
    (sums,) = loop(builder, vectors, [ir.Constant(FLOATS, None)], of_vector)
    return total(builder, sums)


def _exponential(builder: Any, x: Any) -> Any:
    """e^x of numbers up to 0, 0 below -87: 2^n times a polynomial of what is left (Cephes' expf), to 1 ulp or so."""
    integers = ir.VectorType(ir.IntType(32), LANES)
    of_vectors = fma(builder, FLOATS)

    def each(value: float) -> Any:
        return ir.Constant(FLOATS, [value] * LANES)

    rounder = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, which is then in the lowest bits
    rounded = builder.call(of_vectors, [x, each(1.44269504088896341), each(rounder)])
    n = builder.fsub(rounded, each(rounder))
    rest = builder.call(of_vectors, [n, each(-0.693359375), x])
    rest = builder.call(of_vectors, [n, each(2.12194440e-4), rest])
    value = each(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        value = builder.call(of_vectors, [value, rest, each(coefficient)])
    value = builder.call(of_vectors, [builder.fmul(rest, rest), value, builder.fadd(rest, each(1.0))])
    exponent = builder.shl(builder.bitcast(rounded, integers), ir.Constant(integers, [23] * LANES))
    scaled = builder.add(builder.bitcast(value, integers), exponent)  # what is above the integer is shifted out
    is_less = builder.fcmp_ordered("<", x, each(_LEAST_EXPONENT))
    return builder.select(is_less, ir.Constant(FLOATS, None), builder.bitcast(scaled, FLOATS))
