"""Products of few rows with blocks, and blocks to float32: the functions that `compiled` makes for each type."""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import binding, ir

from pipeline.models.blocks.layouts import LAYOUTS, RUN, Layout
from pipeline.models.blocks.readers import READERS
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
    row_address,
    run,
    splat,
    task_type,
    total,
)

__all__ = ["Task", "dequantising", "multiplying", "rows_at_once", "run"]

# What a task tells: addresses of contiguous rows, and bytes from one row to the next.
#   next           the first output that no thread has taken
#   num_outputs    rows of blocks, of which a thread takes `chunk` at a time
#   inputs         float32 [rows, num_blocks * weights of a block]; unused when blocks are made float32
#   outputs        float32 [rows, num_outputs], or [num_outputs, weights]
_FIELDS = (
    *("next", "num_outputs", "chunk", "num_blocks", "blocks", "blocks_stride"),
    *("inputs", "inputs_stride", "outputs", "outputs_stride"),
)
Task = task_type(_FIELDS)


@functools.cache
def rows_at_once() -> int:
    """How many rows a product takes in one reading of the blocks: their sums must fit into registers."""
    return 8 if binding.get_host_cpu_features().get("avx512f") else 4


@functools.cache
def multiplying(name: str, num_rows: int) -> int:
    """Address of a function that multiplies `num_rows` rows with the blocks of type `name`."""
    write = functools.partial(_multiply, layout=LAYOUTS[name], num_rows=num_rows)
    return compile_function(f"multiply_{name}_{num_rows}", _FIELDS, write)


@functools.cache
def dequantising(name: str) -> int:
    """Address of a function that makes float32 of blocks of type `name`."""
    return compile_function(f"dequantise_{name}", _FIELDS, functools.partial(_dequantise, layout=LAYOUTS[name]))


def _multiply(builder: Any, fields: dict[str, Any], layout: Layout, num_rows: int) -> None:
    """outputs[i, n] = sum over runs of scale * (codes . inputs[i]) + least * (sum of inputs[i])."""
    inputs = [row_address(builder, fields, "inputs", constant(i)) for i in range(num_rows)]
    sums = [_sums(builder, fields, layout, row) for row in inputs] if layout.has_leasts else []
    outputs = [row_address(builder, fields, "outputs", constant(i)) for i in range(num_rows)]
    of_vectors, of_one = fma(builder, FLOATS), fma(builder, FLOAT)
    zeros = [ir.Constant(FLOATS, None)] * num_rows + [ir.Constant(FLOAT, 0.0)] * len(sums)

    def output(n: Any) -> None:
        blocks = row_address(builder, fields, "blocks", n)

        def block(index: Any, carried: list[Any]) -> list[Any]:
            totals, rests = carried[:num_rows], carried[num_rows:]
            first = builder.mul(index, constant(4 * layout.num_weights))
            address = builder.gep(blocks, [builder.mul(index, constant(layout.nbytes))])
            runs = list(READERS[layout.name](builder, address))
            for number, own in enumerate(runs):
                scales = None if own.scale is None else splat(builder, own.scale)
                for i in range(num_rows):
                    part = None
                    for place, codes in own.codes.items():
                        values = floats_at(builder, inputs[i], builder.add(first, constant(4 * place)))
                        if part is None and scales is not None:
                            part = builder.fmul(codes, values)
                        else:
                            part = builder.call(of_vectors, [codes, values, totals[i] if part is None else part])
                    totals[i] = part if scales is None else builder.call(of_vectors, [scales, part, totals[i]])
                if own.least is not None:
                    place = builder.add(builder.mul(index, constant(4 * len(runs))), constant(4 * number))
                    for i in range(num_rows):
                        rests[i] = builder.call(of_one, [own.least, float_at(builder, sums[i], place), rests[i]])
            return [*totals, *rests]

        carried = loop(builder, fields["num_blocks"], zeros, block)
        for i in range(num_rows):
            product = total(builder, carried[i])
            if sums:
                product = builder.fadd(product, carried[num_rows + i])
            builder.store(product, pointer(builder, outputs[i], builder.mul(n, constant(4)), FLOAT))

    each_output(builder, fields, output)


def _dequantise(builder: Any, fields: dict[str, Any], layout: Layout) -> None:
    """outputs[n] = scale * code + least, each operation rounded."""

    def output(n: Any) -> None:
        blocks, weights = row_address(builder, fields, "blocks", n), row_address(builder, fields, "outputs", n)

        def block(index: Any, _: list[Any]) -> list[Any]:
            first = builder.mul(index, constant(4 * layout.num_weights))
            address = builder.gep(blocks, [builder.mul(index, constant(layout.nbytes))])
            for own in READERS[layout.name](builder, address):
                for place, values in own.codes.items():
                    if own.scale is not None:
                        values = builder.fmul(splat(builder, own.scale), values)
                    if own.least is not None:
                        values = builder.fadd(values, splat(builder, own.least))
                    to = pointer(builder, weights, builder.add(first, constant(4 * place)), FLOATS)
                    builder.store(values, to, align=4)
            return []

        loop(builder, fields["num_blocks"], [], block)

    each_output(builder, fields, output)


def _sums(builder: Any, fields: dict[str, Any], layout: Layout, inputs: Any) -> Any:
    """The sums of a row's inputs over each run, on the stack of the thread that computes them."""
    count = builder.mul(fields["num_blocks"], constant(layout.num_weights // RUN))
    sums = builder.bitcast(builder.alloca(FLOAT, size=count), ir.IntType(8).as_pointer())

    def of_run(index: Any, _: list[Any]) -> list[Any]:
        first = builder.mul(index, constant(4 * RUN))
        values = floats_at(builder, inputs, first)
        for place in range(LANES, RUN, LANES):
            values = builder.fadd(values, floats_at(builder, inputs, builder.add(first, constant(4 * place))))
        builder.store(total(builder, values), pointer(builder, sums, builder.mul(index, constant(4)), FLOAT))
        return []

    loop(builder, count, [], of_run)
    return sums
