"""What a rank tells rank 0 at the end of a job: memory, where its time went, what it sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pipeline.comm.link_ends import LinkEnds
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.memory import peak_rss_bytes, pss_bytes
from pipeline.runtime.stage_times import StageTimes

__all__ = ["own_gpus", "rank_report"]


def own_gpus(deployment: Deployment) -> set[torch.device]:
    """Those that this rank's stages are on."""
    return {device for device in deployment.devices.values() if device.type == "cuda"}


def rank_report(deployment: Deployment, times: Mapping[int, StageTimes], ends: LinkEnds) -> dict[str, Any]:
    """As JSON; `times` are those of this rank's stages, by stage index."""
    rank, gpus = deployment.control.world.rank, own_gpus(deployment)
    return {
        "rank": rank,
        "host": deployment.control.host,
        "threads": deployment.threads,
        "peak_rss_bytes": peak_rss_bytes(),
        "pss_bytes": pss_bytes(),
        "gpu": deployment.gpus[rank],
        "peak_cuda_bytes": sum(map(torch.cuda.max_memory_allocated, gpus)) if gpus else None,
        "cuda_in_use_bytes": sum(map(_in_use_nbytes, gpus)) if gpus else None,
        "stages": {
            str(index): {"device": str(deployment.devices[index]), **spent.as_dict()} for index, spent in times.items()
        },
        "sent": {sender.spec.name: sender.traffic.as_dict() for sender in ends.senders.values()},
    }


def _in_use_nbytes(gpu: torch.device) -> int:
    """Of a GPU's memory, by all processes: contexts and libraries too, which torch's own count leaves out."""
    free_nbytes, total_nbytes = torch.cuda.mem_get_info(gpu)
    return total_nbytes - free_nbytes
