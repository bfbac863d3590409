"""Frames over a loopback: what arrives is what was sent, or an error that says what is wrong."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressors.base import CorruptPayload, Payload
from pipeline.comm.link import FrameReceiver, FrameSender
from pipeline.comm.mailbox import FrameSpec, LinkError, Loopback
from pipeline.comm.wire import BadFrame, RemoteError

SHAPES = [(1, 4, 8), (1, 3, 8)]
SPEC = FrameSpec(
    name="layer:3:node1->node2",
    stage_index=1,
    num_trail=1,
    codec_id=77,
    dtype=torch.float32,
    shapes=SHAPES,
    max_nbytes=[60, 45],
)


class Tampering(Loopback):
    """A loopback whose frames pass through `change` on their way."""

    def __init__(self, spec, change=lambda buffer, nbytes: None):
        super().__init__(spec)
        self.change = change

    def post(self, buffer, nbytes, *, is_data):
        self.change(buffer.host, self._spec.header_nbytes + nbytes)
        super().post(buffer, nbytes, is_data=is_data)


def pair(change=lambda buffer, nbytes: None):
    box = Tampering(SPEC, change)
    return FrameSender(SPEC, box), FrameReceiver(SPEC, box)


def payload(nbytes=40, shape=SHAPES[0], **meta):
    return Payload(torch.arange(nbytes, dtype=torch.uint8), shape, meta)


def test_payload_meta_trail_and_counts():
    sender, receiver = pair()
    for i, shape in enumerate(SHAPES):
        sent = payload(30 - i, shape, rows=3)
        nbytes = sender.send(i, sent, trail=(1234 + i,))
        header, got = receiver.receive(i)
        assert torch.equal(got.data, sent.data) and got.shape == shape and got.meta == {"rows": 3}
        assert nbytes == got.nbytes == header.body_nbytes and header.trail == (1234 + i,)
        receiver.release()
    sender.end()
    receiver.finish()
    sender.flush()
    assert sender.traffic.as_dict() == {
        "num_frames": 2,
        "num_tokens": 7,
        "payload_bytes": 30 + 29 + 2 * payload(rows=3).meta_nbytes,
        "header_bytes": 2 * 68,
        "padding_bytes": 0,
    }


def test_buffers_are_reused():
    sender, receiver = pair()
    sender.send(0, payload(), (0,))
    _, first = receiver.receive(0)
    address = first.data.data_ptr()
    receiver.release()
    sender.send(1, payload(shape=SHAPES[1]), (0,))
    assert receiver.receive(1)[1].data.data_ptr() == address


def test_a_codec_that_breaks_its_promises_is_named():
    sender, _ = pair()
    with pytest.raises(ValueError, match="61 bytes, its codec's max_nbytes promised at most 60"):
        sender.send(0, payload(61), (0,))
    with pytest.raises(ValueError, match=r"Payload.shape is \(1, 3, 8\), the input had \(1, 4, 8\)"):
        sender.send(0, payload(shape=SHAPES[1]), (0,))
    assert sender.traffic.num_frames == 0


def test_errors_and_ends():
    sender, receiver = pair()
    sender.send_error("rank 1, stage 1, micro-batch 0: the codec raised")
    with pytest.raises(RemoteError, match="rank 1, stage 1, micro-batch 0: the codec raised"):
        receiver.receive(0)
    sender, receiver = pair()
    sender.send_error("x" * 10_000)
    with pytest.raises(RemoteError, match="^x{4096}$"):
        receiver.receive(0)
    sender, receiver = pair()
    with pytest.raises(LinkError, match="no frame for micro-batch 0 was sent"):
        receiver.receive(0)
    sender, receiver = pair()
    sender.send(0, payload(), (0,))
    sender.send(1, payload(shape=SHAPES[1]), (0,))
    with pytest.raises(BadFrame, match="micro-batch 1: micro-batch 0, expected 1"):
        receiver.receive(1)


@given(position=st.integers(0, 68 + 40 - 1), mask=st.integers(1, 255))
def test_a_flipped_byte_anywhere_is_caught(position, mask):
    def flip(buffer, nbytes):
        buffer[position] ^= mask

    sender, receiver = pair(flip)
    sender.send(0, payload(), (5,))
    with pytest.raises(BadFrame, match="layer:3:node1->node2, micro-batch 0"):
        receiver.receive(0)


@given(length=st.integers(0, 68 + 40 - 1), filler=st.integers(0, 255))
def test_a_truncated_frame_is_caught(length, filler):
    """What does not arrive is whatever the buffer held before."""
    changed = []

    def cut(buffer, nbytes):
        before = buffer[length:nbytes].clone()
        buffer[length:nbytes] = filler
        changed.append(not torch.equal(before, buffer[length:nbytes]))

    sender, receiver = pair(cut)
    sender.send(0, payload(), (5,))
    if changed[0]:
        with pytest.raises(BadFrame):
            receiver.receive(0)
    else:
        receiver.receive(0)


@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_in_place_of_a_frame_are_refused(raw):
    def replace(buffer, nbytes):
        buffer[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)

    sender, receiver = pair(replace)
    sender.send(0, payload(), (5,))
    if bytes(raw[:1]) and not _is_prefix_of_the_frame(raw):
        with pytest.raises(BadFrame):
            receiver.receive(0)


def _is_prefix_of_the_frame(raw):
    sender, _ = pair()
    box = sender._outbox
    sender.send(0, payload(), (5,))
    return bytes(box._posted[0].host.numpy()[: len(raw)]) == raw


@given(st.binary(min_size=1, max_size=40))
def test_meta_that_no_sender_writes_is_corrupt(blob):
    """The checksum is right, the meta block is not: a sender of another make."""
    sender, receiver = pair()
    body = Payload(torch.tensor(list(blob), dtype=torch.uint8), SHAPES[0])
    original = sender._post

    def claim_meta(buffer, header):
        object.__setattr__(header, "meta_nbytes", header.data_nbytes)
        object.__setattr__(header, "data_nbytes", 0)
        original(buffer, header)

    sender._post = claim_meta
    sender.send(0, body, (0,))
    try:
        _, got = receiver.receive(0)
    except CorruptPayload:
        return
    assert got.meta_nbytes == len(blob)  # only a canonical block passes
