"""Links: a codec's payload becomes a checked frame on one side and a payload again on the other.

A link has two ends. The sending end copies a payload behind a header into a mailbox's buffer; the receiving end
checks each header against the plan and gives the payload back as a view of its buffer until `release`. Bytes are
counted where they are handed to send. A stream ends with END, or, when a stage or codec has failed, with ERROR in place
of the frame that is due; a receiver that has failed itself drains the stream up to there, so that nothing of it is left
for the next evaluation on the same process group.

This module knows neither models nor codecs' insides, and does not decide when anything is sent.
"""

from __future__ import annotations

import contextlib

import torch

from compressors.base import Payload, decode_meta, encode_meta
from pipeline.comm.mailbox import FrameBuffer, FrameSpec, Inbox, Outbox
from pipeline.comm.wire import (
    BadFrame,
    Expectation,
    FrameKind,
    Header,
    RemoteError,
    body_checksum,
    decode_error,
    encode_error,
)
from pipeline.records.traffic import LinkTraffic

__all__ = ["FrameReceiver", "FrameSender"]


class FrameSender:
    """The sending end of a link.

    Args:
        first_microbatch: with which the stream begins.
        receives_ahead: how many receives the other end keeps posted.
    """

    def __init__(self, spec: FrameSpec, outbox: Outbox, *, first_microbatch: int = 0, receives_ahead: int = 1) -> None:
        self.spec = spec
        self.traffic = LinkTraffic()
        self._outbox = outbox
        self._following = first_microbatch  # the place of the next frame
        self._receives_ahead = receives_ahead
        self._closed = False

    def send(self, microbatch_index: int, payload: Payload, trail: tuple[int, ...]) -> int:
        """Frame one payload and hand it to a non-blocking send; returns the payload's bytes.

        `trail` holds the payload bytes of the micro-batch on the earlier links. The payload's data is copied
        before this returns. Raises ValueError when the payload breaks its codec's own bound.
        """
        spec = self.spec
        meta = encode_meta(payload.meta)
        data_nbytes = payload.data.numel()
        bound = spec.max_nbytes[microbatch_index]
        nbytes = len(meta) + data_nbytes
        if nbytes > bound:
            raise ValueError(
                f"link {spec.name}: the payload has {nbytes} bytes, its codec's max_nbytes promised at most {bound}"
            )
        if payload.shape != spec.shapes[microbatch_index]:
            raise ValueError(
                f"link {spec.name}: Payload.shape is {payload.shape}, the input had {spec.shapes[microbatch_index]}"
            )
        buffer = self._outbox.acquire()
        body = buffer.body[:nbytes]
        if meta:
            body[: len(meta)].copy_(torch.frombuffer(bytearray(meta), dtype=torch.uint8))
        body[len(meta) :].copy_(payload.data)
        header = Header(
            kind=FrameKind.DATA,
            stage_index=spec.stage_index,
            microbatch_index=microbatch_index,
            codec_id=spec.codec_id,
            dtype=spec.dtype,
            shape=payload.shape,
            meta_nbytes=len(meta),
            data_nbytes=data_nbytes,
            body_crc=body_checksum(body) if body.device.type == "cpu" else None,
            trail=trail,
        )
        self._post(buffer, header)
        self._following = microbatch_index + 1
        self.traffic.add(
            num_tokens=payload.shape[0] * payload.shape[1],
            payload_bytes=nbytes,
            header_bytes=spec.header_nbytes,
        )
        return nbytes

    def send_error(self, message: str) -> None:
        """Tell the next stage, in place of the frame that it waits for, why there will be none.

        Every receive that the other end has posted gets the frame, so that none is left over. Does not wait (`flush`
        does), and does nothing when the stream has ended.
        """
        if self._closed:
            return
        self._closed = True
        end = len(self.spec.shapes)
        for place in range(self._following, min(self._following + self._receives_ahead, end + 1)):
            self._post_error(place, encode_error(message))

    def end(self) -> None:
        """Send END: no more micro-batches follow."""
        end = len(self.spec.shapes)
        self._post(self._outbox.acquire(), self._control_header(FrameKind.END, end, 0))
        self._closed = True

    def flush(self) -> None:
        """Wait until every frame has left."""
        self._outbox.flush()

    def _post_error(self, place: int, body: bytes) -> None:
        buffer = self._outbox.allocate()
        start = self.spec.header_nbytes
        buffer.host[start : start + len(body)].copy_(
            torch.frombuffer(bytearray(body or b" "), dtype=torch.uint8)[: len(body)]
        )
        self._post(buffer, self._control_header(FrameKind.ERROR, place, len(body)))

    def _control_header(self, kind: FrameKind, microbatch_index: int, nbytes: int) -> Header:
        return Header(
            kind=kind,
            stage_index=self.spec.stage_index,
            microbatch_index=microbatch_index,
            codec_id=self.spec.codec_id,
            dtype=self.spec.dtype,
            shape=(0, 0, 0),
            meta_nbytes=0,
            data_nbytes=nbytes,
            body_crc=None,
            trail=(0,) * self.spec.num_trail,
        )

    def _post(self, buffer: FrameBuffer, header: Header) -> None:
        buffer.host[: self.spec.header_nbytes].copy_(torch.frombuffer(bytearray(header.encode()), dtype=torch.uint8))
        self._outbox.post(buffer, header.body_nbytes, is_data=header.kind is FrameKind.DATA)


