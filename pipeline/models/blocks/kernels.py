"""Compiled loops over blocks: products with few rows, and blocks to float32.

One function for a type and a number of rows, made with LLVM when it is first asked for, in some tens of milliseconds.
All work on a `Task`, of which threads take outputs until none are left, so that which thread has computed what changes
nothing. The threads are torch's own: `GOMP_parallel` is what a compiler makes of `#pragma omp parallel`, and asking
torch's library for it finds the OpenMP that torch computes with. Where there is none, one thread computes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llvmlite import binding, ir

from pipeline.models.blocks.layouts import FLOAT, FLOATS, LANES, LAYOUTS, RUN, Layout, constant, splat

__all__ = ["Task", "dequantising", "multiplying", "rows_at_once", "run"]

_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_POINTER = _I8.as_pointer()


# What the threads share: addresses of contiguous rows, and bytes from one row to the next.
#   next           the first output that no thread has taken
#   num_outputs    rows of blocks, of which a thread takes `chunk` at a time
#   inputs         float32 [rows, num_blocks * weights of a block]; unused when blocks are made float32
#   outputs        float32 [rows, num_outputs], or [num_outputs, weights]
_FIELDS = (
    *("next", "num_outputs", "chunk", "num_blocks", "blocks", "blocks_stride"),
    *("inputs", "inputs_stride", "outputs", "outputs_stride"),
)
Task = ctypes.c_int64 * len(_FIELDS)


def run(function: int, task: ctypes.Array[ctypes.c_int64], num_threads: int) -> None:
    """Work off a `Task`, with up to `num_threads` threads; the GIL is released meanwhile."""
    parallel = _parallel()
    if num_threads > 1 and parallel is not None:
        parallel(function, task, num_threads, 0)
    else:
        _callable(function)(task)


@functools.cache
def _parallel() -> Callable[..., None] | None:
    libraries = Path(torch.__file__).parent / "lib"
    for path in libraries.glob("libtorch_cpu.*"):
        with contextlib.suppress(OSError, AttributeError):
            function = ctypes.CDLL(str(path)).GOMP_parallel
            break
    else:
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, Task, ctypes.c_uint, ctypes.c_uint), None
    return function


_callable = functools.cache(ctypes.CFUNCTYPE(None, Task))


@functools.cache
def rows_at_once() -> int:
    """How many rows a product takes in one reading of the blocks: their sums must fit into registers."""
    return 8 if binding.get_host_cpu_features().get("avx512f") else 4


@functools.cache
def multiplying(name: str, num_rows: int) -> int:
    """Address of a function that multiplies `num_rows` rows with the blocks of type `name`."""
    return _compile(f"multiply_{name}_{num_rows}", lambda b, fields: _multiply(b, fields, LAYOUTS[name], num_rows))


@functools.cache
def dequantising(name: str) -> int:
    """Address of a function that makes float32 of blocks of type `name`."""
    return _compile(f"dequantise_{name}", lambda b, fields: _dequantise(b, fields, LAYOUTS[name]))


# ---- what the functions do ----


def _multiply(builder: Any, fields: dict[str, Any], layout: Layout, num_rows: int) -> None:
    """outputs[i, n] = sum over runs of scale * (codes . inputs[i]) + least * (sum of inputs[i])."""
    inputs = [_row(builder, fields, "inputs", constant(i)) for i in range(num_rows)]
    sums = [_sums(builder, fields, layout, row) for row in inputs] if layout.has_leasts else []
    outputs = [_row(builder, fields, "outputs", constant(i)) for i in range(num_rows)]
    fma, fma_one = _fma(builder, FLOATS), _fma(builder, FLOAT)
    zeros = [ir.Constant(FLOATS, None)] * num_rows + [ir.Constant(FLOAT, 0.0)] * len(sums)

    def output(n: Any) -> None:
        blocks = _row(builder, fields, "blocks", n)

        def block(index: Any, carried: list[Any]) -> list[Any]:
            totals, rests = carried[:num_rows], carried[num_rows:]
            first = builder.mul(index, constant(4 * layout.num_weights))
            address = builder.gep(blocks, [builder.mul(index, constant(layout.nbytes))])
            runs = list(layout.read(builder, address))
            for number, own in enumerate(runs):
                scales = None if own.scale is None else splat(builder, own.scale)
                for i in range(num_rows):
                    part = None
                    for place, codes in own.codes.items():
                        values = _floats_at(builder, inputs[i], builder.add(first, constant(4 * place)))
                        if part is None and scales is not None:
                            part = builder.fmul(codes, values)
                        else:
                            part = builder.call(fma, [codes, values, totals[i] if part is None else part])
                    totals[i] = part if scales is None else builder.call(fma, [scales, part, totals[i]])
                if own.least is not None:
                    place = builder.add(builder.mul(index, constant(4 * len(runs))), constant(4 * number))
                    for i in range(num_rows):
                        rests[i] = builder.call(fma_one, [own.least, _float_at(builder, sums[i], place), rests[i]])
            return [*totals, *rests]

        carried = _loop(builder, fields["num_blocks"], zeros, block)
        for i in range(num_rows):
            total = _total(builder, carried[i])
            if sums:
                total = builder.fadd(total, carried[num_rows + i])
            builder.store(total, _pointer(builder, outputs[i], builder.mul(n, constant(4)), FLOAT))

    _each_output(builder, fields, output)


def _dequantise(builder: Any, fields: dict[str, Any], layout: Layout) -> None:
    """outputs[n] = scale * code + least, each operation rounded."""

    def output(n: Any) -> None:
        blocks, weights = _row(builder, fields, "blocks", n), _row(builder, fields, "outputs", n)

        def block(index: Any, _: list[Any]) -> list[Any]:
            first = builder.mul(index, constant(4 * layout.num_weights))
            for own in layout.read(builder, builder.gep(blocks, [builder.mul(index, constant(layout.nbytes))])):
                for place, values in own.codes.items():
                    if own.scale is not None:
                        values = builder.fmul(splat(builder, own.scale), values)
                    if own.least is not None:
                        values = builder.fadd(values, splat(builder, own.least))
                    to = _pointer(builder, weights, builder.add(first, constant(4 * place)), FLOATS)
                    builder.store(values, to, align=4)
            return []

        _loop(builder, fields["num_blocks"], [], block)

    _each_output(builder, fields, output)


def _sums(builder: Any, fields: dict[str, Any], layout: Layout, inputs: Any) -> Any:
    """The sums of a row's inputs over each run, on the stack of the thread that computes them."""
    count = builder.mul(fields["num_blocks"], constant(layout.num_weights // RUN))
    sums = builder.bitcast(builder.alloca(FLOAT, size=count), _POINTER)

    def of_run(index: Any, _: list[Any]) -> list[Any]:
        first = builder.mul(index, constant(4 * RUN))
        values = _floats_at(builder, inputs, first)
        for place in range(LANES, RUN, LANES):
            values = builder.fadd(values, _floats_at(builder, inputs, builder.add(first, constant(4 * place))))
        builder.store(_total(builder, values), _pointer(builder, sums, builder.mul(index, constant(4)), FLOAT))
        return []

    _loop(builder, count, [], of_run)
    return sums


# ---- LLVM ----


def _each_output(builder: Any, fields: dict[str, Any], body: Callable[[Any], None]) -> None:
    """Take chunks of outputs, as other threads do, until there are no more."""
    function = builder.function
    take, work, end = (function.append_basic_block(name) for name in ("take", "work", "end"))
    builder.branch(take)
    builder.position_at_end(take)
    start = builder.atomic_rmw("add", fields["task"], fields["chunk"], "monotonic")
    builder.cbranch(builder.icmp_signed("<", start, fields["num_outputs"]), work, end)
    builder.position_at_end(work)
    stop = builder.add(start, fields["chunk"])
    stop = builder.select(builder.icmp_signed("<", stop, fields["num_outputs"]), stop, fields["num_outputs"])

    def one(index: Any, _: list[Any]) -> list[Any]:
        body(builder.add(start, index))
        return []

    _loop(builder, builder.sub(stop, start), [], one)
    builder.branch(take)
    builder.position_at_end(end)
    builder.ret_void()


def _loop(builder: Any, count: Any, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
    """`body(index, carried)` gives what the next one gets, for indices from 0 to `count`, which is not 0."""
    function, before = builder.function, builder.block
    block, after = function.append_basic_block("loop"), function.append_basic_block("after")
    builder.branch(block)
    builder.position_at_end(block)
    index = builder.phi(_I64)
    held = [builder.phi(value.type) for value in carried]
    given = body(index, list(held))
    following = builder.add(index, constant(1))
    index.add_incoming(constant(0), before)
    index.add_incoming(following, builder.block)
    for phi, first, later in zip(held, carried, given, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(later, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), block, after)
    builder.position_at_end(after)
    return given


def _row(builder: Any, fields: dict[str, Any], name: str, index: Any) -> Any:
    """Address of a row of what the task has as `name`."""
    address = builder.add(fields[name], builder.mul(index, fields[f"{name}_stride"]))
    return builder.inttoptr(address, _POINTER)


def _pointer(builder: Any, row: Any, place: Any, kind: Any) -> Any:
    return builder.bitcast(builder.gep(row, [place]), kind.as_pointer())


def _floats_at(builder: Any, row: Any, place: Any) -> Any:
    return builder.load(_pointer(builder, row, place, FLOATS), align=4)


def _float_at(builder: Any, row: Any, place: Any) -> Any:
    return builder.load(_pointer(builder, row, place, FLOAT), align=4)


def _total(builder: Any, values: Any) -> Any:
    """The sum of all lanes, halves by halves."""
    width = LANES
    while width > 1:
        width //= 2
        halves = [
            builder.shuffle_vector(
                values, values, ir.Constant(ir.VectorType(_I32, width), list(range(first, first + width)))
            )
            for first in (0, width)
        ]
        values = builder.fadd(*halves)
    return builder.extract_element(values, ir.Constant(_I32, 0))


def _fma(builder: Any, kind: Any) -> Any:
    name = f"llvm.fma.{'f32' if kind is FLOAT else f'v{LANES}f32'}"
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(kind, [kind] * 3), name)


_engine_lock = threading.Lock()


def _compile(name: str, write: Callable[[Any, dict[str, Any]], None]) -> int:
    """Address of a function of a `Task` whose body `write` writes."""
    module = ir.Module(name)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER]), name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    task = builder.bitcast(function.args[0], _I64.as_pointer())
    fields: dict[str, Any] = {
        field: builder.load(builder.gep(task, [constant(place)])) for place, field in enumerate(_FIELDS)
    }
    write(builder, fields | {"task": task})
    with _engine_lock:
        engine = _engine()
        parsed = binding.parse_assembly(str(module))
        parsed.verify()
        engine.add_module(parsed)
        engine.finalize_object()
        return engine.get_function_address(name)


@functools.cache
def _engine() -> Any:
    """Compiles for this processor. AVX-512 is used in full width where it is there."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features()
    flags = features.flatten() + (",-prefer-256-bit" if features.get("avx512f") else "")
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=binding.get_host_cpu_name(), features=flags, opt=3)
    return binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
