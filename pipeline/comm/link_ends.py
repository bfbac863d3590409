"""All link ends of a rank, opened from the plan: what both ends know of their frames, and which buffers carry them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from compressors import Compressor
from pipeline.comm.link import FrameReceiver, FrameSender
from pipeline.comm.mailbox import BodyChannel, FrameMemory, FrameSpec, Loopback, PeerInbox, PeerOutbox
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
    specs: Mapping[int, FrameSpec],
    world: World,
    *,
    devices: Mapping[int, torch.device],
    receives_ahead: int,
    first_microbatch: int,
    channels: Mapping[int, BodyChannel],
) -> LinkEnds:
    """Open this rank's link ends, of which `specs` come from `frame_specs`, and post their receives.

    `channels` has what carries the bodies of each link where the backend is nccl. Losses always travel over Gloo.
    """
    hops = {}
    for link in plan.links:
        i = link.index
        if i in specs:
            ends = devices.get(i), devices.get(i + 1)
            hops[i] = _Hop(specs[i], link.src_node, link.dst_node, *ends, channels.get(i))
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
    channel: BodyChannel | None = None


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
        if src == world.rank:
            memory = FrameMemory(spec, pin=_is_gpu(hop.src_device), channel=hop.channel)
            outbox = PeerOutbox(spec, memory, peer=dst, tag=index, depth=SEND_DEPTH)
            senders[index] = FrameSender(spec, outbox, first_microbatch=first_microbatch, receives_ahead=receives_ahead)
        if dst == world.rank:
            memory = FrameMemory(spec, pin=_is_gpu(hop.dst_device), channel=hop.channel)
            inbox = PeerInbox(
                spec, memory, peer=src, tag=index, depth=receives_ahead, first_microbatch=first_microbatch
            )
            receivers[index] = FrameReceiver(spec, inbox, first_microbatch=first_microbatch)
    return LinkEnds(senders, receivers)


def frame_specs(
    plan: Plan,
    codecs: Mapping[int, Compressor],
    microbatches: Sequence[MicroBatch],
    *,
    hidden_size: int,
    dtype: torch.dtype,
) -> dict[int, FrameSpec]:
    """What an end knows of its link's frames, by link index as `codecs`; the last one is that of the losses."""
    shapes = [(*m.shape, hidden_size) for m in microbatches]
    specs = {
        index: FrameSpec(
            name=plan.links[index].name,
            stage_index=index,
            num_trail=index,
            codec_id=codec.codec_id(),
            dtype=dtype,
            shapes=shapes,
            max_nbytes=[codec.max_nbytes(shape) for shape in shapes],
        )
        for index, codec in sorted(codecs.items())
    }
    num_links = len(plan.links)
    specs[num_links] = FrameSpec(
        name=f"result:node{plan.last_node}->node0",
        stage_index=num_links,
        num_trail=num_links,
        codec_id=0,
        dtype=torch.float32,
        shapes=[(1, m.num_scored, 2) for m in microbatches],
        max_nbytes=[8 * m.num_scored for m in microbatches],
    )
    return specs


def _is_gpu(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"
