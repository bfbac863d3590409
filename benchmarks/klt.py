"""What `klt` costs at a hidden size: its quantiser and entropy coder on one thread, beside the two transforms.

    python -m benchmarks.klt --hidden-sizes 576 5120

Codes random Laplacian values whose size falls from component to component, as calibrated ones do, and compares what is
decoded before anything is timed. Prints nanoseconds of CPU time per value, medians over rounds in which all take turns,
and the time of quantiser and coder over the transforms'. Needs no calibration; predictions are zeros.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
import torch

from benchmarks.codecs import cpu_seconds
from compressors.console import run_command
from compressors.kernels import klt as kernels
from compressors.kernels import trellis
from compressors.klt.codec import trellis_rates
from compressors.klt.models import prior_models

NUM_TOKENS = 512
NO_RAW_COST = 1 << 40


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[576, 5120])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{NUM_TOKENS} tokens, {arguments.rounds} rounds, one thread; ns per value")
    names = ("quantise", "encode", "decode", "rebuild", "transforms", "ratio")
    print(f"{'H':>6}{'bits/value':>12}" + "".join(f"{name:>12}" for name in names))
    for width in arguments.hidden_sizes:
        bits, quantize, encode, decode, rebuild, transforms = measure(width, arguments.rounds)
        ratio = (quantize + encode + decode + rebuild) / transforms
        times = "".join(f"{time:12.1f}" for time in (quantize, encode, decode, rebuild, transforms))
        print(f"{width:6d}{bits:12.3f}{times}{ratio:12.2f}")
    return 0


def measure(width: int, rounds: int) -> tuple[float, ...]:
    """Bits per value, and ns per value to quantise, to encode, to decode, to reconstruct, and of both transforms."""
    generator = np.random.default_rng(0)
    prior = {name: tensor.numpy() for name, tensor in prior_models().items()}
    classes = np.linspace(20, -16, width).astype(np.int32)
    values = (generator.laplace(size=(NUM_TOKENS, width)) * 2 ** (classes / 8)).astype(np.float32)
    models = kernels.make_models(side_classes=np.zeros(2, np.int32), component_class=classes, **prior)
    prices = trellis.Prices(classes - kernels.FIRST_CLASS, trellis_rates(models.starts))
    sent, received = _no_symbols(width), _no_symbols(width)
    steps, components, unpredicted = np.ones(NUM_TOKENS, np.float32), np.empty_like(values), np.zeros_like(values)

    def quantize() -> None:
        trellis.quantize(values, unpredicted, steps, sent.finer, prices, sent.levels, sent.is_raw)

    def encode() -> np.ndarray:
        return kernels.encode(sent, models, NO_RAW_COST)

    quantize()
    frame = encode()

    def decode() -> int:
        return kernels.decode(frame, models, received)

    def rebuild() -> None:
        trellis.reconstruct(received.levels, steps, unpredicted, received.is_raw, components)

    if decode() != frame.size or not np.array_equal(received.levels, sent.levels):
        raise SystemExit("the levels do not come back")
    rebuild()
    x, matrix = torch.randn(NUM_TOKENS, width), torch.randn(width, width)

    def transform() -> torch.Tensor:
        return (x @ matrix) @ matrix

    calls = (quantize, encode, decode, rebuild, transform)
    seconds: dict[str, list[float]] = {call.__name__: [] for call in calls}
    for _ in range(rounds):
        for call in calls:
            seconds[call.__name__].append(cpu_seconds(call))
    times = [1e9 * statistics.median(s) / values.size for s in seconds.values()]
    return 8 * frame.size / values.size, *times


def _no_symbols(width: int) -> kernels.Symbols:
    """Room for a frame."""
    levels, is_raw = np.zeros((NUM_TOKENS, width), np.int32), np.zeros(NUM_TOKENS, np.bool_)
    return kernels.Symbols(levels, is_raw, *np.zeros((2, NUM_TOKENS), np.int32))


if __name__ == "__main__":
    run_command(main)
