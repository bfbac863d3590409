"""All link ends of a rank, opened from the plan: what both ends know of their frames, and which buffers carry them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from compressors import Compressor
from pipeline.comm.link import FrameReceiver, FrameSender
from pipeline.comm.mailbox import FrameSpec, Loopback, PeerInbox, PeerOutbox, SizeRule
from pipeline.comm.world import World
from pipeline.data.windows import MicroBatch
from pipeline.partition.plan import Plan

__all__ = ["LinkEnds", "frame_specs", "make_gradient_links", "make_links"]

SEND_DEPTH = 2  # frames of a link that may be on their way while the next one is made


@dataclass(frozen=True)
class LinkEnds:
    """This rank's ends of all links, by link index; the link behind the last stage carries losses."""

    senders: Mapping[int, FrameSender]
    receivers: Mapping[int, FrameReceiver]


def make_links(
    plan: Plan,
    codecs: Sequence[Compressor],
    specs: Sequence[FrameSpec],
    world: World,
    *,
    devices: Mapping[int, torch.device],
    backend: str,
    receives_ahead: int,
    first_microbatch: int,
    groups: Mapping[int, dist.ProcessGroup],
) -> LinkEnds:
    """Open this rank's link ends, of which `specs` come from `frame_specs`, and post their receives.

    `groups` has one NCCL group per link where the backend is nccl. Losses always travel over Gloo.
    """
    hops = {}
    for link, codec in zip(plan.links, codecs):
        if backend != "nccl":
            size_rule = SizeRule.SHORTER_ALLOWED
        else:
            size_rule = SizeRule.EXACT if codec.fixed_size else SizeRule.HEADER_FIRST
        i = link.index
        hops[i] = _Hop(
            specs[i], link.src_node, link.dst_node, devices.get(i), devices.get(i + 1), size_rule, groups.get(i)
        )
    if plan.last_node != 0:
        end = len(plan.links)
        hops[end] = _Hop(specs[end], plan.last_node, 0, devices.get(end))
    return _open(hops, world, receives_ahead=receives_ahead, first_microbatch=first_microbatch)


def make_gradient_links(
    plan: Plan,
    microbatches: Sequence[MicroBatch],
    world: World,
    *,
    hidden_size: int,
    dtype: torch.dtype,
    devices: Mapping[int, torch.device],
) -> LinkEnds:
    """Links for raw hidden states forward and raw float32 gradients back, always over Gloo.

    With S stages, link i < S - 1 leads from stage i to stage i + 1, and link S - 1 + i from there back.
    """
    shapes = [(*m.shape, hidden_size) for m in microbatches]
    num_links = len(plan.links)
    hops = {}
    for link in plan.links:
        ends = [(link.src_node, devices.get(link.index)), (link.dst_node, devices.get(link.index + 1))]
        for index, what, its_dtype, (src, dst) in (
            (link.index, "raw", dtype, ends),
            (num_links + link.index, "gradient", torch.float32, ends[::-1]),
        ):
            spec = FrameSpec(
                name=f"{what}:{link.name}",
                stage_index=index,
                num_trail=0,
                codec_id=0,
                dtype=its_dtype,
                shapes=shapes,
                max_nbytes=[its_dtype.itemsize * math.prod(shape) for shape in shapes],
            )
            hops[index] = _Hop(spec, src[0], dst[0], src[1], dst[1])
    return _open(hops, world, receives_ahead=1, first_microbatch=0)


@dataclass(frozen=True)
class _Hop:
    """One direction of one link; devices are known for this rank's stages only."""

    spec: FrameSpec
    src_node: int
    dst_node: int
    src_device: torch.device | None = None
    dst_device: torch.device | None = None
    size_rule: SizeRule = SizeRule.SHORTER_ALLOWED
    group: dist.ProcessGroup | None = None


def _open(hops: Mapping[int, _Hop], world: World, *, receives_ahead: int, first_microbatch: int) -> LinkEnds:
    """This rank's ends, receives posted."""
    senders: dict[int, FrameSender] = {}
    receivers: dict[int, FrameReceiver] = {}
    for index, hop in hops.items():
        src, dst, spec = world.rank_of(hop.src_node), world.rank_of(hop.dst_node), hop.spec
        if src == dst == world.rank:
            loopback = Loopback(spec)
            senders[index] = FrameSender(spec, loopback, first_microbatch=first_microbatch)
            receivers[index] = FrameReceiver(spec, loopback, first_microbatch=first_microbatch)
            continue
        common: dict[str, Any] = {"tag": index, "group": hop.group, "size_rule": hop.size_rule}
        on_gpu = hop.group is not None
        if src == world.rank:
            place = _buffer_place(hop.src_device, on_gpu)
            outbox = PeerOutbox(spec, peer=dst, depth=SEND_DEPTH, **common, **place)
            senders[index] = FrameSender(spec, outbox, first_microbatch=first_microbatch, receives_ahead=receives_ahead)
        if dst == world.rank:
            place = _buffer_place(hop.dst_device, on_gpu)
            inbox = PeerInbox(
                spec, peer=src, depth=receives_ahead, first_microbatch=first_microbatch, **common, **place
            )
            receivers[index] = FrameReceiver(spec, inbox, first_microbatch=first_microbatch)
    return LinkEnds(senders, receivers)


def frame_specs(
    plan: Plan,
    codecs: Sequence[Compressor],
    microbatches: Sequence[MicroBatch],
    *,
    hidden_size: int,
    dtype: torch.dtype,
) -> list[FrameSpec]:
    """What both ends know of each link's frames; the last spec is that of the losses."""
    shapes = [(*m.shape, hidden_size) for m in microbatches]
    specs = [
        FrameSpec(
            name=link.name,
            stage_index=link.index,
            num_trail=link.index,
            codec_id=codec.codec_id(),
            dtype=dtype,
            shapes=shapes,
            max_nbytes=[codec.max_nbytes(shape) for shape in shapes],
        )
        for link, codec in zip(plan.links, codecs)
    ]
    num_links = len(plan.links)
    result = FrameSpec(
        name=f"result:node{plan.last_node}->node0",
        stage_index=num_links,
        num_trail=num_links,
        codec_id=0,
        dtype=torch.float32,
        shapes=[(1, m.num_scored, 2) for m in microbatches],
        max_nbytes=[8 * m.num_scored for m in microbatches],
    )
    return [*specs, result]


def _buffer_place(stage_device: torch.device | None, on_gpu: bool) -> dict[str, Any]:
    """Where a link's buffers lie: on the GPU for NCCL, else in host memory, pinned for a GPU stage."""
    is_cuda = stage_device is not None and stage_device.type == "cuda"
    if on_gpu:
        return {"device": stage_device, "pin_memory": False}
    return {"device": torch.device("cpu"), "pin_memory": is_cuda}
