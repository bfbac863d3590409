"""Which device, threads and link backend a rank uses."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from pipeline.comm.world import World
from pipeline.config.schema import RunConfig
from pipeline.partition.plan import Plan

__all__ = [
    "available_cores",
    "choose_device",
    "choose_threads",
    "gpu_identity",
    "link_backend",
    "shared_gpus",
    "stage_devices",
]


def choose_device(setting: str, world: World) -> torch.device:
    """`auto` takes a GPU per local rank (sharing them when there are fewer), or the CPU.

    Raises ValueError for a device that this machine lacks.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "auto":
        setting = "cuda" if num_gpus else "cpu"
    try:
        device = torch.device(setting)
    except RuntimeError as e:
        raise ValueError(f"device {setting!r} is not one of auto, cpu, cuda, cuda:N") from e
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {setting!r} is not one of auto, cpu, cuda, cuda:N")
    if device.type == "cuda":
        if not num_gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            hidden = "" if visible is None else f", CUDA_VISIBLE_DEVICES is {visible!r}: unset that"
            raise ValueError(f"device {setting!r}: this machine has no usable GPU{hidden}, or say runtime.device=cpu")
        device = torch.device("cuda", world.local_rank % num_gpus if device.index is None else device.index)
        if device.index >= num_gpus:
            raise ValueError(f"device {setting!r}: this machine has {num_gpus} GPUs")
    return device


def stage_devices(config: RunConfig, plan: Plan, world: World) -> dict[int, torch.device]:
    """Device of each stage that this rank holds, by stage index."""
    devices = {}
    for stage in plan.stages:
        if world.rank_of(stage.node) == world.rank:
            own = config.partition.nodes[stage.node].device if config.partition.nodes else None
            devices[stage.stage_index] = choose_device(own or config.runtime.device, world)
    return devices


def gpu_identity(device: torch.device) -> str | None:
    """What tells a GPU from every other, on any machine; None for a CPU.

    Names do not: where each rank sees one GPU only, all of them call it cuda:0, and containers that share one have
    host names of their own.
    """
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def shared_gpus(gpus: Sequence[str | None]) -> dict[str, list[int]]:
    """Ranks by the GPU that they share, from the GPU (or None) of every rank."""
    ranks: dict[str, list[int]] = {}
    for rank, gpu in enumerate(gpus):
        if gpu is not None:
            ranks.setdefault(gpu, []).append(rank)
    return {gpu: sharing for gpu, sharing in ranks.items() if len(sharing) > 1}


def link_backend(setting: str, gpus: Sequence[str | None]) -> str:
    """`gloo` or `nccl` for the links, from the GPU (or None) of every rank.

    `auto` is Gloo, with pinned buffers for GPUs, until NCCL has been run. NCCL takes one rank per GPU; raises
    ValueError when it is asked for without that.
    """
    if setting == "auto":
        return "gloo"
    if setting == "nccl":
        without = [rank for rank, gpu in enumerate(gpus) if gpu is None]
        why = [f"rank {rank} has no GPU" for rank in without]
        why += [f"ranks {', '.join(map(str, ranks))} share GPU {gpu}" for gpu, ranks in shared_gpus(gpus).items()]
        if not dist.is_nccl_available():
            why.append("this build of torch has no NCCL")
        if why:
            raise ValueError(
                f"runtime.backend is nccl, which needs one GPU per rank: {'; '.join(why)}. "
                "Use runtime.backend=gloo, whose buffers are pinned for GPUs"
            )
    return setting


def choose_threads(setting: int, world: World) -> int:
    """Threads per rank: the setting, or the cores divided among the ranks of this machine."""
    return setting or max(1, available_cores() // world.local_world_size)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
