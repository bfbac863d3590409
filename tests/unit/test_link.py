"""Frames over a loopback: what arrives is what was sent, or an error that says what is wrong."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressors.base import Payload
from pipeline.comm.link import FrameReceiver, FrameSender, HiddenSpec, ResultSpec
from pipeline.comm.mailbox import Arrivals, FrameMemory, Loopback
from pipeline.comm.wire import BASE_NBYTES, BadFrame, WireFormat
from pipeline.partition.passes import Pass, PassKind, Row

WIRE = WireFormat(link_index=1, num_trail=1, codec_ids=(77,), dtype=torch.float32)
SPEC = HiddenSpec(
    name="layer:3:node1->node2",
    wire=WIRE,
    hidden_size=8,
    bound=lambda kind, shape: 15 * shape[0] * shape[1],
    microbatch_shapes=[(1, 4), (1, 3)],
    max_rows=2,
    max_tokens=4,
)
FIRST, SECOND = (Pass(kind=PassKind.SCORE, microbatch_index=index) for index in range(2))
TWO_ROWS = Pass(kind=PassKind.DECODE, rows=(Row(4, 10), Row(5, 0, from_slot=4)), num_tokens=2)
SHAPES = {FIRST: (1, 4, 8), SECOND: (1, 3, 8), TWO_ROWS: (2, 2, 8)}
HEADER_NBYTES = BASE_NBYTES + 4 + 1  # index, a trail of one small number


class Pair:
    """Both ends of a link; frames pass through `change(buffer, number of bytes)` on their way."""

    def __init__(self, spec=SPEC, change=None):
        self.arrivals = Arrivals()
        self.box = Loopback(1, FrameMemory(spec.max_body_nbytes, spec.max_tail_nbytes), self.arrivals)
        self.sender, self.receiver = FrameSender(spec, self.box), FrameReceiver(spec, self.box)
        post = self.box.post

        def changing_post(buffer, nbytes, device_nbytes):
            self.nbytes = nbytes
            if change is not None:
                change(buffer.host, nbytes)
            post(buffer, nbytes, device_nbytes)

        self.box.post = changing_post

    def receive(self):
        """(frame, its buffer)."""
        link_index, buffer = self.arrivals.take()
        assert link_index == 1
        return self.receiver.open(buffer), buffer


def payload(nbytes=40, work=FIRST, **meta):
    return Payload(torch.arange(nbytes, dtype=torch.uint8), SHAPES[work], meta)


def test_payload_meta_trail_ids_note_and_counts():
    pair = Pair()
    ids = np.array([[5, 70_000], [1, 2]])
    expected_payload, expected_header = 0, 0
    for work, more in ((FIRST, {}), (SECOND, {}), (TWO_ROWS, {"token_ids": ids, "note": b"seed"})):
        sent = payload(30, work, rows=3)
        nbytes = pair.sender.send(work, sent, (1234,), **more)
        frame, buffer = pair.receive()
        assert torch.equal(frame.payload.data, sent.data)
        assert frame.payload.shape == sent.shape and frame.payload.meta == {"rows": 3}
        assert frame.work == work and frame.failure is None and frame.note == more.get("note", b"")
        ids_nbytes = 16 if more else 0
        assert (frame.token_ids is not None) is bool(more)
        assert nbytes == sent.nbytes + ids_nbytes and frame.trail == (1234, nbytes)
        pair.receiver.release(buffer)
        expected_payload += nbytes
        expected_header += pair.nbytes - nbytes
    assert np.array_equal(frame.token_ids, ids) and frame.token_ids.dtype == np.int64
    pair.sender.end()
    assert pair.receive()[0] is None
    pair.sender.flush()
    assert pair.sender.traffic.as_dict() == {
        "num_frames": 3,
        "num_tokens": 4 + 3 + 4,
        "payload_bytes": expected_payload,
        "header_bytes": expected_header,
        "padding_bytes": 0,
        "control_bytes": BASE_NBYTES,
    }


def test_buffers_are_reused():
    pair = Pair()
    addresses = set()
    for work in (FIRST, SECOND, FIRST):
        pair.sender.send(work, payload(work=work), (0,))
        frame, buffer = pair.receive()
        addresses.add(frame.payload.data.data_ptr())
        pair.receiver.release(buffer)
    assert len(addresses) == 1


def test_a_payload_lies_aligned_behind_the_base():
    """So that a codec may view its bytes as float32."""
    pair = Pair()
    pair.sender.send(FIRST, payload(), (0,))
    frame, buffer = pair.receive()
    assert frame.payload.data.data_ptr() == buffer.host.data_ptr() + BASE_NBYTES
    assert frame.payload.data.view(torch.float32).numel() == 10


def test_a_codec_that_breaks_its_promises_is_named():
    pair = Pair()
    with pytest.raises(ValueError, match="61 bytes, its codec's max_nbytes promised at most 60"):
        pair.sender.send(FIRST, payload(61), (0,))
    with pytest.raises(ValueError, match="46 bytes, its codec's max_nbytes promised at most 45"):
        pair.sender.send(SECOND, payload(46, SECOND), (0,))  # the bound of this pass, not of any
    with pytest.raises(ValueError, match=r"Payload.shape is \(1, 3, 8\), the input had \(1, 4, 8\)"):
        pair.sender.send(FIRST, payload(work=SECOND), (0,))
    assert pair.sender.traffic.num_frames == 0 and pair.arrivals.is_empty()
    pair.sender.send(FIRST, payload(), (0,))  # nothing was sent, so this is the first frame
    assert pair.receive()[0].work == FIRST


class Lax(HiddenSpec):
    """Of a sender that does not look."""

    def expect(self, work):
        return SHAPES[FIRST], 60


def rows(count, num_tokens):
    return Pass(kind=PassKind.PREFILL, rows=tuple(Row(slot, 0) for slot in range(count)), num_tokens=num_tokens)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (Pass(kind=PassKind.SCORE, microbatch_index=2), "micro-batch 2 of 2"),
        (rows(3, 1), "3 rows of 1 tokens; at most 2 rows and 4 tokens in all are possible"),
        (rows(2, 3), "2 rows of 3 tokens"),
        (rows(0, 1), "0 rows of 1 tokens"),
        (rows(1, 0), "1 rows of 0 tokens"),
    ],
)
def test_a_pass_that_the_link_cannot_carry_is_refused_at_both_ends(work, words):
    pair = Pair()
    with pytest.raises(ValueError, match=words):
        pair.sender.send(work, payload(), (0,))
    lax = Pair(Lax(**{field.name: getattr(SPEC, field.name) for field in dataclasses.fields(SPEC)}))
    lax.sender.send(work, payload(8), (0,))
    with pytest.raises(BadFrame, match=f"link layer:3:node1->node2, frame 0: {words}"):
        pair.receiver.open(lax.arrivals.take()[1])


def test_a_body_beyond_the_bound_of_its_pass_is_refused():
    """Though it fits into the buffers."""
    lavish = Pair(dataclasses.replace(SPEC, bound=lambda kind, shape: 60))
    lavish.sender.send(SECOND, payload(46, SECOND), (0,))
    with pytest.raises(BadFrame, match="body of 46 bytes for micro-batch 1, at most 45 are possible"):
        Pair().receiver.open(lavish.arrivals.take()[1])


def test_a_body_beyond_any_bound_is_refused_before_it_is_read():
    def claim(buffer, nbytes):
        buffer[4:8] = torch.tensor([0, 0, 0, 1], dtype=torch.uint8)

    pair = Pair(change=claim)
    pair.sender.send(FIRST, payload(), (0,))
    with pytest.raises(BadFrame, match="body of 16777216 bytes, at most 60 are possible here"):
        pair.receive()
    pair = Pair(change=claim)
    pair.sender.fail(FIRST, "why")
    with pytest.raises(BadFrame, match="body of 16777216 bytes, the buffer has"):
        pair.receive()


def test_failures_take_the_place_of_data_and_the_stream_goes_on():
    pair = Pair()
    pair.sender.fail(FIRST, "rank 1, stage 1, micro-batch 0: the codec raised")
    frame, buffer = pair.receive()
    assert frame.failure == "rank 1, stage 1, micro-batch 0: the codec raised"
    assert frame.work == FIRST and frame.payload is None and frame.trail == (0, 0)
    pair.receiver.release(buffer)
    pair.sender.send(SECOND, payload(work=SECOND), (0,))
    assert pair.receive()[0].work == SECOND
    pair.sender.fail(TWO_ROWS, "x" * 10_000)
    frame, _ = pair.receive()
    assert frame.failure == "x" * 4096 and frame.work == TWO_ROWS
    pair.sender.fail(FIRST, "")
    assert pair.receive()[0].failure == "unknown"
    assert pair.sender.traffic.num_frames == 1 and pair.sender.traffic.control_bytes > 4096


def test_frames_out_of_turn_are_refused():
    """A frame that was lost, or came twice, is told by the next one's checksum."""
    pair = Pair()
    pair.sender.send(FIRST, payload(), (0,))
    pair.sender.send(SECOND, payload(work=SECOND), (0,))
    pair.arrivals.take()
    with pytest.raises(BadFrame, match="frame 0: the checksum does not match: .* is not the next one"):
        pair.receive()
    pair = Pair()
    pair.sender.send(FIRST, payload(), (0,))
    _, buffer = pair.receive()
    with pytest.raises(BadFrame, match="frame 1: the checksum does not match"):
        pair.receiver.open(buffer)


