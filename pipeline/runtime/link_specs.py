"""What the links of a job may carry: derived alike on both ends, before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from compressors import Compressor
from pipeline.comm.link import HiddenSpec, LinkSpec, ResultSpec
from pipeline.comm.wire import WireFormat
from pipeline.data.windows import MicroBatch
from pipeline.partition.passes import Pass, PassKind
from pipeline.partition.plan import Plan

__all__ = ["Workload", "gradient_specs", "link_specs"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Which passes a job may make: SCORE passes of `microbatches`, others with so many rows and tokens in all."""

    microbatches: Sequence[MicroBatch] = ()
    max_rows: int = 0
    max_tokens: int = 0


def link_specs(
    plan: Plan, codecs: Mapping[int, Compressor], workload: Workload, *, hidden_size: int, dtype: torch.dtype
) -> dict[int, LinkSpec]:
    """By link index as `codecs`, and of the link of results, which is there where the head is not on node 0."""
    shapes = [m.shape for m in workload.microbatches]
    specs: dict[int, LinkSpec] = {
        index: HiddenSpec(
            name=plan.links[index].name,
            wire=WireFormat(link_index=index, num_trail=index, codec_ids=(codec.codec_id(),), dtype=dtype),
            hidden_size=hidden_size,
            bound=lambda kind, shape, codec=codec: codec.max_nbytes(shape),
            microbatch_shapes=shapes,
            max_rows=workload.max_rows,
            max_tokens=workload.max_tokens,
        )
        for index, codec in sorted(codecs.items())
    }
    if plan.last_node != 0:
        num_scored = [m.num_scored for m in workload.microbatches]

        def bound(work: Pass) -> int:
            if work.kind is not PassKind.SCORE or work.microbatch_index is None:
                raise ValueError(f"no result is due of a {work}")
            return 8 * num_scored[work.microbatch_index]

        num_links = len(plan.links)
        specs[num_links] = ResultSpec(
            name=f"result:node{plan.last_node}->node0",
            wire=WireFormat(link_index=num_links, num_trail=num_links, codec_ids=()),
            bound=bound,
            max_nbytes=8 * max(num_scored, default=0),
        )
    return specs


def gradient_specs(
    plan: Plan, microbatches: Sequence[MicroBatch], *, hidden_size: int, dtype: torch.dtype
) -> dict[int, LinkSpec]:
    """Raw hidden states on the links, then raw float32 gradients back, in the order in which a pass takes them."""
    shapes = [m.shape for m in microbatches]
    there = [(f"raw:{link.name}", dtype) for link in plan.links]
    back = [(f"gradient:{link.name}", torch.float32) for link in reversed(plan.links)]
    return {
        index: HiddenSpec(
            name=name,
            wire=WireFormat(link_index=index, num_trail=0, codec_ids=(), dtype=its_dtype),
            hidden_size=hidden_size,
            bound=lambda kind, shape, itemsize=its_dtype.itemsize: itemsize * math.prod(shape),
            microbatch_shapes=shapes,
        )
        for index, (name, its_dtype) in enumerate([*there, *back])
    }
