"""Speed and memory of the codecs on one CPU thread, beside a plain copy and bitsandbytes in the same run.

    python benchmarks/codecs.py                        # the published methods
    python benchmarks/codecs.py "outlier(channels=8, inner=int4)" int8 --json codecs.json

The input is (2048, 2048) float32 with outlier channels. Every round times each codec once, a copy right
before it and bitsandbytes right after nf4, in CPU seconds of the process; the figures are medians of the
rounds' ratios. Both keep other work on the machine from favouring a side. The copy goes into memory that has
been touched before; results of decompress are fresh tensors, freed before the next call, as in a runner.
GB/s count the float32 side.

Before any timing, the bytes of compiled loops are compared with those of the torch operations, and nf4 and
fp4 with bitsandbytes. The first call of each codec is timed apart: it compiles, because the benchmark starts
with an empty cache (`--warm` keeps the machine's). Peak extra memory is the growth of the resident set during
one compress and one decompress of a fresh codec object: payload, scratch and result included, input not.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from compressors.console import run_command

SHAPE = (1, 2048, 2048)
BITSANDBYTES = "bitsandbytes nf4"
DEFAULT_SPECS = [
    *("none", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", *(f"int{n}" for n in range(8, 1, -1))),
    *("nf4", "fp4", "mxfp4", "hqq4", "hqq3", "hqq2", "hqq1"),
    "block_rowcol_mean(block_tokens=2, block_channels=2)",
    *("hadamard(int4)", "outlier(channels=8, inner=int4)", "topk(density=0.1)", "zstd(bf16, item_size=2)"),
]
# what the project promises, of the ratios in `compare`
TARGETS = {
    "nf4 compress, times bitsandbytes": 10.0,
    "nf4 decompress, times bitsandbytes": 1.0,
    "int8 compress, times the copy": 0.2,
    "int8 decompress, times the copy": 0.5,
}


def parse_arguments() -> argparse.Namespace:
    from pipeline.config.options import path_option

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("specs", nargs="*", default=DEFAULT_SPECS, help="codecs, default: the built-in family")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warm", action="store_true", help="use compiled loops that the machine has cached")
    parser.add_argument("--json", type=path_option, help="write the figures there")
    return parser.parse_args()


def cpu_seconds(call) -> float:
    """CPU time of one call; its result is freed after the clock stops."""
    start = time.process_time()
    result = call()
    elapsed = time.process_time() - start
    del result
    return elapsed


def peak_growth_mib(call) -> float | None:
    """MiB by which the resident set grows at most during `call`; None where Linux cannot say."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_mib("VmRSS")
        call()
        return resident_mib("VmHWM") - before
    except OSError:
        return None


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, as a process that has run for a while mostly does.

    Its thresholds move with the sizes that it has seen: without this, whichever codec is timed first after one
    of their moves pays page faults for its result.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    mmap_threshold, trim_threshold = -3, -1
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, 2**31 - 1)


