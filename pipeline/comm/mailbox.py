"""Mailboxes: buffers handed from one stage to the next, over Gloo, NCCL or, in one process, a queue.

An outbox owns the buffers that frames are written into and sends them without blocking. An inbox keeps several receives
posted, because a receive that is posted only after another message arrived costs a whole round trip; a thread of its
own waits for them, since Gloo cannot be polled, and puts what arrives into one `Arrivals` for all links of a rank. It
waits without limit: an idle link is a normal link.

* `Loopback`: both ends in one process; a posted buffer is simply taken by the other end.
* `PeerOutbox` and `PeerInbox`: `torch.distributed` point-to-point. Over Gloo a frame is one message in host memory
  (pinned for a CUDA stage); receives are posted with room for any frame, and a frame may be shorter. With a
  `BodyChannel` Gloo carries headers, failures and END; a body lies on the GPU and goes over NCCL, whose receive is
  posted once the header has announced its size. A posted NCCL receive occupies the GPU, and both sides must name one
  size. The tests run this, too, with Gloo in the place of NCCL; NCCL itself they do not run.

What the bytes mean is `link.py`'s business.
"""

from __future__ import annotations

import datetime
import functools
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from pipeline.comm.emulation import STAMP_NBYTES, EmulatedWire, hold, write_stamp
from pipeline.comm.watchdog import PipelineError
from pipeline.comm.wire import BASE_NBYTES, MAX_NOTE_NBYTES, BadFrame, is_end

__all__ = [
    "Arrivals",
    "BodyChannel",
    "FrameBuffer",
    "FrameMemory",
    "Inbox",
    "LinkError",
    "Loopback",
    "Outbox",
    "PeerAddress",
    "PeerInbox",
    "PeerOutbox",
]

T = TypeVar("T")

_POLL_S = 1e-4
_ABANDON_S = 5.0  # a receive over a broken connection ends at once
_WITHOUT_LIMIT = datetime.timedelta(days=3650)


class LinkError(PipelineError):
    """Another rank is gone or silent: `peer`, where it is known. The message names the link."""

    is_symptom = True

    def __init__(self, message: str, peer: int | None = None) -> None:
        super().__init__(message)
        self.peer = peer


@dataclass(frozen=True)
class FrameBuffer:
    """Room for one frame, uint8.

    `host` begins with the base header. The body of a frame stands behind it, or in `device` on a GPU. `stamped` is
    `host` with an emulated wire's stamp in front.
    """

    host: torch.Tensor
    device: torch.Tensor | None = None
    stamped: torch.Tensor | None = None

    @property
    def message(self) -> torch.Tensor:
        """What goes between hosts."""
        return self.host if self.stamped is None else self.stamped


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
    """Where the buffers of a link's end lie: room for a body and a tail; `pin` for copies to and from a GPU, `stamped`
    for an emulated wire.
    """

    max_body_nbytes: int
    max_tail_nbytes: int
    pin: bool = False
    channel: BodyChannel | None = None
    stamped: bool = False

    @property
    def host_nbytes(self) -> int:
        """Of one buffer in host memory."""
        in_host = MAX_NOTE_NBYTES if self.channel else max(MAX_NOTE_NBYTES, self.max_body_nbytes)
        return BASE_NBYTES + in_host + self.max_tail_nbytes

    def allocate(self) -> FrameBuffer:
        pin = self.pin and self.channel is None
        if self.stamped:
            message = torch.empty(STAMP_NBYTES + self.host_nbytes, dtype=torch.uint8, pin_memory=pin)
            return FrameBuffer(message[STAMP_NBYTES:], stamped=message)
        host = torch.empty(self.host_nbytes, dtype=torch.uint8, pin_memory=pin)
        if self.channel is None:
            return FrameBuffer(host)
        return FrameBuffer(host, torch.empty(self.max_body_nbytes, dtype=torch.uint8, device=self.channel.device))