@pytest.mark.parametrize("other", [{"codec_ids": (78,)}, {"link_index": 2}, {"dtype": torch.bfloat16}])
def test_another_links_frame_is_refused(other):
    stranger = Pair(dataclasses.replace(SPEC, wire=dataclasses.replace(WIRE, **other)))
    stranger.sender.send(FIRST, payload(), (0,))
    with pytest.raises(BadFrame, match="sender has another version or codec; run one release on all ranks"):
        Pair().receiver.open(stranger.arrivals.take()[1])


def test_end_is_repeated_for_every_posted_receive():
    pair = Pair()
    FrameSender(SPEC, pair.box, receives_ahead=3).end()
    assert [pair.receive()[0] for _ in range(3)] == [None] * 3
    assert pair.arrivals.is_empty()


FRAME_NBYTES = HEADER_NBYTES + 40


@pytest.mark.parametrize("kind", ["data", "failure", "end"])
@pytest.mark.parametrize("mask", [1, 16, 128, 255])
def test_a_flipped_byte_anywhere_is_caught(mask, kind):
    frame_nbytes = BASE_NBYTES if kind == "end" else FRAME_NBYTES
    for position in range(frame_nbytes):

        def flip(buffer, nbytes, position=position):
            assert nbytes == frame_nbytes
            buffer[position] ^= mask

        pair = Pair(change=flip)
        if kind == "data":
            pair.sender.send(FIRST, payload(), (5,))
        elif kind == "failure":
            pair.sender.fail(FIRST, "x" * 40)
        else:
            pair.sender.end()
        with pytest.raises(BadFrame, match="link layer:3:node1->node2, frame 0: "):
            pair.receive()


