"""What `klt` costs at a hidden size: its quantiser and entropy coder on one thread, beside the two transforms.

    python -m benchmarks.klt --hidden-sizes 576 5120

Codes random Laplacian values whose size falls from component to component, as calibrated ones do, and compares what is
decoded before anything is timed. Prints nanoseconds of CPU time per value, medians over rounds in which all take turns,
and the time of quantiser and coder over the transforms'. Needs no calibration; prediction is left out.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
import torch

from benchmarks.codecs import cpu_seconds
from compressors.kernels import klt as kernels
from compressors.kernels import trellis
from compressors.klt.codec import trellis_rates
from compressors.klt.models import prior_models

NUM_TOKENS = 512
NO_RAW_COST = 1 << 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[576, 5120])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{NUM_TOKENS} tokens, {arguments.rounds} rounds, one thread; ns per value")
    print(f"{'H':>6}{'bits/value':>12}{'quantise':>10}{'encode':>10}{'decode':>10}{'transforms':>12}{'ratio':>8}")
    for width in arguments.hidden_sizes:
        bits, quantize, encode, decode, transforms = measure(width, arguments.rounds)
        ratio = (quantize + encode + decode) / transforms
        print(f"{width:6d}{bits:12.3f}{quantize:10.1f}{encode:10.1f}{decode:10.1f}{transforms:12.1f}{ratio:8.2f}")


def measure(width: int, rounds: int) -> tuple[float, ...]:
    """Bits per value, and ns per value to quantise, to encode, to decode and of both transforms."""
    generator = np.random.default_rng(0)
    models = {name: tensor.numpy() for name, tensor in prior_models().items()}
    magnitude, starts = models["magnitude"], models["starts"]
    classes = np.linspace(20, -16, width).astype(np.int32)
    values = (generator.laplace(size=(NUM_TOKENS, width)) * 2 ** (classes / 8)).astype(np.float32)
    levels, rates = np.zeros(values.shape, np.int32), trellis_rates(starts)
    nothing = np.zeros(NUM_TOKENS, np.int32)
    not_raw = np.zeros(NUM_TOKENS, np.bool_)
    steps, unpredicted, components = np.ones(NUM_TOKENS, np.float32), np.zeros_like(values), np.zeros_like(values)
    no_temporal = np.zeros((width, 0), np.float32), np.zeros((0, width), np.float32)
    sides = np.array([0, 0], np.int32)
    frequency_bits = np.concatenate([[0], np.ceil(256 * (15 - np.log2(np.arange(1, 32769))))]).astype(np.int64)
    no_ids, id_starts = np.zeros(0, np.int32), np.array([0, 32768], np.int32)
    operations = np.zeros((2 * levels.size + 20000, 3), np.uint16)
    words = np.zeros(levels.size, np.uint32)
    decoded, flags = np.zeros_like(levels), np.zeros_like(not_raw)
    received = np.zeros((3, NUM_TOKENS), np.int32)

    def quantize() -> None:
        trellis.quantize(
            values, unpredicted, steps, not_raw, NUM_TOKENS, *no_temporal, classes - kernels.FIRST_CLASS, nothing,
            rates, levels, components,
        )  # fmt: skip

    def encode() -> int:
        return kernels.encode(
            levels, not_raw, nothing, nothing, nothing, sides, classes, magnitude, starts, frequency_bits, no_ids,
            id_starts, NO_RAW_COST, operations, words,
        )  # fmt: skip

    quantize()
    num_words = encode()
    guesses, id_guesses = kernels.first_guesses(starts), kernels.first_guesses(id_starts[None])
    sent = words[:num_words].copy()

    def decode() -> int:
        return kernels.decode(
            sent, sides, classes, magnitude, starts, guesses, 0, id_starts[None], id_guesses, decoded, flags, *received
        )

    if decode() != num_words or not np.array_equal(decoded, levels):
        raise SystemExit("the levels do not come back")
    x, matrix = torch.randn(NUM_TOKENS, width), torch.randn(width, width)

    def transform() -> torch.Tensor:
        return (x @ matrix) @ matrix

    seconds: dict[str, list[float]] = {call.__name__: [] for call in (quantize, encode, decode, transform)}
    for _ in range(rounds):
        for call in (quantize, encode, decode, transform):
            seconds[call.__name__].append(cpu_seconds(call))
    times = [1e9 * statistics.median(s) / levels.size for s in seconds.values()]
    return 32 * num_words / levels.size, *times


if __name__ == "__main__":
    main()