def resident_mib(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def check_results(x, specs) -> None:
    """Compiled loops against torch operations, table codes against bitsandbytes; raises on any difference."""
    import torch

    from compressors import make_compressor
    from compressors.bitpack import split_bytes
    from compressors.rows import RowCodec

    for spec in specs:
        codec, reference = make_compressor(spec), make_compressor(spec)
        payload = codec.compress(x)
        decoded = make_compressor(spec).decompress(payload, x.device, x.dtype)
        if isinstance(codec, RowCodec):
            reference.encode_cpu, reference.decode_cpu = reference.encode, reference.decode
            if not torch.equal(payload.data, reference.compress(x).data):
                raise SystemExit(f"{spec}: the compiled loop writes other bytes than the torch operations")
            if not torch.equal(decoded, reference.decompress(payload, x.device, x.dtype)):
                raise SystemExit(f"{spec}: the compiled loop reads other values than the torch operations")
        if spec in ("nf4", "fp4") and (functional := bitsandbytes_functional()):
            absmax, codes = split_bytes(payload.data, *codec.sections(*x.shape[1:]))
            packed, state = functional.quantize_4bit(x[0], quant_type=spec, blocksize=64)
            theirs = functional.dequantize_4bit(packed, state)
            same = torch.equal(codes.flatten(), packed.flatten()) and torch.equal(absmax.flatten(), state.absmax)
            if not same or not torch.equal(decoded[0], theirs):
                raise SystemExit(f"{spec}: codes, absmax or values differ from bitsandbytes")


def bitsandbytes_functional():
    """bitsandbytes.functional, or None where it is not installed."""
    try:
        import bitsandbytes.functional as functional
    except ImportError:
        return None
    return functional


def measure(specs: list[str], rounds: int) -> dict:
    """{spec: {first_call_s, compress_s, decompress_s, ...}} with a list of seconds a round, and memory."""
    import torch

    from compressors import make_compressor
    from compressors.check import hidden_states

    torch.set_num_threads(1)
    x = hidden_states(SHAPE)
    copy_target = x.clone()
    figures: dict[str, dict] = {}
    codecs, payloads = {}, {}
    for spec in specs:
        codecs[spec] = make_compressor(spec)
        first_s = cpu_seconds(lambda s=spec: codecs[s].decompress(codecs[s].compress(x), x.device, x.dtype))
        figures[spec] = {"first_call_s": first_s}
    check_results(x, specs)
    for spec in specs:
        fresh = make_compressor(spec)
        kept: list = []
        figures[spec]["compress_peak_mib"] = peak_growth_mib(lambda c=fresh, k=kept: k.append(c.compress(x)))
        payload = kept[0]
        figures[spec]["decompress_peak_mib"] = peak_growth_mib(
            lambda c=fresh, p=payload: c.decompress(p, x.device, x.dtype)
        )
        figures[spec] |= {"bits_per_value": 8 * payload.nbytes / x.numel(), "causal": fresh.causal}
        payloads[spec] = payload
    contenders = {
        spec: (
            lambda s=spec: codecs[s].compress(x),
            lambda s=spec: codecs[s].decompress(payloads[s], x.device, x.dtype),
        )
        for spec in specs
    }
    functional = bitsandbytes_functional()
    if functional and "nf4" in specs:
        packed, state = functional.quantize_4bit(x[0], quant_type="nf4", blocksize=64)
        contenders[BITSANDBYTES] = (
            lambda: functional.quantize_4bit(x[0], quant_type="nf4", blocksize=64),
            lambda: functional.dequantize_4bit(packed, state),
        )
        figures[BITSANDBYTES] = {}
    order = sorted(contenders, key=lambda name: "nf4" in name)  # bitsandbytes right after nf4
    for direction, calls in enumerate(("compress", "decompress")):
        for name in order:
            figures[name] |= {f"{calls}_s": [], f"{calls}_copy_s": []}
        for _ in range(rounds):
            for name in order:
                figures[name][f"{calls}_copy_s"].append(cpu_seconds(lambda: copy_target.copy_(x)))
                figures[name][f"{calls}_s"].append(cpu_seconds(contenders[name][direction]))
    return figures


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds of numerator / denominator."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


def compare(figures: dict) -> dict[str, float]:
    """The ratios that TARGETS names, as far as they were measured."""
    ratios = {}
    for direction in ("compress", "decompress"):
        if "int8" in figures:
            ratios[f"int8 {direction}, times the copy"] = times_copy(figures["int8"], direction)
        if BITSANDBYTES in figures:
            ratios[f"nf4 {direction}, times bitsandbytes"] = median_ratio(
                figures[BITSANDBYTES][f"{direction}_s"], figures["nf4"][f"{direction}_s"]
            )
    return ratios


def times_copy(figures: dict, direction: str) -> float:
    """Speed of `direction` as a multiple of the copy's."""
    return median_ratio(figures[f"{direction}_copy_s"], figures[f"{direction}_s"])


def print_table(figures: dict) -> None:
    nbytes = 4 * SHAPE[1] * SHAPE[2]
    copy_s = statistics.median(t for f in figures.values() for t in f["compress_copy_s"])
    print(f"copy: {nbytes / copy_s / 1e9:.2f} GB/s, {nbytes / 2**20:.0f} MiB of float32")
    titles = ("first call", "compress", "decompress", "compress", "decompress", "peak extra", "peak extra")
    units = ("s", "x copy", "x copy", "GB/s", "GB/s", "MiB", "MiB")
    for row in (("codec", "bits", *titles), ("", "a value", *units)):
        print(f"{row[0]:52} {row[1]:>8}" + "".join(f" {column:>10}" for column in row[2:]))
    for spec, f in figures.items():
        ratios = [times_copy(f, direction) for direction in ("compress", "decompress")]
        speeds = [nbytes / statistics.median(f[f"{d}_s"]) / 1e9 for d in ("compress", "decompress")]
        peaks = [f.get("compress_peak_mib"), f.get("decompress_peak_mib")]
        columns = [f.get("first_call_s"), *ratios, *speeds, *peaks]
        cells = "".join(f" {'-' if c is None else format(c, '.2f'):>10}" for c in columns)
        bits = format(f["bits_per_value"], ".3f") if "bits_per_value" in f else "-"
        print(f"{spec:52} {bits:>8}{cells}")


def main() -> int:
    arguments = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as cache:
        if not arguments.warm:
            os.environ["NUMBA_CACHE_DIR"] = cache
        figures = measure(arguments.specs, arguments.rounds)
    print_table(figures)
    ratios = compare(figures)
    for name, target in TARGETS.items():
        if name in ratios:
            verdict = "reached" if ratios[name] >= target else "MISSED"
            print(f"{name}: {ratios[name]:.2f} (target {target:g}, {verdict})")
        else:
            print(f"{name}: not measured")
    if arguments.json:
        arguments.json.write_text(json.dumps({"figures": figures, "ratios": ratios}, indent=1))
    return 0


if __name__ == "__main__":
    run_command(main)
