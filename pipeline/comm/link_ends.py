"""All link ends of a rank, opened from the plan, and the chain that they form.

A chain is the links in the order in which a pass takes them, back to node 0: END follows it, and a failure in the place
of data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist

from pipeline.comm.emulation import Conditions, EmulatedWire
from pipeline.comm.link import Frame, FrameReceiver, FrameSender, LinkSpec
from pipeline.comm.mailbox import (
    Arrivals,
    BodyChannel,
    FrameBuffer,
    FrameMemory,
    Loopback,
    PeerAddress,
    PeerInbox,
    PeerOutbox,
)
from pipeline.comm.world import World
from pipeline.partition.plan import Plan

__all__ = ["Arrival", "Hop", "LinkEnds", "forward_hops", "open_links"]

SEND_DEPTH = 2  # frames of a link that may be on their way while the next one is made


@dataclass(frozen=True)
class Hop:
    """One link of a chain; devices are known for this rank's stages only."""

    src_node: int
    dst_node: int
    src_device: torch.device | None = None
    dst_device: torch.device | None = None
    channel: BodyChannel | None = None


def forward_hops(
    plan: Plan, *, devices: Mapping[int, torch.device], channels: Mapping[int, BodyChannel]
) -> list[Hop]:
    """The way of a pass: stage i to stage i + 1, and from a head on another node back to node 0.

    `channels` has what carries the bodies of each link where the backend is nccl. Results always travel over Gloo.
    """
    hops = [
        Hop(
            link.src_node, link.dst_node, devices.get(link.index), devices.get(link.index + 1), channels.get(link.index)
        )
        for link in plan.links
    ]
    if plan.last_node != 0:
        hops.append(Hop(plan.last_node, 0, devices.get(len(hops))))
    return hops


@dataclass(frozen=True)
class Arrival:
    """A frame with the link that it came over, None in the place of END."""

    link_index: int
    frame: Frame | None
    buffer: FrameBuffer


class LinkEnds:
    """This rank's ends of all links, by link index, and one place where all frames arrive.

    `last_link` is the last of the chain, None where there is none.
    """

    def __init__(
        self,
        senders: Mapping[int, FrameSender],
        receivers: Mapping[int, FrameReceiver],
        arrivals: Arrivals,
        num_links: int,
    ) -> None:
        self.senders, self.receivers = senders, receivers
        self.last_link = num_links - 1 if num_links else None
        self._arrivals = arrivals
        self._open = set(receivers)

    @property
    def is_open(self) -> bool:
        """Whether frames may still come."""
        return bool(self._open)

    def has_arrived(self) -> bool:
        """Whether `take` would not wait."""
        return not self._arrivals.is_empty()

    def wake(self) -> None:
        """Make one `take` return None, from any thread."""
        self._arrivals.wake()

    def take(self) -> Arrival | None:
        """Wait for a frame and check it; None after `wake`.

        Raises LinkError when a peer is gone, BadFrame for damage.
        """
        taken = self._arrivals.take()
        if taken is None:
            return None
        link_index, buffer = taken
        return Arrival(link_index, self.receivers[link_index].open(buffer), buffer)

    def release(self, arrival: Arrival) -> None:
        """The frame is no longer needed."""
        self.receivers[arrival.link_index].release(arrival.buffer)

    def end(self) -> None:
        """On rank 0: let END go around the chain."""
        if 0 in self.senders:
            self.senders[0].end()

    def release_end(self, arrival: Arrival) -> None:
        """A stream has ended: end the next of the chain, and wait until nothing of this one is left."""
        self._open.remove(arrival.link_index)
        if arrival.link_index + 1 in self.senders:
            self.senders[arrival.link_index + 1].end()
        self.receivers[arrival.link_index].close()

    def flush(self) -> None:
        """Wait until every frame has left."""
        for sender in self.senders.values():
            sender.flush()

    def abandon(self) -> None:
        """The connections are broken: nothing waits for them when this returns."""
        for receiver in self.receivers.values():
            receiver.abandon()


def open_links(
    hops: Sequence[Hop],
    specs: Mapping[int, LinkSpec],
    world: World,
    *,
    receives_ahead: int,
    groups: Mapping[int, dist.ProcessGroup] = MappingProxyType({}),
    emulated: Mapping[int, Conditions] = MappingProxyType({}),
) -> LinkEnds:
    """This rank's ends of a chain, receives posted. `specs`, by link index, are those of this rank's links at least.

    `groups`, by rank, are `Control.connect`'s; what is not there goes by the group of all.

    Frames of the `emulated` links come as late as their conditions make them; links from one rank to another that are
    under the same conditions share one wire.
    """
    arrivals = Arrivals()
    wires: dict[tuple[int, Conditions], EmulatedWire] = {}
    senders: dict[int, FrameSender] = {}
    receivers: dict[int, FrameReceiver] = {}
    for index, hop in enumerate(hops):
        src, dst = world.rank_of(hop.src_node), world.rank_of(hop.dst_node)
        if world.rank not in (src, dst):
            continue
        spec, apart, conditions = specs[index], hop.channel is not None, emulated.get(index)

        def memory(
            device: torch.device | None,
            spec: LinkSpec = spec,
            hop: Hop = hop,
            conditions: Conditions | None = conditions,
        ) -> FrameMemory:
            is_gpu = device is not None and device.type == "cuda"
            return FrameMemory(
                spec.max_body_nbytes,
                spec.max_tail_nbytes,
                pin=is_gpu,
                channel=hop.channel,
                stamped=conditions is not None,
            )

        if src == dst:
            loopback = Loopback(index, memory(None), arrivals)
            senders[index], receivers[index] = FrameSender(spec, loopback), FrameReceiver(spec, loopback)
        elif src == world.rank:
            wire = None
            if conditions is not None:
                wire = wires.setdefault((dst, conditions), EmulatedWire(conditions, seed=index))
            address = PeerAddress(spec.name, dst, index, groups.get(dst))
            # A body leaves its buffer only once the other end has opened the frame, so that buffers must hold what
            # receives hold elsewhere.
            depth = max(SEND_DEPTH, receives_ahead) if apart else SEND_DEPTH
            outbox = PeerOutbox(address, memory(hop.src_device), depth=depth, wire=wire)
            senders[index] = FrameSender(spec, outbox, apart=apart, receives_ahead=receives_ahead)
        else:
            address = PeerAddress(spec.name, src, index, groups.get(src))
            inbox = PeerInbox(index, address, memory(hop.dst_device), arrivals, depth=receives_ahead)
            receivers[index] = FrameReceiver(spec, inbox, apart=apart)
    return LinkEnds(senders, receivers, arrivals, len(hops))
