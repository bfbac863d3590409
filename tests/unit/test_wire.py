"""Headers of frames: their bytes, and that nothing but what a sender writes is taken for one."""

import dataclasses
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.wire import (
    BASE_NBYTES,
    MAX_NOTE_NBYTES,
    BadFrame,
    Header,
    WireFormat,
    decode_text,
    encode_text,
    header_nbytes,
    is_end,
)
from pipeline.partition.passes import Pass, PassKind, Row

WIRE = WireFormat(link_index=2, num_trail=2, codec_ids=(0x0123456789ABCDEF,), dtype=torch.bfloat16)
SCORE = Pass(kind=PassKind.SCORE, microbatch_index=7)
PREFILL = Pass(kind=PassKind.PREFILL, rows=(Row(3, 0), Row(255, 2**23 - 1, from_slot=9)), num_tokens=2, samples=True)
ECHO = Pass(kind=PassKind.PREFILL, rows=(Row(3, 9), Row(4, 2)), num_tokens=2, samples=True, echoes=True)
DECODE = Pass(kind=PassKind.DECODE, rows=(Row(1, 300),), num_tokens=1, scores=True, microbatch_index=2**32 - 1)
IDS = np.array([[5, 70_000], [2**31 - 1, 0]])

HEADERS = {
    "score": Header(work=SCORE, body_nbytes=1034, meta_nbytes=10, trail=(1000, 2**34)),
    "prefill": Header(work=PREFILL, body_nbytes=512, trail=(0, 127), token_ids=IDS, note=b"seed"),
    "echo": Header(work=ECHO, body_nbytes=64, trail=(1, 2)),
    "decode": Header(work=DECODE, body_nbytes=64, trail=(128, 16384)),
    "failed": Header(work=SCORE, failed=True, body_nbytes=40, trail=(0, 0)),
    "end": Header(work=None),
}
# Base without its checksum, then the tail; of each the fields by themselves.
GOLDEN = {
    "score": ("0a040000 41 00 0000", "07000000 e807 8080808040 0a00"),
    "prefill": ("00020000 aa 02 0200", "03000000 ffffffff 09 00 7f 05000000 70110100 ffffff7f 00000000 0400 73656564"),
    "echo": ("40000000 1a 02 0200", "03090000 04020000 01 02"),
    "decode": ("40000000 13 01 0100", "012c0100 ffffffff 8001 808001"),
    "failed": ("28000000 05 00 0000", "07000000 00 00"),
    "end": ("00000000 00 00 0000", ""),
}


def frame_of(header, wire=WIRE, sequence=0, body=b""):
    base, tail = wire.encode(header)
    crc = wire.checksum(sequence, base[4:], body, tail)
    return crc.to_bytes(4, "little") + base[4:] + body + tail


def same(one, other):
    """Equal headers, ids included."""
    ids = one.token_ids, other.token_ids
    both = [x is not None for x in ids]
    return one == other and (not any(both) or all(both) and ids[1].dtype == np.int64 and np.array_equal(*ids))


def test_the_bound_of_a_tail_is_that_of_the_longest():
    wire = dataclasses.replace(WIRE, id_nbytes=3)
    rows = tuple(Row(slot, 5, from_slot=9) for slot in range(4))
    work = Pass(kind=PassKind.PREFILL, rows=rows, num_tokens=2, scores=True, microbatch_index=0)
    _, tail = wire.encode(
        Header(
            work=work,
            body_nbytes=8,
            meta_nbytes=8,
            trail=(2**34,) * wire.num_trail,
            token_ids=np.zeros((4, 2), np.int64),
            note=b"x" * MAX_NOTE_NBYTES,
        )
    )
    assert len(tail) == wire.max_tail_nbytes(max_rows=4, max_ids=8)


@pytest.mark.parametrize("name", HEADERS)
def test_golden_bytes(name):
    base, tail = WIRE.encode(HEADERS[name])
    golden_base, golden_tail = (part.replace(" ", "") for part in GOLDEN[name])
    assert (base[:4].hex(), base[4:].hex(), tail.hex()) == ("00000000", golden_base, golden_tail)
    assert len(base) == BASE_NBYTES == 12
    assert is_end(torch.frombuffer(bytearray(base), dtype=torch.uint8)) is (name == "end")
    assert WIRE.is_failure(base) is (name == "failed")


def test_golden_checksums():
    """Version, link, number of the frame, codec ids and dtype come before what is sent."""
    told = bytes.fromhex("03 0200 00000000 efcdab8967452301") + b"torch.bfloat16"
    assert WIRE.checksum(0, b"abc") == zlib.crc32(told + b"abc")
    assert WIRE.checksum(0) == 0xA94381B4
    assert WIRE.checksum(1, b"abc") == WIRE.checksum(1, b"a", memoryview(b"bc")) == 0x593977A3


