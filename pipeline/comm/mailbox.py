"""Mailboxes: buffers handed from one stage to the next, over Gloo, NCCL or, in one process, a queue.

An outbox owns the buffers that frames are written into and sends them without blocking; an inbox keeps several
receives posted, because a receive that is posted only after another message arrived costs a whole round trip.

* `Loopback`: both ends in one process; a posted buffer is simply taken by the other end.
* `PeerOutbox` and `PeerInbox`: `torch.distributed` point-to-point. On Gloo, buffers lie in host memory (pinned for
  a CUDA stage), receives are posted with the codec's bound and a frame may be shorter. NCCL needs equal sizes on
  both sides: frames of fixed-size codecs have an exact size that both ends know; other codecs send the header,
  then the body at its true length. The tests run both of NCCL's size rules on Gloo; NCCL itself they do not run.

What the bytes mean is `link.py`'s business.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from pipeline.comm.watchdog import PipelineError
from pipeline.comm.wire import MAX_ERROR_NBYTES, header_nbytes

__all__ = ["FrameSpec", "Inbox", "LinkError", "Loopback", "Outbox", "PeerInbox", "PeerOutbox", "SizeRule"]

T = TypeVar("T")


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
    def buffer_nbytes(self) -> int:
        """Room for any frame of the link."""
        return self.header_nbytes + max([MAX_ERROR_NBYTES, *self.max_nbytes])

    def exact_nbytes(self, microbatch_index: int) -> int:
        """Size of a padded frame, for transports with equal sizes on both sides; END has no body."""
        done = microbatch_index >= len(self.max_nbytes)
        return self.header_nbytes + (0 if done else self.max_nbytes[microbatch_index])


class SizeRule(Enum):
    """How the receiving side learns a frame's size: see the module docstring."""

    SHORTER_ALLOWED = "shorter allowed"  # Gloo
    EXACT = "exact"  # NCCL, fixed-size codec
    HEADER_FIRST = "header first"  # NCCL, other codecs


class Outbox(Protocol):
    size_rule: SizeRule

    def acquire(self) -> torch.Tensor:
        """A free buffer of the link's size; waits for the oldest send when there is none."""

    def allocate(self) -> torch.Tensor:
        """One more buffer, for what may not wait."""

    def post(self, buffer: torch.Tensor, nbytes: int) -> None:
        """Send the first `nbytes` of an acquired buffer without waiting."""

    def flush(self) -> None:
        """Wait until every posted frame has been taken over by the transport."""


class Inbox(Protocol):
    def take(self, microbatch_index: int) -> torch.Tensor:
        """The next frame's buffer, header complete."""

    def complete(self, buffer: torch.Tensor, nbytes: int) -> None:
        """Make sure that `nbytes` of body behind the header have arrived."""

    def recycle(self, buffer: torch.Tensor, microbatch_index: int) -> None:
        """Give back the buffer that held this micro-batch's frame."""

    def discard(self) -> None:
        """Wait for the frames that receives are posted for, and drop them."""


class Loopback:
    """Outbox and inbox in one, for stages of one process."""

    size_rule = SizeRule.SHORTER_ALLOWED

    def __init__(self, spec: FrameSpec) -> None:
        self._spec = spec
        self._free: deque[torch.Tensor] = deque()
        self._posted: deque[torch.Tensor] = deque()

    def acquire(self) -> torch.Tensor:
        return self._free.popleft() if self._free else self.allocate()

    def allocate(self) -> torch.Tensor:
        return torch.empty(self._spec.buffer_nbytes, dtype=torch.uint8)

    def post(self, buffer: torch.Tensor, nbytes: int) -> None:
        self._posted.append(buffer)

    def flush(self) -> None:
        pass

    def take(self, microbatch_index: int) -> torch.Tensor:
        if not self._posted:
            raise LinkError(f"link {self._spec.name}: no frame for micro-batch {microbatch_index} was sent")
        return self._posted.popleft()

    def complete(self, buffer: torch.Tensor, nbytes: int) -> None:
        pass

    def recycle(self, buffer: torch.Tensor, microbatch_index: int) -> None:
        self._free.append(buffer)

    def discard(self) -> None:
        pass


def _allocate(nbytes: int, device: torch.device, pin: bool) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pin)


