"""Mailboxes: buffers handed from one stage to the next, over Gloo, NCCL or, in one process, a queue.

An outbox owns the buffers that frames are written into and sends them without blocking; an inbox keeps several
receives posted, because a receive that is posted only after another message arrived costs a whole round trip.

* `Loopback`: both ends in one process; a posted buffer is simply taken by the other end.
* `PeerOutbox` and `PeerInbox`: `torch.distributed` point-to-point. Over Gloo a frame is one message in host memory
  (pinned for a CUDA stage); receives are posted with room for any frame, and a frame may be shorter. With a
  `BodyChannel` Gloo carries headers, ERROR and END; a body lies on the GPU and goes over NCCL, whose receive is posted
  once the header has announced its size. A posted NCCL receive occupies the GPU, and both sides must name one size.
  The tests run this, too, with Gloo in the place of NCCL; NCCL itself they do not run.

What the bytes mean is `link.py`'s business.
"""

from __future__ import annotations

import functools
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from pipeline.comm.watchdog import PipelineError
from pipeline.comm.wire import MAX_ERROR_NBYTES, header_nbytes

__all__ = [
    "BodyChannel",
    "FrameBuffer",
    "FrameMemory",
    "FrameSpec",
    "Inbox",
    "LinkError",
    "Loopback",
    "Outbox",
    "PeerInbox",
    "PeerOutbox",
]

T = TypeVar("T")

_POLL_S = 1e-4


class LinkError(PipelineError):
    """Another rank is gone or silent: `peer`, where it is known. The message names link, peer and micro-batch."""

    is_symptom = True

    def __init__(self, message: str, peer: int | None = None) -> None:
        super().__init__(message)
        self.peer = peer


@dataclass(frozen=True, kw_only=True)
class FrameSpec:
    """What both ends of a link know of its frames from the plan.

    `shapes` and `max_nbytes` have one entry per micro-batch of the run: (B, T, H) and the bound of the body.
    """

    name: str
    stage_index: int
    num_trail: int
    codec_id: int
    dtype: torch.dtype
    shapes: Sequence[tuple[int, int, int]]
    max_nbytes: Sequence[int]

    @property
    def header_nbytes(self) -> int:
        return header_nbytes(self.num_trail)

    @property
    def max_body_nbytes(self) -> int:
        return max(self.max_nbytes, default=0)


@dataclass(frozen=True)
class FrameBuffer:
    """Room for one frame, uint8.

    `host` begins with the header, behind which an ERROR has its text. `body` is for that of a DATA frame: the same
    place behind the header, or memory of its own on a GPU.
    """

    host: torch.Tensor
    body: torch.Tensor


@dataclass(frozen=True)
class BodyChannel:
    """What carries a link's bodies apart from their headers: an NCCL group of the two ranks, for one GPU's tensors."""

    group: dist.ProcessGroup
    device: torch.device
    timeout_s: float

    def wait(self, work: dist.Work) -> None:
        """Wait until a send or receive is done. Raises RuntimeError after `timeout_s`.

        NCCL's own wait only puts the stream behind the transfer: the host would go on, count the transfer as its next
        work, and hang there when the peer is gone.
        """
        if self.device.type == "cuda":
            end_s = time.monotonic() + self.timeout_s
            while not work.is_completed():
                if time.monotonic() > end_s:
                    raise RuntimeError(f"nothing moved within {self.timeout_s:g} s (runtime.timeout_s)")
                time.sleep(_POLL_S)
        work.wait()


@dataclass(frozen=True)
class FrameMemory:
    """Where the buffers of a link's end lie; `pin` for copies to and from a GPU."""

    spec: FrameSpec
    pin: bool = False
    channel: BodyChannel | None = None

    def allocate(self) -> FrameBuffer:
        header, nbytes = self.spec.header_nbytes, self.spec.max_body_nbytes
        in_host = MAX_ERROR_NBYTES if self.channel else max(MAX_ERROR_NBYTES, nbytes)
        host = torch.empty(header + in_host, dtype=torch.uint8, pin_memory=self.pin and self.channel is None)
        if self.channel is None:
            return FrameBuffer(host, host[header:])
        return FrameBuffer(host, torch.empty(nbytes, dtype=torch.uint8, device=self.channel.device))


class Outbox(Protocol):
    def acquire(self) -> FrameBuffer:
        """A free buffer of the link's size; waits for the oldest send when there is none."""

    def allocate(self) -> FrameBuffer:
        """One more buffer, for what may not wait."""

    def post(self, buffer: FrameBuffer, nbytes: int, *, is_data: bool) -> None:
        """Send header and `nbytes` of body without waiting; other frames than DATA have it behind the header."""

    def flush(self) -> None:
        """Wait until every posted frame has been taken over by the transport."""


class Inbox(Protocol):
    def take(self, microbatch_index: int) -> FrameBuffer:
        """The next frame's buffer; what lies in `host` is complete."""

    def complete(self, buffer: FrameBuffer, nbytes: int) -> None:
        """Make sure that the `nbytes` of a DATA frame's body have arrived."""

    def recycle(self, buffer: FrameBuffer, microbatch_index: int) -> None:
        """Give back the buffer that held this micro-batch's frame."""

    def discard(self) -> None:
        """Wait for the frames that receives are posted for, and drop them."""