@pytest.mark.parametrize("name", HEADERS)
def test_round_trip(name):
    base, tail = WIRE.encode(HEADERS[name])
    for behind in (b"", b"\xff" * 40):  # a buffer is longer than the frame in it
        header, nbytes = WIRE.decode(base, tail + behind)
        assert same(header, HEADERS[name]) and nbytes == len(tail)


@st.composite
def wires_and_headers(draw):
    wire = WireFormat(
        link_index=draw(st.integers(0, 255)),
        num_trail=draw(st.integers(0, 6)),
        codec_ids=tuple(draw(st.lists(st.integers(0, 2**64 - 1), max_size=2))),
        id_nbytes=draw(st.integers(2, 4)),
    )
    kind = draw(st.sampled_from(PassKind))
    rows, num_tokens, scores, samples = (), 0, False, False
    if kind is not PassKind.SCORE:
        slots, starts = st.integers(0, 255), st.integers(0, 2**23 - 1)
        row = st.builds(Row, slots, starts, st.none() | slots)
        rows, num_tokens = tuple(draw(st.lists(row, min_size=1, max_size=5))), draw(st.integers(1, 9))
        scores, samples = draw(st.sampled_from([(False, False), (False, True), (True, False)]))
    echoes = samples and kind is PassKind.PREFILL and draw(st.booleans())
    index = draw(st.integers(0, 2**32 - 1)) if scores or kind is PassKind.SCORE else None
    work = Pass(
        kind=kind,
        rows=rows,
        num_tokens=num_tokens,
        samples=samples,
        echoes=echoes,
        scores=scores,
        microbatch_index=index,
    )
    body_nbytes = draw(st.integers(0, 2**32 - 1))
    ids = None
    if rows and draw(st.booleans()):
        highest = min(2 ** (8 * wire.id_nbytes), 2**32) - 1
        shape = len(rows), num_tokens
        size = shape[0] * shape[1]
        ids = np.array(draw(st.lists(st.integers(0, highest), min_size=size, max_size=size))).reshape(shape)
    header = Header(
        work=work,
        failed=draw(st.booleans()),
        body_nbytes=body_nbytes,
        meta_nbytes=draw(st.integers(0, min(body_nbytes, 65535))),
        trail=tuple(draw(st.lists(st.integers(0, 2**35 - 1), min_size=wire.num_trail, max_size=wire.num_trail))),
        token_ids=ids,
        note=draw(st.binary(max_size=50)),
    )
    return wire, header


@given(wires_and_headers())
def test_any_header_makes_the_round_trip_within_its_bounds(case):
    wire, header = case
    base, tail = wire.encode(header)
    decoded, nbytes = wire.decode(base, tail)
    assert same(decoded, header) and nbytes == len(tail)
    num_ids = 0 if header.token_ids is None else header.token_ids.size
    assert len(tail) <= wire.max_tail_nbytes(max_rows=len(header.work.rows), max_ids=num_ids)


@given(wires_and_headers())
def test_bytes_of_a_header_are_foretold(case):
    wire, header = case
    header = dataclasses.replace(header, note=b"", token_ids=None)
    # A row with a source takes a byte more, which reports leave out.
    sources = sum(row.from_slot is not None for row in header.work.rows)
    foretold = header_nbytes(
        trail=header.trail,
        num_rows=len(header.work.rows),
        is_indexed=header.work.microbatch_index is not None,
        meta=header.meta_nbytes > 0,
    )
    assert sum(map(len, wire.encode(header))) == foretold + sources


@given(base=st.binary(min_size=BASE_NBYTES, max_size=BASE_NBYTES), tail=st.binary(max_size=200))
def test_any_bytes_are_refused_or_bounded(base, tail):
    """What is decoded is certain only with the checksum; before it, nothing worse than a BadFrame may come of it."""
    try:
        header, nbytes = WIRE.decode(base, tail)
    except BadFrame:
        return
    assert nbytes <= len(tail)
    if header.work is not None:
        assert header.meta_nbytes <= header.body_nbytes


@pytest.mark.parametrize("name", HEADERS)
def test_every_truncation_of_a_tail_is_caught(name):
    base, tail = WIRE.encode(HEADERS[name])
    for length in range(len(tail)):
        with pytest.raises(BadFrame, match=f"a tail of {length} bytes ends too early"):
            WIRE.decode(base, tail[:length])


@pytest.mark.parametrize("num_rows, num_tokens", [(0, 0), (0, 3), (3, 0)])
def test_ids_of_no_tokens_are_refused(num_rows, num_tokens):
    code = PassKind.DECODE | 1 << 5
    base = bytes(8) + bytes([code, num_rows]) + num_tokens.to_bytes(2, "little")
    with pytest.raises(BadFrame):
        WIRE.decode(base, bytes(200))