class FrameReceiver:
    """The receiving end of a link; `first_microbatch` is that with which the stream begins."""

    def __init__(self, spec: FrameSpec, inbox: Inbox, *, first_microbatch: int = 0) -> None:
        self.spec = spec
        self._inbox = inbox
        self._following = first_microbatch  # the place of the next frame
        self._closed = False
        self._expectation = Expectation(
            stage_index=spec.stage_index, num_trail=spec.num_trail, codec_id=spec.codec_id, dtype=spec.dtype
        )
        self._taken: tuple[FrameBuffer, int] | None = None

    def receive(self, microbatch_index: int) -> tuple[Header, Payload]:
        """Wait for a micro-batch's frame and check it.

        The payload is a view of the link's buffer until `release`. Raises BadFrame for a damaged or unexpected
        frame, RemoteError when the sender reports a failure, LinkError when the peer is gone or silent,
        CorruptPayload when the meta block is malformed.
        """
        header, body = self._take(microbatch_index)
        if header.kind is FrameKind.END:
            raise BadFrame(
                f"link {self.spec.name}: the sender ended before micro-batch {microbatch_index}; "
                f"this rank expects {len(self.spec.shapes)}"
            )
        meta = decode_meta(bytes(body[: header.meta_nbytes].cpu().numpy()))
        return header, Payload(data=body[header.meta_nbytes :], shape=header.shape, meta=meta)

    def release(self) -> None:
        """The payload of the last `receive` is no longer needed; its buffer waits for another frame."""
        assert self._taken is not None, "nothing was received since the last release"
        buffer, microbatch_index = self._taken
        self._taken = None
        self._inbox.recycle(buffer, microbatch_index)

    def finish(self) -> None:
        """Take the END frame. Raises as `receive`, and BadFrame when something else comes."""
        end = len(self.spec.shapes)
        header, _ = self._take(end)
        if header.kind is not FrameKind.END:
            raise BadFrame(f"link {self.spec.name}: a frame came after the last micro-batch, {end - 1}")
        self.release()

    def drain(self) -> None:
        """Drop what the sender has sent and will send, up to and with its END or ERROR.

        Raises BadFrame for a damaged frame, LinkError when the peer is gone.
        """
        if self._taken is not None and not self._closed:
            self.release()
        while not self._closed:
            with contextlib.suppress(RemoteError):
                self._take(self._following)
                self.release()
        self._inbox.discard()

    def _take(self, microbatch_index: int) -> tuple[Header, torch.Tensor]:
        spec = self.spec
        at_end = microbatch_index >= len(spec.shapes)
        buffer = self._inbox.take(microbatch_index)
        self._taken = (buffer, microbatch_index)
        self._following = microbatch_index + 1
        try:
            header = self._expectation.decode(
                bytes(buffer.host[: spec.header_nbytes].numpy()),
                microbatch_index=microbatch_index,
                shape=(0, 0, 0) if at_end else spec.shapes[microbatch_index],
                max_body_nbytes=0 if at_end else spec.max_nbytes[microbatch_index],
            )
        except BadFrame as e:
            raise BadFrame(f"link {spec.name}, micro-batch {microbatch_index}: {e}") from e
        self._closed = header.kind is not FrameKind.DATA
        if header.kind is FrameKind.ERROR:
            text = buffer.host[spec.header_nbytes : spec.header_nbytes + header.body_nbytes]
            raise RemoteError(decode_error(bytes(text.numpy())))
        self._inbox.complete(buffer, header.body_nbytes)
        body = buffer.body[: header.body_nbytes]
        if header.body_crc is not None and body_checksum(body) != header.body_crc:
            raise BadFrame(
                f"link {spec.name}, micro-batch {microbatch_index}: the body's checksum does not match: "
                f"{header.body_nbytes} bytes were damaged on the way"
            )
        return header, body