class Arrivals:
    """What has come in over all links of a rank, in the order of its coming: (link index, buffer)."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[int, FrameBuffer | Exception] | None] = queue.SimpleQueue()

    def put(self, link_index: int, item: FrameBuffer | Exception) -> None:
        """Hand over a buffer that holds a frame, or why there will be none."""
        self._queue.put((link_index, item))

    def wake(self) -> None:
        """Make one `take` return None, from any thread."""
        self._queue.put(None)

    def take(self) -> tuple[int, FrameBuffer] | None:
        """Wait for the next buffer. Raises LinkError when a peer is gone."""
        item = self._queue.get()
        if item is None:
            return None
        link_index, buffer = item
        if isinstance(buffer, Exception):
            raise buffer
        return link_index, buffer

    def is_empty(self) -> bool:
        return self._queue.empty()


class Outbox(Protocol):
    def acquire(self) -> FrameBuffer:
        """A free buffer; waits for the oldest send when there is none."""

    def post(self, buffer: FrameBuffer, nbytes: int, device_nbytes: int) -> None:
        """Send the first bytes of `host`, and of `device`, without waiting."""

    def flush(self) -> None:
        """Wait until every posted frame has been taken over by the transport."""


class Inbox(Protocol):
    def complete(self, buffer: FrameBuffer, device_nbytes: int) -> None:
        """Make sure that the bytes in `device` have arrived."""

    def recycle(self, buffer: FrameBuffer) -> None:
        """Give back a buffer, which waits for another frame."""

    def close(self) -> None:
        """The stream has ended and every buffer is back: leave no posted receive behind.

        Raises LinkError or BadFrame when that cannot be.
        """

    def abandon(self) -> None:
        """The connection is broken: wait until nothing waits for it."""


class Loopback:
    """Outbox and inbox in one, for stages of one process."""

    def __init__(self, link_index: int, memory: FrameMemory, arrivals: Arrivals) -> None:
        self._link_index, self._memory, self._arrivals = link_index, memory, arrivals
        self._free: deque[FrameBuffer] = deque()

    def acquire(self) -> FrameBuffer:
        return self._free.popleft() if self._free else self._memory.allocate()

    def post(self, buffer: FrameBuffer, nbytes: int, device_nbytes: int) -> None:
        self._arrivals.put(self._link_index, buffer)

    def flush(self) -> None:
        pass

    def complete(self, buffer: FrameBuffer, device_nbytes: int) -> None:
        pass

    def recycle(self, buffer: FrameBuffer) -> None:
        self._free.append(buffer)

    def close(self) -> None:
        pass

    def abandon(self) -> None:
        pass


@dataclass(frozen=True)
class PeerAddress:
    """The other end of a link: `name` for messages, the rank, and the tag of the link's messages in the group."""

    name: str
    peer: int
    tag: int
    group: dist.ProcessGroup | None = None

    def named(self, doing: str, operation: Callable[[], T]) -> T:
        """Run a torch.distributed operation; its RuntimeError becomes a LinkError that says what was being done.

        Torch puts a place in its source in front of its messages, and general advice or a C++ stack behind them.
        """
        try:
            return operation()
        except RuntimeError as e:
            cause = (str(e).strip() or type(e).__name__).splitlines()[0]
            cause = re.sub(r"^\[\S+:\d+\] ", "", cause).partition(". This is typically")[0]
            raise LinkError(f"link {self.name}: {doing} rank {self.peer}: {cause}", self.peer) from e