class Loopback:
    """Outbox and inbox in one, for stages of one process."""

    def __init__(self, spec: FrameSpec) -> None:
        self._spec, self._memory = spec, FrameMemory(spec)
        self._free: deque[FrameBuffer] = deque()
        self._posted: deque[FrameBuffer] = deque()

    def acquire(self) -> FrameBuffer:
        return self._free.popleft() if self._free else self.allocate()

    def allocate(self) -> FrameBuffer:
        return self._memory.allocate()

    def post(self, buffer: FrameBuffer, nbytes: int, *, is_data: bool) -> None:
        self._posted.append(buffer)

    def flush(self) -> None:
        pass

    def take(self, microbatch_index: int) -> FrameBuffer:
        if not self._posted:
            raise LinkError(f"link {self._spec.name}: no frame for micro-batch {microbatch_index} was sent")
        return self._posted.popleft()

    def complete(self, buffer: FrameBuffer, nbytes: int) -> None:
        pass

    def recycle(self, buffer: FrameBuffer, microbatch_index: int) -> None:
        self._free.append(buffer)

    def discard(self) -> None:
        pass


class PeerOutbox:
    """Non-blocking sends to one rank out of a pool of buffers.

    `isend` reads the live buffer until its handle is waited on, so a buffer is reused only after that.
    """

    def __init__(self, spec: FrameSpec, memory: FrameMemory, *, peer: int, tag: int, depth: int) -> None:
        self._spec, self._memory, self._peer, self._tag = spec, memory, peer, tag
        self._free = deque(self.allocate() for _ in range(depth))
        self._pending: deque[tuple[FrameBuffer, dist.Work, dist.Work | None]] = deque()

    def acquire(self) -> FrameBuffer:
        if not self._free:
            self._wait_oldest()
        return self._free.popleft()

    def allocate(self) -> FrameBuffer:
        return self._memory.allocate()

    def post(self, buffer: FrameBuffer, nbytes: int, *, is_data: bool) -> None:
        channel, moving = self._memory.channel if is_data else None, None
        message = buffer.host[: self._spec.header_nbytes + (0 if channel else nbytes)]
        sending = self._guard(lambda: _started(dist.isend(message, self._peer, tag=self._tag)))
        if channel is not None and nbytes:
            body, group = buffer.body[:nbytes], channel.group
            moving = self._guard(lambda: _started(dist.isend(body, self._peer, group=group)))
        self._pending.append((buffer, sending, moving))

    def flush(self) -> None:
        while self._pending:
            self._wait_oldest()

    def _wait_oldest(self) -> None:
        buffer, sending, moving = self._pending.popleft()
        self._guard(sending.wait)
        if self._memory.channel is not None and moving is not None:
            self._guard(functools.partial(self._memory.channel.wait, moving))
        self._free.append(buffer)

    def _guard(self, operation: Callable[[], T]) -> T:
        return _named(f"link {self._spec.name}: sending to rank {self._peer}", self._peer, operation)


class PeerInbox:
    """Receives from one rank, posted `depth` deep so that no frame waits a round trip for its receive."""

    def __init__(
        self, spec: FrameSpec, memory: FrameMemory, *, peer: int, tag: int, depth: int, first_microbatch: int = 0
    ) -> None:
        self._spec, self._channel, self._peer, self._tag = spec, memory.channel, peer, tag
        self._last = len(spec.shapes)  # the END frame's place
        self._depth = depth
        self._pending: deque[tuple[FrameBuffer, dist.Work]] = deque()
        for microbatch_index in range(first_microbatch, first_microbatch + depth):
            if microbatch_index <= self._last:
                self._post(memory.allocate())

    def take(self, microbatch_index: int) -> FrameBuffer:
        buffer, work = self._pending.popleft()
        self._guard(work.wait, f"frame of micro-batch {microbatch_index}")
        return buffer

    def complete(self, buffer: FrameBuffer, nbytes: int) -> None:
        channel = self._channel
        if channel is not None and nbytes:
            body = buffer.body[:nbytes]
            self._guard(lambda: channel.wait(_started(dist.irecv(body, self._peer, group=channel.group))), "body")

    def recycle(self, buffer: FrameBuffer, microbatch_index: int) -> None:
        if microbatch_index + self._depth <= self._last:
            self._post(buffer)

    def discard(self) -> None:
        while self._pending:
            _, work = self._pending.popleft()
            self._guard(work.wait, "what follows an error")

    def _post(self, buffer: FrameBuffer) -> None:
        work = self._guard(lambda: _started(dist.irecv(buffer.host, self._peer, tag=self._tag)), "posting")
        self._pending.append((buffer, work))

    def _guard(self, operation: Callable[[], T], what: str) -> T:
        return _named(f"link {self._spec.name}: receiving from rank {self._peer}, {what}", self._peer, operation)


def _started(work: dist.Work | None) -> dist.Work:
    """Torch starts nothing, and gives None, on a rank outside the group."""
    assert work is not None
    return work


def _named(doing: str, peer: int, operation: Callable[[], T]) -> T:
    """Run a torch.distributed operation; its RuntimeError becomes a LinkError that says what was being done.

    Torch puts a place in its source in front of its messages, and general advice or a C++ stack behind them.
    """
    try:
        return operation()
    except RuntimeError as e:
        cause = (str(e).strip() or type(e).__name__).splitlines()[0]
        cause = re.sub(r"^\[\S+:\d+\] ", "", cause).partition(". This is typically")[0]
        raise LinkError(f"{doing}: {cause}", peer) from e
