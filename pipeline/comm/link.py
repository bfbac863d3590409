"""Links: a codec's payload becomes a checked frame on one side and a payload again on the other.

A link has two ends. The sending end copies a payload, with what the next stage must know of the pass, into a mailbox's
buffer; the receiving end checks each frame against what the link may carry and gives the payload as a view of its
buffer until `release`. Bytes are counted where they are handed to send. A stream is DATA frames and FAILED ones, which
stand in the place of the data of a pass that has failed on an earlier rank, then END.

This module knows neither models nor codecs' insides, and does not decide when anything is sent.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from compressors.base import CorruptPayload, Payload, decode_meta, encode_meta
from pipeline.comm.mailbox import FrameBuffer, Inbox, Outbox
from pipeline.comm.wire import BASE_NBYTES, BadFrame, Header, WireFormat, decode_text, encode_text
from pipeline.partition.passes import Pass, PassKind
from pipeline.records.traffic import LinkTraffic

__all__ = ["Frame", "FrameReceiver", "FrameSender", "HiddenSpec", "LinkSpec", "ResultSpec"]


class LinkSpec(Protocol):
    """What both ends of a link know of its frames."""

    @property
    def name(self) -> str: ...

    @property
    def wire(self) -> WireFormat: ...

    def expect(self, work: Pass) -> tuple[tuple[int, ...], int]:
        """(shape of the payload's tensor, bound of its bytes). Raises ValueError for a pass that it cannot carry."""

    @property
    def max_body_nbytes(self) -> int:
        """Of any frame."""

    @property
    def max_tail_nbytes(self) -> int:
        """Of any frame."""


@dataclass(frozen=True, kw_only=True)
class HiddenSpec:
    """A link of hidden states [B, T, hidden_size].

    `microbatch_shapes` are (B, T) of the micro-batches of a text; other passes have at most `max_rows` rows and
    `max_tokens` tokens in all. `bound(kind, shape)` is the codec's `max_nbytes`.
    """

    name: str
    wire: WireFormat
    hidden_size: int
    bound: Callable[[PassKind, tuple[int, ...]], int]
    microbatch_shapes: Sequence[tuple[int, int]] = ()
    max_rows: int = 0
    max_tokens: int = 0

    def expect(self, work: Pass) -> tuple[tuple[int, ...], int]:
        if work.kind is PassKind.SCORE:
            index = work.microbatch_index
            if index is None or not index < len(self.microbatch_shapes):
                raise ValueError(f"{work} of {len(self.microbatch_shapes)}")
            shape = (*self.microbatch_shapes[index], self.hidden_size)
        else:
            shape = (len(work.rows), work.num_tokens, self.hidden_size)
            if not 0 < shape[0] <= self.max_rows or not 0 < shape[0] * shape[1] <= self.max_tokens:
                raise ValueError(
                    f"{shape[0]} rows of {shape[1]} tokens; at most {self.max_rows} rows and {self.max_tokens} "
                    "tokens in all are possible here"
                )
        return shape, self._bound_of(work.kind, shape)

    @functools.cached_property
    def bounds(self) -> dict[tuple[PassKind, tuple[int, ...]], int]:
        """Of the largest frames, by kind and shape: a codec may round up in every row, so of each number of rows."""
        shapes = [(PassKind.SCORE, shape) for shape in dict.fromkeys(self.microbatch_shapes)]
        widest = [(rows, self.max_tokens // rows) for rows in range(1, min(self.max_rows, self.max_tokens) + 1)]
        shapes += [(kind, shape) for kind in (PassKind.PREFILL, PassKind.DECODE) for shape in widest]
        return {(kind, shape): self.bound(kind, (*shape, self.hidden_size)) for kind, shape in shapes}

    @functools.cached_property
    def max_body_nbytes(self) -> int:
        return max(self.bounds.values(), default=0)

    @functools.cached_property
    def max_tail_nbytes(self) -> int:
        tokens = [math.prod(shape) for shape in self.microbatch_shapes]
        return self.wire.max_tail_nbytes(max_rows=self.max_rows, max_ids=max([self.max_tokens, *tokens]))

    def _bound_of(self, kind: PassKind, shape: tuple[int, ...]) -> int:
        known = self.bounds.get((kind, shape[:2]))
        return self.bound(kind, shape) if known is None else known


@dataclass(frozen=True, kw_only=True)
class ResultSpec:
    """The link that carries results from the head's node to node 0: bytes, at most `bound(pass)`, of any
    `max_nbytes`.
    """

    name: str
    wire: WireFormat
    bound: Callable[[Pass], int]
    max_nbytes: int
    max_rows: int = 0

    def expect(self, work: Pass) -> tuple[tuple[int, ...], int]:
        return (), self.bound(work)

    @property
    def max_body_nbytes(self) -> int:
        return self.max_nbytes

    @property
    def max_tail_nbytes(self) -> int:
        return self.wire.max_tail_nbytes(max_rows=self.max_rows, max_ids=0)


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What has arrived. Either a payload, or the cause in words why there is none.

    `trail` has the pass's payload bytes on all links up to and with this one.
    """

    work: Pass
    payload: Payload | None
    failure: str | None
    trail: tuple[int, ...]
    token_ids: np.ndarray | None
    note: bytes


class FrameSender:
    """The sending end of a link; the other end keeps `receives_ahead` receives posted.

    Attributes:
        outbox: whose buffers frames are written into; all are free again after `flush`.
        traffic: what has been sent.
    """

    def __init__(self, spec: LinkSpec, outbox: Outbox, *, apart: bool = False, receives_ahead: int = 1) -> None:
        self.spec = spec
        self.traffic = LinkTraffic()
        self.outbox = outbox
        self._apart = apart  # bodies travel on a channel of their own
        self._receives_ahead = receives_ahead
        self._sequence = 0

    def send(
        self,
        work: Pass,
        payload: Payload,
        trail: tuple[int, ...],
        *,
        token_ids: np.ndarray | None = None,
        note: bytes = b"",
    ) -> int:
        """Frame one payload and hand it to a non-blocking send; returns the payload's bytes, token ids included.

        `trail` holds the payload bytes of the pass on the earlier links. The payload's data is copied before this
        returns. Raises ValueError when the payload breaks its codec's own bound, nothing being sent.
        """
        shape, bound = self.spec.expect(work)
        meta = encode_meta(payload.meta)
        nbytes = payload.data.numel() + len(meta)
        if nbytes > bound:
            raise ValueError(
                f"link {self.spec.name}: the payload has {nbytes} bytes, "
                f"its codec's max_nbytes promised at most {bound}"
            )
        if payload.shape != shape:
            raise ValueError(f"link {self.spec.name}: Payload.shape is {payload.shape}, the input had {shape}")
        header = Header(
            work=work, body_nbytes=nbytes, meta_nbytes=len(meta), trail=trail, token_ids=token_ids, note=note
        )
        num_sent = self._post(header, payload.data, meta)
        ids_nbytes = 0 if token_ids is None else token_ids.size * self.spec.wire.id_nbytes
        num_tokens = shape[0] * shape[1] if shape else 0
        self.traffic.add(
            num_tokens=num_tokens, payload_bytes=nbytes + ids_nbytes, header_bytes=num_sent - nbytes - ids_nbytes
        )
        return nbytes + ids_nbytes

    def fail(self, work: Pass, cause: str) -> None:
        """Tell the next stage, in place of the pass's data, why there is none."""
        text = encode_text(cause or "unknown")
        header = Header(
            work=work, failed=True, body_nbytes=len(text), trail=(0,) * self.spec.wire.num_trail
        )
        self.traffic.control_bytes += self._post(header, torch.frombuffer(bytearray(text), dtype=torch.uint8), b"")

    def end(self) -> None:
        """Send END, once for each receive that the other end has posted: no more passes follow."""
        for _ in range(self._receives_ahead):
            self.traffic.control_bytes += self._post(Header(work=None), torch.empty(0, dtype=torch.uint8), b"")

    def flush(self) -> None:
        """Wait until every frame has left."""
        self.outbox.flush()

    def _post(self, header: Header, data: torch.Tensor, meta: bytes) -> int:
        """Returns the frame's bytes."""
        base, tail = self.spec.wire.encode(header)
        buffer = self.outbox.acquire()
        in_host = 0 if self._apart and not header.failed else header.body_nbytes
        body = buffer.host[BASE_NBYTES:] if in_host or buffer.device is None else buffer.device
        body[: data.numel()].copy_(data)
        if meta:
            body[data.numel() : header.body_nbytes].copy_(torch.frombuffer(bytearray(meta), dtype=torch.uint8))
        host = buffer.host.numpy()
        end = BASE_NBYTES + in_host + len(tail)
        host[:BASE_NBYTES] = np.frombuffer(base, np.uint8)
        host[end - len(tail) : end] = np.frombuffer(tail, np.uint8)
        crc = self.spec.wire.checksum(self._sequence, host[4:end].data)
        host[:4] = np.frombuffer(crc.to_bytes(4, "little"), np.uint8)
        self._sequence += 1
        self.outbox.post(buffer, end, header.body_nbytes - in_host)
        return BASE_NBYTES + header.body_nbytes + len(tail)


class FrameReceiver:
    """The receiving end of a link."""

    def __init__(self, spec: LinkSpec, inbox: Inbox, *, apart: bool = False) -> None:
        self.spec = spec
        self._inbox = inbox
        self._apart = apart
        self._sequence = 0

    def open(self, buffer: FrameBuffer) -> Frame | None:
        """Check a buffer that has arrived; None for END.

        The payload is a view of the buffer until `release`. Raises BadFrame for a damaged or unexpected frame.
        """
        sequence, self._sequence = self._sequence, self._sequence + 1
        try:
            return self._open(buffer, sequence)
        except (BadFrame, CorruptPayload) as e:
            raise BadFrame(f"link {self.spec.name}, frame {sequence}: {e}") from e

    def _open(self, buffer: FrameBuffer, sequence: int) -> Frame | None:
        wire, host = self.spec.wire, buffer.host.numpy()
        base = host[:BASE_NBYTES].tobytes()
        # Nothing that the base says is certain yet, so it is bounded before it is followed.
        body_nbytes, is_failure = int.from_bytes(base[4:8], "little"), wire.is_failure(base)
        if body_nbytes > self.spec.max_body_nbytes and not is_failure:
            raise BadFrame(f"body of {body_nbytes} bytes, at most {self.spec.max_body_nbytes} are possible here")
        in_host = 0 if self._apart and not is_failure else body_nbytes
        if BASE_NBYTES + in_host > host.size:
            raise BadFrame(f"body of {body_nbytes} bytes, the buffer has {host.size}")
        start = BASE_NBYTES + in_host
        header, tail_nbytes = wire.decode(base, host[start : start + self.spec.max_tail_nbytes].tobytes())
        crc = wire.checksum(sequence, host[4 : start + tail_nbytes].data)
        if crc != int.from_bytes(base[:4], "little"):
            raise BadFrame(
                "the checksum does not match: the frame was damaged on the way, is not the next one, or its sender has "
                "another version or codec; run one release on all ranks"
            )
        work = header.work
        if work is None:
            return None
        if header.failed:
            return Frame(
                work=work,
                payload=None,
                failure=decode_text(host[BASE_NBYTES:start].tobytes()),
                trail=(*header.trail, 0),
                token_ids=None,
                note=b"",
            )
        try:
            shape, bound = self.spec.expect(work)
        except ValueError as e:
            raise BadFrame(str(e)) from e
        if body_nbytes > bound:
            raise BadFrame(f"body of {body_nbytes} bytes for {work}, at most {bound} are possible")
        self._inbox.complete(buffer, body_nbytes - in_host)
        body = buffer.host[BASE_NBYTES:start] if buffer.device is None else buffer.device[:body_nbytes]
        data_nbytes = body_nbytes - header.meta_nbytes
        meta = decode_meta(bytes(body[data_nbytes:].cpu().numpy())) if header.meta_nbytes else {}
        ids = header.token_ids
        counted = body_nbytes + (0 if ids is None else ids.size * wire.id_nbytes)
        return Frame(
            work=work,
            payload=Payload(data=body[:data_nbytes], shape=shape, meta=meta),
            failure=None,
            trail=(*header.trail, counted),
            token_ids=ids,
            note=header.note,
        )

    def release(self, buffer: FrameBuffer) -> None:
        """The payload in `buffer` is no longer needed; it waits for another frame."""
        self._inbox.recycle(buffer)

    def close(self) -> None:
        """After END: leave nothing behind."""
        self._inbox.close()

    def abandon(self) -> None:
        """The connection is broken: nothing waits for it when this returns."""
        self._inbox.abandon()
