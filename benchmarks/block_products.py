"""Products with matrices kept as GGUF's blocks, beside float32's and torch's packed ones.

    python -m benchmarks.block_products --types Q4_1 Q6_K --rows 1 8 64 --threads 1

For each shape [outputs, inputs] and number of rows: `BlockMatrix`'s products with drawn blocks, and torch's packed int4
and int8 ones, whose rows are bf16. Each is compared with the float64 product of its dequantised weights first, relative
to the largest value. Then medians of rounds in which all take turns: time over that of `F.linear` in float32 with as
many threads, and how many times its weights a second that is. Types whose blocks do not fill a shape's rows are left
out there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from llvmlite import binding
from torch.nn.functional import linear

from compressors.console import run_command
from pipeline.models.blocks.kernels import rows_at_once
from pipeline.models.blocks.layouts import LAYOUTS
from pipeline.models.blocks.products import BlockMatrix
from tests.helpers.blocks import draw_blocks, weights_of

# Of SmolLM2-135M, its head among them, and of larger models.
SHAPES = ((576, 576), (1536, 576), (49152, 576), (2048, 2048), (4096, 4096))
GROUP = 32  # weights with one scale in torch's int4
FEATURES = ("avx512f", "avx2", "avx", "fma", "f16c", "sve", "neon")
LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.02}


class Candidate(NamedTuple):
    """A product of rows of `dtype`, and what it has to give for all rows, as float64."""

    multiply: Callable[[torch.Tensor], torch.Tensor]
    exact: torch.Tensor
    dtype: torch.dtype


class Result(NamedTuple):
    """Of a candidate: its time over float32's, and its largest difference over the largest value."""

    ratio: float
    error: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--types", nargs="+", choices=LAYOUTS, default=["Q4_1", "Q8_0", "Q4_K", "Q6_K"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print(processor())
    print(f"{arguments.rounds} rounds; time over float32's, its weights a second times, the largest difference")
    for shape in SHAPES:
        x = torch.randn(max(arguments.rows), shape[1])
        plain = torch.randn(shape) / 50
        candidates = {**of_blocks(shape, arguments.types, x), **packed(shape, x)}
        for num_threads in arguments.threads:
            torch.set_num_threads(num_threads)
            for num_rows in arguments.rows:
                results = measure(candidates, plain, x[:num_rows], arguments.rounds)
                print(f"{shape[0]} x {shape[1]}, {num_rows} rows, {num_threads} threads: {told(results)}", flush=True)
    return 0


def processor() -> str:
    """What the compiled loops and torch make use of here."""
    features = binding.get_host_cpu_features()
    used = " ".join(name for name in FEATURES if features.get(name)) or "none of " + " ".join(FEATURES)
    return (
        f"{binding.get_host_cpu_name()} with {used}: {rows_at_once()} rows in one reading of the blocks; "
        f"torch's kernels are for {torch.backends.cpu.get_cpu_capability()}"
    )


def of_blocks(shape: tuple[int, int], types: list[str], x: torch.Tensor) -> dict[str, Candidate]:
    candidates = {}
    for name in types:
        num_blocks, rest = divmod(shape[1], LAYOUTS[name].num_weights)
        if not rest:
            blocks = draw_blocks(name, shape[0], num_blocks)
            exact = linear(x.double(), weights_of(blocks, name).double())
            candidates[name] = Candidate(BlockMatrix(blocks, name).__matmul__, exact, torch.float32)
    return candidates


def packed(shape: tuple[int, int], x: torch.Tensor) -> dict[str, Candidate]:
    """torch's int4, with a scale and a zero point for each group, and int8, with a scale for each output."""
    x = x.bfloat16().double()
    nibbles = torch.randint(0, 16, shape, dtype=torch.int32)
    groups = (torch.randn(shape[1] // GROUP, shape[0], 2) / 100).bfloat16()
    of_int4 = torch._convert_weight_to_int4pack_for_cpu(nibbles, 1)
    scale, zero = groups.double().transpose(0, 1).repeat_interleave(GROUP, 1).unbind(-1)
    octets = torch.randint(-127, 128, shape, dtype=torch.int8)
    scales = (torch.rand(shape[0]) / 100 + 0.001).bfloat16()
    return {
        "int4": Candidate(
            lambda rows: torch._weight_int4pack_mm_for_cpu(rows, of_int4, GROUP, groups),
            linear(x, (nibbles - 8) * scale + zero),
            torch.bfloat16,
        ),
        "int8": Candidate(
            lambda rows: torch._weight_int8pack_mm(rows, octets, scales),
            linear(x, octets * scales.double()[:, None]),
            torch.bfloat16,
        ),
    }


def measure(candidates: dict[str, Candidate], plain: torch.Tensor, x: torch.Tensor, rounds: int) -> dict[str, Result]:
    errors, calls = {}, {"float32": lambda: linear(x, plain)}
    for name, candidate in candidates.items():
        rows, exact = x.to(candidate.dtype), candidate.exact[: len(x)]
        errors[name] = float((candidate.multiply(rows) - exact).abs().max() / exact.abs().max())
        if errors[name] > LARGEST_ERROR[candidate.dtype]:
            raise AssertionError(f"{name} differs by {errors[name]:.1e}")
        calls[name] = lambda multiply=candidate.multiply, rows=rows: multiply(rows)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start_s = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start_s)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {name: Result(medians[name] / medians["float32"], errors[name]) for name in candidates}


def told(results: dict[str, Result]) -> str:
    return ", ".join(f"{name} x {r.ratio:.2f} ({1 / r.ratio:.1f} times, {r.error:.0e})" for name, r in results.items())


if __name__ == "__main__":
    run_command(main)