@given(length=st.integers(0, FRAME_NBYTES - 1), filler=st.integers(0, 255))
def test_a_truncated_frame_is_caught(length, filler):
    """What does not arrive is whatever the buffer held before."""
    changed = []

    def cut(buffer, nbytes):
        before = buffer[length:nbytes].clone()
        buffer[length:nbytes] = filler
        changed.append(not torch.equal(before, buffer[length:nbytes]))

    pair = Pair(change=cut)
    pair.sender.send(FIRST, payload(), (5,))
    if changed[0]:
        with pytest.raises(BadFrame):
            pair.receive()
    else:
        assert pair.receive()[0].work == FIRST


@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_in_place_of_a_frame_are_refused(raw):
    changed = []

    def replace(buffer, nbytes):
        before = buffer[:nbytes].clone()
        buffer[: len(raw)] = torch.tensor(list(raw), dtype=torch.uint8)
        changed.append(not torch.equal(before, buffer[:nbytes]))

    pair = Pair(change=replace)
    pair.sender.send(FIRST, payload(), (5,))
    if changed[0]:
        with pytest.raises(BadFrame):
            pair.receive()
    else:
        assert pair.receive()[0].work == FIRST


@given(st.binary(min_size=1, max_size=40))
def test_meta_that_no_sender_writes_is_refused(blob):
    """The checksum is right, the meta block is not: a sender of another make."""
    pair = Pair()
    encode = WireFormat.encode

    def claim_meta(wire, header):
        return encode(wire, dataclasses.replace(header, meta_nbytes=header.body_nbytes))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WireFormat, "encode", claim_meta)
        pair.sender.send(FIRST, Payload(torch.tensor(list(blob), dtype=torch.uint8), SHAPES[FIRST]), (0,))
    try:
        frame, _ = pair.receive()
    except BadFrame:
        return
    assert frame.payload.meta_nbytes == len(blob)  # only a canonical block passes


def test_results_are_bytes_without_a_shape():
    spec = ResultSpec(
        name="result:node3->node0",
        wire=WireFormat(link_index=1, num_trail=1, codec_ids=()),
        bound=lambda work: 8 * (work.microbatch_index + 1),
        max_nbytes=16,
    )
    pair = Pair(spec)
    with pytest.raises(ValueError, match="9 bytes, its codec's max_nbytes promised at most 8"):
        pair.sender.send(FIRST, Payload(torch.zeros(9, dtype=torch.uint8), ()), (70,))
    pair.sender.send(SECOND, Payload(torch.arange(16, dtype=torch.uint8), ()), (70,))
    frame, _ = pair.receive()
    assert frame.payload.data.tolist() == list(range(16)) and frame.trail == (70, 16)
    assert pair.sender.traffic.num_tokens == 0 and pair.sender.traffic.payload_bytes == 16


def test_the_buffers_hold_every_frame_that_its_bound_allows():
    """Rounding may make a bound grow faster than with rows or tokens alone: no frame may exceed its buffer."""

    def blocks(kind, shape):
        return shape[0] * (-(-shape[1] // 8) * 20)

    spec = dataclasses.replace(SPEC, bound=blocks, max_rows=7, max_tokens=40, microbatch_shapes=[])
    for num_rows in range(1, 8):
        for num_tokens in range(1, 40 // num_rows + 1):
            _, bound = spec.expect(rows(num_rows, num_tokens))
            assert bound <= spec.max_body_nbytes, (num_rows, num_tokens)
