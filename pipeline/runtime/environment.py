"""What this session's losses may depend on beside config, text and weights: devices, threads, CPUs, versions."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from pipeline.comm.control import Control
from pipeline.records.environment import Environment, software_versions

__all__ = ["gather_environment"]

# Libraries choose kernels by these.
_VARIABLES = (
    *("ATEN_CPU_CAPABILITY", "CUBLAS_WORKSPACE_CONFIG", "DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA", "MKL_CBWR"),
    *("MKL_ENABLE_INSTRUCTIONS", "NVIDIA_TF32_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA"),
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)


def gather_environment(control: Control, devices: dict[int, torch.device], threads: int) -> Environment:
    """Of all ranks, the same on every rank; where stages differ, each one's word stands beside its number.

    By stage and not by rank: one process that plays all nodes computes what four ranks compute.
    """
    variables = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    common = {"threads": str(threads), **software_versions(), "cpu": _cpu(), "variables": " ".join(variables) or "none"}
    own = {str(index): {"device": _device(device), **common} for index, device in devices.items()}
    stages: dict[str, dict[str, Any]] = {i: words for rank in control.gather(own) for i, words in rank.items()}
    keys = dict.fromkeys(key for words in stages.values() for key in words)
    return {key: _one_or_each({index: words.get(key, "not there") for index, words in stages.items()}) for key in keys}


def _one_or_each(by_stage: dict[str, str]) -> str:
    if len(set(by_stage.values())) == 1:
        return next(iter(by_stage.values()))
    return ", ".join(f"{by_stage[index]} at stage {index}" for index in sorted(by_stage, key=int))


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _cpu() -> str:
    """The model, as far as the system tells it, and the instruction set that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"
