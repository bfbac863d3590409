"""Loops made with LLVM for the processor at hand, worked off by torch's own threads.

A function is written with llvmlite's IRBuilder when it is first asked for, and compiled in some tens of milliseconds.
It works on a task, an array of integers whose first is the next output that no thread has taken: threads take outputs
until none are left, so that which of them has computed what changes nothing. The threads are torch's: `GOMP_parallel`
is what a compiler makes of `#pragma omp parallel`, and asking torch's library for it finds the OpenMP that torch
computes with. Where there is none, one thread computes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from llvmlite import binding, ir

__all__ = [
    "FLOAT",
    "FLOATS",
    "LANES",
    "compile_function",
    "constant",
    "each_output",
    "float_at",
    "floats_at",
    "fma",
    "loop",
    "pointer",
    "row_address",
    "run",
    "splat",
    "task_type",
    "total",
]

LANES = 16  # LLVM cuts vectors to what the processor has
_I8, _I32, _I64 = (ir.IntType(bits) for bits in (8, 32, 64))
_POINTER = _I8.as_pointer()
FLOAT = ir.FloatType()
FLOATS = ir.VectorType(FLOAT, LANES)


@functools.cache
def task_type(fields: tuple[str, ...]) -> Any:
    """Of arrays that tell a function what to do: `next`, `num_outputs`, `chunk` and what else it names its fields."""
    assert fields[:3] == ("next", "num_outputs", "chunk"), fields
    return ctypes.c_int64 * len(fields)


def run(function: int, task: ctypes.Array[ctypes.c_int64], num_threads: int) -> None:
    """Work off a task, with up to `num_threads` threads; the GIL is released meanwhile."""
    parallel = _parallel()
    if num_threads > 1 and parallel is not None:
        parallel(function, task, num_threads, 0)
    else:
        _callable(function)(task)


@functools.cache
def _parallel() -> Callable[..., None] | None:
    libraries = (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")
    for path in (None, *map(str, libraries)):  # as the dynamic linker looks: what was preloaded comes first
        with contextlib.suppress(OSError, AttributeError):
            function = ctypes.CDLL(path).GOMP_parallel
            break
    else:
        return None
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return function


_callable = functools.cache(ctypes.CFUNCTYPE(None, ctypes.c_void_p))


def constant(value: int) -> Any:
    return ir.Constant(_I64, value)


def splat(builder: Any, value: Any) -> Any:
    """A vector with `value` in all lanes."""
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, LANES), None))


def each_output(builder: Any, fields: dict[str, Any], body: Callable[[Any], None]) -> None:
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

    loop(builder, builder.sub(stop, start), [], one)
    builder.branch(take)
    builder.position_at_end(end)
    builder.ret_void()


def loop(builder: Any, count: Any, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
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


def row_address(builder: Any, fields: dict[str, Any], name: str, index: Any) -> Any:
    """Address of a row of what the task has as `name`."""
    address = builder.add(fields[name], builder.mul(index, fields[f"{name}_stride"]))
    return builder.inttoptr(address, _POINTER)


def pointer(builder: Any, row: Any, place: Any, kind: Any) -> Any:
    return builder.bitcast(builder.gep(row, [place]), kind.as_pointer())


def floats_at(builder: Any, row: Any, place: Any) -> Any:
    return builder.load(pointer(builder, row, place, FLOATS), align=4)


def float_at(builder: Any, row: Any, place: Any) -> Any:
    return builder.load(pointer(builder, row, place, FLOAT), align=4)


def total(builder: Any, values: Any) -> Any:
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


def fma(builder: Any, kind: Any) -> Any:
    name = f"llvm.fma.{'f32' if kind is FLOAT else f'v{LANES}f32'}"
    known = builder.module.globals.get(name)
    return known or ir.Function(builder.module, ir.FunctionType(kind, [kind] * 3), name)


_engine_lock = threading.Lock()


def compile_function(name: str, fields: Sequence[str], write: Callable[[Any, dict[str, Any]], None]) -> int:
    """Address of a function of a task with these fields, whose body `write(builder, fields)` writes."""
    module = ir.Module(name)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER]), name)
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    task = builder.bitcast(function.args[0], _I64.as_pointer())
    values: dict[str, Any] = {
        field: builder.load(builder.gep(task, [constant(place)])) for place, field in enumerate(fields)
    }
    write(builder, values | {"task": task})
    with _engine_lock:
        engine = _engine()
        parsed = binding.parse_assembly(str(module))
        parsed.verify()
        engine.add_module(parsed)
        return engine.get_function_address(name)  # which compiles what has been added


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
