"""Candidates for products with weights of few bits, beside float32's: what docs/design.md's section 11 rests on.

    python -m benchmarks.block_products --rows 1 4 8 16 32 64

For each shape [outputs, inputs] and number of rows: torch's packed int4 and int8 products, with bf16 and float32 rows,
and a loop of our own over GGUF's Q4_1 blocks as a file has them, with float32 rows. Each is compared with the product
of its dequantised weights first, relative to the largest value. One thread; medians of rounds in which all take turns,
over `F.linear`'s time in float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import gguf
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch.nn.functional import linear

from compressors.console import run_command
from compressors.kernels.bits import jit

BLOCK, BLOCK_NBYTES = 32, 20  # weights; scale and least as fp16, then nibbles: first half low, second half high
LANES = 16
ROWS_AT_ONCE = (8, 4, 2, 1)
SHAPES = ((576, 576), (1536, 576), (49152, 576), (4096, 4096))


class Candidate(NamedTuple):
    """A product of x [M, K] and weights [N, K], and the weights as float32."""

    multiply: Callable[[torch.Tensor], torch.Tensor]
    weights: torch.Tensor
    dtype: torch.dtype = torch.float32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{arguments.rounds} rounds, one thread; time over float32's, in brackets the largest difference")
    for num_outputs, num_inputs in SHAPES:
        candidates = make_candidates(num_outputs, num_inputs)
        for num_rows in arguments.rows:
            x = torch.randn(num_rows, num_inputs)
            ratios = measure(candidates, x, arguments.rounds)
            told = ", ".join(f"{name} x {ratio:.2f} ({error:.0e})" for name, (ratio, error) in ratios.items())
            print(f"{num_outputs} x {num_inputs}, {num_rows} rows: {told}", flush=True)
    return 0


def make_candidates(num_outputs: int, num_inputs: int) -> dict[str, Candidate]:
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (num_outputs, num_inputs // BLOCK, BLOCK_NBYTES), dtype=np.uint8)
    scales = generator.normal(0, 0.01, (*blocks.shape[:2], 2)).astype(np.float16)
    blocks[..., :4] = scales.view(np.uint8)
    blocks = blocks.reshape(num_outputs, -1)
    of_blocks = torch.from_numpy(gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1))
    found = {"Q4_1": Candidate(lambda x: multiply_q4_1(blocks, x), of_blocks)}
    nibbles = torch.from_numpy(generator.integers(0, 16, (num_outputs, num_inputs), dtype=np.int32))
    groups = torch.from_numpy(generator.normal(0, 0.01, (num_inputs // BLOCK, num_outputs, 2)).astype(np.float32))
    packed = torch._convert_weight_to_int4pack_for_cpu(nibbles, 1)
    octets = torch.from_numpy(generator.integers(-127, 128, (num_outputs, num_inputs), dtype=np.int8))
    by_row = torch.from_numpy(generator.uniform(0.001, 0.01, num_outputs).astype(np.float32))
    for dtype in (torch.bfloat16, torch.float32):
        name, scale, rows_scale = str(dtype).removeprefix("torch."), groups.to(dtype), by_row.to(dtype)
        by_group = scale.float().transpose(0, 1).repeat_interleave(BLOCK, 1)
        found[f"int4 {name}"] = Candidate(
            lambda x, scale=scale: torch._weight_int4pack_mm_for_cpu(x, packed, BLOCK, scale),
            (nibbles - 8) * by_group[..., 0] + by_group[..., 1],
            dtype,
        )
        found[f"int8 {name}"] = Candidate(
            lambda x, scale=rows_scale: torch._weight_int8pack_mm(x, octets, scale),
            octets * rows_scale.float()[:, None],
            dtype,
        )
    return found


def measure(candidates: dict[str, Candidate], x: torch.Tensor, rounds: int) -> dict[str, tuple[float, float]]:
    """Of each its time over float32's, and its largest difference over the largest value of the exact product."""
    errors, calls = {}, {"float32": lambda: linear(x, candidates["Q4_1"].weights)}
    for name, candidate in candidates.items():
        rows = x.to(candidate.dtype)
        exact = linear(rows.double(), candidate.weights.double())
        errors[name] = float((candidate.multiply(rows) - exact).abs().max() / exact.abs().max())
        if errors[name] > (0.02 if candidate.dtype == torch.bfloat16 else 1e-5):
            raise AssertionError(f"{name} differs by {errors[name]:.1e}")
        calls[name] = lambda multiply=candidate.multiply, rows=rows: multiply(rows)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start_s = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start_s)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {name: (medians[name] / medians["float32"], errors[name]) for name in candidates}