class PeerOutbox:
    """Non-blocking sends to one rank out of a pool of buffers.

    `isend` reads the live buffer until its handle is waited on, so a buffer is reused only after that. With an emulated
    `wire`, which takes `stamped` memory, a frame says when it is due.
    """

    def __init__(
        self, address: PeerAddress, memory: FrameMemory, *, depth: int, wire: EmulatedWire | None = None
    ) -> None:
        self._address, self._channel, self._wire = address, memory.channel, wire
        self._free = deque(memory.allocate() for _ in range(depth))
        self._pending: deque[tuple[FrameBuffer, dist.Work, dist.Work | None]] = deque()

    def acquire(self) -> FrameBuffer:
        if not self._free:
            self._wait_oldest()
        return self._free.popleft()

    def post(self, buffer: FrameBuffer, nbytes: int, device_nbytes: int) -> None:
        peer, tag, group, moving = self._address.peer, self._address.tag, self._address.group, None
        message = buffer.host[:nbytes]
        if buffer.stamped is not None:
            assert self._wire is not None
            write_stamp(buffer.stamped, self._wire.arrival_ns(time.monotonic_ns(), nbytes))
            message = buffer.stamped[: STAMP_NBYTES + nbytes]
        sending = self._guard(lambda: _started(dist.isend(message, peer, group, tag)))
        if device_nbytes:
            assert self._channel is not None and buffer.device is not None
            body, apart = buffer.device[:device_nbytes], self._channel.group
            moving = self._guard(lambda: _started(dist.isend(body, peer, apart)))
        self._pending.append((buffer, sending, moving))

    def flush(self) -> None:
        while self._pending:
            self._wait_oldest()

    def _wait_oldest(self) -> None:
        buffer, sending, moving = self._pending.popleft()
        self._guard(lambda: sending.wait(_WITHOUT_LIMIT))
        if self._channel is not None and moving is not None:
            self._guard(functools.partial(self._channel.wait, moving))
        self._free.append(buffer)

    def _guard(self, operation: Callable[[], T]) -> T:
        return self._address.named("sending to", operation)


class PeerInbox:
    """Receives from one rank, posted `depth` deep so that no frame waits a round trip for its receive.

    The sender repeats END for each of them. Frames that have crossed an emulated wire are handed over when they are
    due, and END behind the last of them: it is not part of what is timed.
    """

    def __init__(
        self,
        link_index: int,
        address: PeerAddress,
        memory: FrameMemory,
        arrivals: Arrivals,
        *,
        depth: int,
    ) -> None:
        self._link_index, self._address, self._channel, self._arrivals = link_index, address, memory.channel, arrivals
        self._depth = depth
        self._posted: queue.SimpleQueue[tuple[FrameBuffer, dist.Work] | None] = queue.SimpleQueue()
        self._failure: PipelineError | None = None
        for _ in range(depth):
            self.recycle(memory.allocate())
        self._thread = threading.Thread(target=self._receive, name=f"inbox {address.name}", daemon=True)
        self._thread.start()

    @property
    def num_posted(self) -> int:
        """Receives whose frame the thread has not taken yet; 0 after `close`, or the next stream would lose frames."""
        return self._posted.qsize()

    def complete(self, buffer: FrameBuffer, device_nbytes: int) -> None:
        channel = self._channel
        if channel is not None and device_nbytes:
            assert buffer.device is not None
            body = buffer.device[:device_nbytes]
            self._guard(lambda: channel.wait(_started(dist.irecv(body, self._address.peer, group=channel.group))))

    def recycle(self, buffer: FrameBuffer) -> None:
        peer, tag, group = self._address.peer, self._address.tag, self._address.group
        self._posted.put((buffer, self._guard(lambda: _started(dist.irecv(buffer.message, peer, group, tag)))))

    def close(self) -> None:
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        self._posted.put(None)
        self._thread.join(_ABANDON_S)

    def _receive(self) -> None:
        """The thread: hands over all frames up to the first END."""
        num_ends = 0
        try:
            while num_ends < self._depth:
                posted = self._posted.get()
                if posted is None:
                    return
                buffer, work = posted
                self._guard(functools.partial(work.wait, _WITHOUT_LIMIT))
                has_ended = is_end(buffer.host)
                if buffer.stamped is not None and not has_ended:
                    hold(buffer.stamped)
                if has_ended:
                    num_ends += 1
                elif num_ends:
                    raise BadFrame(f"link {self._address.name}: something else than END has come behind END")
                if num_ends <= 1:
                    self._arrivals.put(self._link_index, buffer)
        except PipelineError as e:
            self._failure = e
            self._arrivals.put(self._link_index, e)

    def _guard(self, operation: Callable[[], T]) -> T:
        return self._address.named("receiving from", operation)


def _started(work: dist.Work | None) -> dist.Work:
    """Torch starts nothing, and gives None, on a rank outside the group."""
    assert work is not None
    return work