@pytest.mark.parametrize(
    ("base", "words"),
    [
        (bytes(4) + b"\1\0\0\0" + bytes(4), "END with code 0, 1 bytes and 0 rows"),
        (bytes(8) + b"\4\0\0\0", "END with code 4, 0 bytes and 0 rows"),
        (bytes(8) + b"\0\2\0\0", "END with code 0, 0 bytes and 2 rows"),
        (bytes(8) + b"\0\0\5\0", "END with code 0"),
        (bytes(8) + b"\x1b\0\0\0", "a DECODE pass that samples and scores"),
        (bytes(8) + b"\1\0\0\0", "a tail of 0 bytes ends too early"),
    ],
)
def test_what_no_sender_writes_is_refused(base, words):
    with pytest.raises(BadFrame, match=words):
        WIRE.decode(base, b"")


def test_a_number_has_at_most_five_bytes():
    base, _ = WIRE.encode(HEADERS["failed"])
    with pytest.raises(BadFrame, match="a number of more than five bytes"):
        WIRE.decode(base, bytes(4) + b"\xff" * 30)


def test_meta_is_part_of_the_body():
    base, tail = WIRE.encode(dataclasses.replace(HEADERS["score"], body_nbytes=9))
    with pytest.raises(BadFrame, match="10 bytes of meta in a body of 9"):
        WIRE.decode(base, tail)


def test_nothing_is_allocated_for_what_a_header_merely_claims():
    claimed = bytes(8) + bytes([PassKind.PREFILL | 1 << 5, 255]) + b"\xff\xff"  # 255 rows of 65,535 ids
    tail = bytes(255 * 4 + 4096)
    tracemalloc.start()
    try:
        with pytest.raises(BadFrame):
            WIRE.decode(claimed, tail)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", HEADERS)
def test_the_checksum_covers_every_bit(name):
    """Over a frame as it travels: base without the checksum, body, tail."""
    frame = frame_of(HEADERS[name], body=b"payload")
    crc = int.from_bytes(frame[:4], "little")
    assert WIRE.checksum(0, frame[4:]) == crc
    for position in range(4, len(frame)):
        for bit in range(8):
            changed = bytearray(frame)
            changed[position] ^= 1 << bit
            assert WIRE.checksum(0, changed[4:]) != crc


def test_the_checksum_knows_what_is_not_sent():
    """Another link, codec, number of codecs, dtype or a frame out of turn: refused like a damaged one."""
    others = [
        dataclasses.replace(WIRE, link_index=3),
        dataclasses.replace(WIRE, codec_ids=(1,)),
        dataclasses.replace(WIRE, codec_ids=()),
        dataclasses.replace(WIRE, codec_ids=(*WIRE.codec_ids, 0)),
        dataclasses.replace(WIRE, dtype=torch.float16),
        dataclasses.replace(WIRE, dtype=None),
    ]
    found = [wire.checksum(0, b"frame") for wire in [WIRE, *others]]
    found += [WIRE.checksum(n, b"frame") for n in (1, 2, 2**32 - 1)]
    assert len(set(found)) == len(found)
    assert WIRE.checksum(2**32, b"frame") == WIRE.checksum(0, b"frame")  # the count begins again


def of_rows(*rows, num_tokens=1):
    return Header(work=Pass(kind=PassKind.DECODE, rows=rows, num_tokens=num_tokens))


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (of_rows(*[Row(0, 0)] * 256), "256 rows of 1 tokens do not fit into a frame, which has at most 255 rows"),
        (of_rows(Row(0, 0), num_tokens=65_536), "1 rows of 65536 tokens do not fit into a frame"),
        (of_rows(Row(256, 0)), r"Row\(slot=256, .* slots go up to 255"),
        (of_rows(Row(0, 2**23)), "start to 8388607"),
        (of_rows(Row(0, -1)), "start to 8388607"),
        (of_rows(Row(0, 1, from_slot=256)), "slots go up to 255"),
        (Header(work=SCORE, body_nbytes=2**32), "a payload of 4294967296 bytes .* lower batch_size"),
        (Header(work=SCORE, note=bytes(4097)), "a note of 4097 bytes, a frame has at most 4096"),
        (Header(work=DECODE, token_ids=np.array([[65_536]])), "token ids 65536 to 65536 do not fit into 2 bytes"),
        (Header(work=DECODE, token_ids=np.array([[-1]])), "token ids -1 to -1 do not fit"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_sender(header, words):
    with pytest.raises(ValueError, match=words):
        WireFormat(link_index=0, num_trail=0, codec_ids=(), id_nbytes=2).encode(header)


@given(st.text(max_size=6000))
def test_causes_are_bounded_and_printable(text):
    body = encode_text(text)
    assert len(body) <= MAX_NOTE_NBYTES == 4096
    assert all(c.isprintable() for c in decode_text(body))


@pytest.mark.parametrize(
    "work",
    [
        dataclasses.replace(DECODE, samples=True),
        dataclasses.replace(DECODE, samples=True, scores=False, microbatch_index=None, echoes=True),
        dataclasses.replace(ECHO, samples=False),
    ],
)
def test_passes_that_a_code_cannot_tell_apart_are_not_sent(work):
    with pytest.raises(ValueError, match="cannot sample and score"):
        WIRE.encode(Header(work=work, trail=(1, 2)))