def multiply_q4_1(blocks: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    product, rows = np.empty((len(x), len(blocks)), np.float32), x.numpy()
    first = 0
    for count in ROWS_AT_ONCE:
        while len(x) - first >= count:
            _PRODUCTS[count](blocks, rows[first : first + count], product[first : first + count])
            first += count
    return torch.from_numpy(product)


def _product_of(num_rows: int) -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
    """A kernel for `num_rows` rows: product float32 [M, N] of rows float32 [M, K] and Q4_1 blocks uint8 [N, bytes]."""

    @intrinsic
    def dot(typing_context, blocks, rows, block_sums, product, num_blocks):
        """One output of every row: products with nibbles first, the scale once a block, the least by the rows' sums."""

        def codegen(context, builder, signature, args):
            kinds = signature.args[:4]
            arrays = [context.make_array(kind)(context, builder, a) for kind, a in zip(kinds, args[:4], strict=True)]
            single, byte, half = ir.FloatType(), ir.IntType(8), ir.HalfType()
            vector, integers = ir.VectorType(single, LANES), ir.VectorType(ir.IntType(32), LANES)
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32"
            )

            def row_of(array, i):
                offset = builder.mul(context.get_constant(types.intp, i), builder.extract_value(array.strides, 0))
                return builder.bitcast(cgutils.pointer_add(builder, array.data, offset), single.as_pointer())

            def at(pointer, index, kind):
                return builder.load(builder.bitcast(builder.gep(pointer, [index]), kind.as_pointer()), align=1)

            def constant(n):
                return context.get_constant(types.intp, n)

            sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in range(num_rows)]
            rest = [cgutils.alloca_once_value(builder, ir.Constant(single, 0.0)) for _ in range(num_rows)]
            for total in sums:
                builder.store(ir.Constant(vector, None), total)
            for total in rest:
                builder.store(ir.Constant(single, 0.0), total)
            first = builder.bitcast(arrays[0].data, byte.as_pointer())
            with cgutils.for_range(builder, args[4]) as loop:
                block = builder.gep(first, [builder.mul(loop.index, constant(BLOCK_NBYTES))])
                scale, least = (builder.fpext(at(block, constant(n), half), single) for n in (0, 2))
                codes = builder.zext(at(block, constant(4), ir.VectorType(byte, LANES)), integers)
                low = builder.sitofp(builder.and_(codes, ir.Constant(integers, [15] * LANES)), vector)
                high = builder.sitofp(builder.lshr(codes, ir.Constant(integers, [4] * LANES)), vector)
                lane = builder.insert_element(ir.Constant(vector, ir.Undefined), scale, ir.Constant(ir.IntType(32), 0))
                scales = builder.shuffle_vector(lane, lane, ir.Constant(integers, None))
                k = builder.mul(loop.index, constant(BLOCK))
                for i in range(num_rows):
                    row = row_of(arrays[1], i)
                    part = builder.fmul(low, at(row, k, vector))
                    part = builder.call(fma, [high, at(row, builder.add(k, constant(LANES)), vector), part])
                    builder.store(builder.call(fma, [scales, part, builder.load(sums[i])]), sums[i])
                    of_least = builder.fmul(least, at(row_of(arrays[2], i), loop.index, single))
                    builder.store(builder.fadd(builder.load(rest[i]), of_least), rest[i])
            for i in range(num_rows):
                total, width = builder.load(sums[i]), LANES
                while width > 1:
                    width //= 2
                    places = ir.VectorType(ir.IntType(32), width)
                    lower, upper = (
                        builder.shuffle_vector(total, total, ir.Constant(places, list(range(begin, begin + width))))
                        for begin in (0, width)
                    )
                    total = builder.fadd(lower, upper)
                value = builder.extract_element(total, ir.Constant(ir.IntType(32), 0))
                builder.store(builder.fadd(value, builder.load(rest[i])), row_of(arrays[3], i))
            return context.get_dummy_value()

        return types.none(blocks, rows, block_sums, product, num_blocks), codegen

    @jit
    def multiply(blocks, rows, product):
        num_blocks = rows.shape[1] // BLOCK
        block_sums = np.zeros((rows.shape[0], num_blocks), np.float32)
        for i in range(rows.shape[0]):
            for b in range(num_blocks):
                for k in range(b * BLOCK, (b + 1) * BLOCK):
                    block_sums[i, b] += rows[i, k]
        for n in range(blocks.shape[0]):
            dot(blocks[n], rows, block_sums, product[:, n:], num_blocks)

    return multiply


_PRODUCTS = {count: _product_of(count) for count in ROWS_AT_ONCE}

if __name__ == "__main__":
    run_command(main)
