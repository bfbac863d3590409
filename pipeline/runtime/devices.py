"""Which device, threads and link backend a rank uses."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from pipeline.comm.world import World
from pipeline.config.schema import RunConfig
from pipeline.partition.plan import Plan

__all__ = ["available_cores", "choose_device", "choose_threads", "link_backend", "stage_devices"]


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
            raise ValueError(f"device {setting!r}: this machine has no usable GPU")
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


def link_backend(setting: str, devices: list[tuple[str, str]]) -> str:
    """`gloo` or `nccl` for the links, from (host, device) of every rank.

    NCCL takes one rank per GPU. Raises ValueError when it is asked for without that.
    """
    fit = all(device != "cpu" for _, device in devices) and len(set(devices)) == len(devices)
    if setting == "nccl" and not (fit and dist.is_nccl_available()):
        raise ValueError(f"runtime.backend is nccl, which needs one GPU per rank; the ranks have {devices}")
    if setting == "auto":
        return "nccl" if fit and dist.is_nccl_available() else "gloo"
    return setting


def choose_threads(setting: int, world: World) -> int:
    """Threads per rank: the setting, or the cores divided among the ranks of this machine."""
    return setting or max(1, available_cores() // world.local_world_size)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
