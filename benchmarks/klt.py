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
    print(f"{'H':>6}{'bits/value':>12}{'quantise':>10}{'encode':>10}{'decode':>10}{'transforms':>12}{'ratio':>8}")
    for width in arguments.hidden_sizes:
        bits, quantize, encode, decode, transforms = measure(width, arguments.rounds)
        ratio = (quantize + encode + decode) / transforms
        print(f"{width:6d}{bits:12.3f}{quantize:10.1f}{encode:10.1f}{decode:10.1f}{transforms:12.1f}{ratio:8.2f}")
    return 0


def measure(width: int, rounds: int) -> tuple[float, ...]:
    """Bits per value, and ns per value to quantise, to encode, to decode and of both transforms."""
    generator = np.random.default_rng(0)
    prior = {name: tensor.numpy() for name, tensor in prior_models().items()}
    classes = np.linspace(20, -16, width).astype(np.int32)
    values = (generator.laplace(size=(NUM_TOKENS, width)) * 2 ** (classes / 8)).astype(np.float32)
    no_id = np.array([0, 1 << kernels.PRECISION], np.int32)
    models = kernels.make_models(
        side_classes=np.zeros(2, np.int32), component_class=classes, num_ids=0, id_starts=no_id, **prior
    )
    prices = trellis.Prices(classes - kernels.FIRST_CLASS, trellis_rates(models.starts))
    unpredicted = trellis.Prediction(
        from_ids=np.zeros_like(values),
        temporal_in=np.zeros((width, 0), np.float32),
        temporal_out=np.zeros((0, width), np.float32),
        tokens_per_row=NUM_TOKENS,
    )
    sent, received = _no_symbols(width), _no_symbols(width)
    steps, components = np.ones(NUM_TOKENS, np.float32), np.zeros_like(values)
    operations = np.zeros((2 * values.size + 20000, 3), np.uint16)
    words = np.zeros(values.size, np.uint32)

    def quantize() -> None:
        trellis.quantize(values, steps, sent.finer, unpredicted, prices, sent.levels, sent.is_raw, components)

    def encode() -> int:
        return kernels.encode(sent, models, NO_RAW_COST, operations, words)

    quantize()
    num_words = encode()
    frame = words[:num_words].copy()

    def decode() -> int:
        return kernels.decode(frame, models, received)

    if decode() != num_words or not np.array_equal(received.levels, sent.levels):
        raise SystemExit("the levels do not come back")
    x, matrix = torch.randn(NUM_TOKENS, width), torch.randn(width, width)

    def transform() -> torch.Tensor:
        return (x @ matrix) @ matrix

    seconds: dict[str, list[float]] = {call.__name__: [] for call in (quantize, encode, decode, transform)}
    for _ in range(rounds):
        for call in (quantize, encode, decode, transform):
            seconds[call.__name__].append(cpu_seconds(call))
    times = [1e9 * statistics.median(s) / values.size for s in seconds.values()]
    return 32 * num_words / values.size, *times


def _no_symbols(width: int) -> kernels.Symbols:
    """Room for a frame."""
    levels, is_raw = np.zeros((NUM_TOKENS, width), np.int32), np.zeros(NUM_TOKENS, np.bool_)
    return kernels.Symbols(levels, is_raw, *np.zeros((3, NUM_TOKENS), np.int32))


if __name__ == "__main__":
    run_command(main)
