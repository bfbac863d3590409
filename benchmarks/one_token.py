"""What a frame of one token costs: microseconds to encode and to decode, as in the decoding steps of a generation.

    python benchmarks/one_token.py                                    # codecs that may carry a generation
    python benchmarks/one_token.py int4 "klt(calibration=calib/, step=0.7)" --link layer:18:node2->node3

One thread, float32 [1, 1, H] with outlier channels, encoder and decoder objects of their own, kernels compiled before.
The codecs take turns: in each round one is called CALLS times, and the round counts with its median, in wall time; the
figures are the medians and the least of the rounds. `--tokens` times frames of more tokens. Token ids, where a codec
needs them, are made up.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from compressors import LinkInfo, make_compressor
from compressors.console import run_command
from compressors.check import hidden_states, side_inputs, travelling

CALLS = 20
DEFAULT_SPECS = [
    *("none", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", "int8", "int6", "int4", "int2", "nf4", "nf4(absmax=fp16)", "fp4"),
    *("mxfp4", "hqq8", "hqq4", "hqq3", "hqq2", "hqq1", "hadamard(int4)", "hadamard(nf4)"),
    *("outlier(channels=[1, 5, 9], inner=int4)", "outlier(channels=[1, 5, 9], inner=hadamard(int4))"),
    *("topk", "topk(density=0.5, inner=int8)", "zstd(int8)", "zstd(bf16, item_size=2)"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("specs", nargs="*", default=DEFAULT_SPECS)
    parser.add_argument("--hidden-size", type=int, default=576)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--link", default="one token", help="name of the link, for calibrated codecs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    x = hidden_states((1, arguments.tokens, arguments.hidden_size))
    link = LinkInfo(name=arguments.link, hidden_size=arguments.hidden_size, max_tokens=arguments.tokens)
    calls = {spec: _calls(spec, link, x) for spec in arguments.specs}
    times: dict[str, list[tuple[float, float]]] = {spec: [] for spec in calls}
    with torch.inference_mode():
        for _ in range(arguments.rounds):
            for spec, (encode, decode) in calls.items():
                times[spec].append((_median_us(encode), _median_us(decode)))
    print(f"{list(x.shape)} float32, {arguments.rounds} rounds of {CALLS} calls, one thread; us, median (least)")
    print(f"{'codec':50}{'encode':>18}{'decode':>18}{'both':>18}")
    for spec, rounds in times.items():
        columns = [[e for e, _ in rounds], [d for _, d in rounds], [e + d for e, d in rounds]]
        cells = (f"{statistics.median(column):.0f} ({min(column):.0f})" for column in columns)
        print(f"{spec:50}" + "".join(f"{cell:>18}" for cell in cells))
    return 0


def _calls(spec: str, link: LinkInfo, x: torch.Tensor) -> tuple[Callable, Callable]:
    """What encodes `x` and what decodes it again."""
    sender, receiver = make_compressor(spec, link), make_compressor(spec, link)
    side = side_inputs(sender, x)
    payload = sender.compress(x, **side)
    beside = travelling(receiver, side)
    return lambda: sender.compress(x, **side), lambda: receiver.decompress(payload, x.device, x.dtype, **beside)


def _median_us(call: Callable) -> float:
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e6 * statistics.median(seconds)


if __name__ == "__main__":
    run_command(main)