class PeerOutbox:
    """Non-blocking sends to one rank out of a pool of buffers.

    `isend` reads the live buffer until its handle is waited on, so a buffer is reused only after that.
    """

    def __init__(
        self,
        spec: FrameSpec,
        *,
        peer: int,
        tag: int,
        group: dist.ProcessGroup | None,
        size_rule: SizeRule,
        depth: int,
        device: torch.device,
        pin_memory: bool,
    ) -> None:
        self.size_rule = size_rule
        self._spec, self._peer, self._tag, self._group = spec, peer, tag, group
        self._device, self._pin_memory = device, pin_memory
        self._free = deque(self.allocate() for _ in range(depth))
        self._pending: deque[tuple[torch.Tensor, list[dist.Work]]] = deque()

    def acquire(self) -> torch.Tensor:
        if not self._free:
            self._wait_oldest()
        return self._free.popleft()

    def allocate(self) -> torch.Tensor:
        return _allocate(self._spec.buffer_nbytes, self._device, self._pin_memory)

    def post(self, buffer: torch.Tensor, nbytes: int) -> None:
        header = self._spec.header_nbytes
        if self.size_rule is SizeRule.HEADER_FIRST:
            parts = [buffer[:header], buffer[header:nbytes]]
        else:
            parts = [buffer[:nbytes]]
        works = []
        for part in parts:
            if part.numel():
                works.append(self._guard(lambda p=part: dist.isend(p, self._peer, group=self._group, tag=self._tag)))
        self._pending.append((buffer, works))

    def flush(self) -> None:
        while self._pending:
            self._wait_oldest()

    def _wait_oldest(self) -> None:
        buffer, works = self._pending.popleft()
        for work in works:
            self._guard(work.wait)
        self._free.append(buffer)

    def _guard(self, operation: Callable[[], T]) -> T:
        return _named(f"link {self._spec.name}: sending to rank {self._peer}", self._peer, operation)


class PeerInbox:
    """Receives from one rank, posted `depth` deep so that no frame waits a round trip for its receive."""

    def __init__(
        self,
        spec: FrameSpec,
        *,
        peer: int,
        tag: int,
        group: dist.ProcessGroup | None,
        size_rule: SizeRule,
        depth: int,
        device: torch.device,
        pin_memory: bool,
        first_microbatch: int = 0,
    ) -> None:
        self._spec, self._peer, self._tag, self._group = spec, peer, tag, group
        self._size_rule = size_rule
        self._last = len(spec.shapes)  # the END frame's place
        # A body comes between two headers, so only one header can be waited for.
        self._depth = 1 if size_rule is SizeRule.HEADER_FIRST else depth
        self._pending: deque[tuple[torch.Tensor, dist.Work]] = deque()
        for microbatch_index in range(first_microbatch, first_microbatch + self._depth):
            if microbatch_index <= self._last:
                self._post(_allocate(spec.buffer_nbytes, device, pin_memory), microbatch_index)

    def take(self, microbatch_index: int) -> torch.Tensor:
        buffer, work = self._pending.popleft()
        self._guard(work.wait, f"frame of micro-batch {microbatch_index}")
        return buffer

    def complete(self, buffer: torch.Tensor, nbytes: int) -> None:
        if self._size_rule is SizeRule.HEADER_FIRST and nbytes:
            body = buffer[self._spec.header_nbytes : self._spec.header_nbytes + nbytes]
            self._guard(lambda: dist.recv(body, self._peer, group=self._group, tag=self._tag), "body")

    def recycle(self, buffer: torch.Tensor, microbatch_index: int) -> None:
        following = microbatch_index + self._depth
        if following <= self._last:
            self._post(buffer, following)

    def discard(self) -> None:
        while self._pending:
            _, work = self._pending.popleft()
            self._guard(work.wait, "what follows an error")

    def _post(self, buffer: torch.Tensor, microbatch_index: int) -> None:
        if self._size_rule is SizeRule.HEADER_FIRST:
            room = buffer[: self._spec.header_nbytes]
        elif self._size_rule is SizeRule.EXACT:
            room = buffer[: self._spec.exact_nbytes(microbatch_index)]
        else:
            room = buffer
        work = self._guard(lambda: dist.irecv(room, self._peer, group=self._group, tag=self._tag), "posting")
        self._pending.append((buffer, work))

    def _guard(self, operation: Callable[[], T], what: str) -> T:
        return _named(f"link {self._spec.name}: receiving from rank {self._peer}, {what}", self._peer, operation)


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
