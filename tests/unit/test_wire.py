import struct
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.comm.wire import (
    BadFrame,
    Expectation,
    FrameKind,
    Header,
    body_checksum,
    decode_error,
    encode_error,
    header_nbytes,
)

EXPECTED = Expectation(stage_index=2, num_trail=2, codec_id=0x0123456789ABCDEF, dtype=torch.bfloat16)
SHAPE = (2, 16, 64)
DUE = {"microbatch_index": 7, "shape": SHAPE, "max_body_nbytes": 2048}


def header(**changes):
    fields = {
        "kind": FrameKind.DATA,
        "stage_index": 2,
        "microbatch_index": 7,
        "codec_id": 0x0123456789ABCDEF,
        "dtype": torch.bfloat16,
        "shape": SHAPE,
        "meta_nbytes": 10,
        "data_nbytes": 1024,
        "body_crc": 0xDEADBEEF,
        "trail": (1000, 2**40),
    }
    return Header(**fields | changes)


def test_round_trip():
    raw = header().encode()
    assert len(raw) == header_nbytes(2) == 76
    assert EXPECTED.decode(raw, **DUE) == header()


def test_golden_bytes():
    assert header().encode().hex() == (
        "0edc8fa1"
        "54576672"
        "0100"
        "01"
        "03"
        "0200"
        "0200"
        "efcdab8967452301"
        "07000000"
        "02000000"
        "10000000"
        "40000000"
        "0a000000"
        "0004000000000000"
        "efbeadde"
        "01000000"
        "e803000000000000"
        "0000000000010000"
    )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"stage_index": 3}, "stage 3, expected 2"),
        ({"microbatch_index": 6}, "micro-batch 6, expected 7"),
        ({"codec_id": 1}, "codec id 1, expected"),
        ({"dtype": torch.float32}, "dtype torch.float32, expected torch.bfloat16"),
        ({"shape": (2, 16, 65)}, "shape .* expected"),
        ({"data_nbytes": 2**40}, "body of .* at most 2048"),
        ({"meta_nbytes": 2000}, "body of 3024 bytes, at most 2048"),
        ({"trail": (1,)}, "header of 68 bytes, expected 76"),
        ({"trail": (1, 2, 3)}, "checksum"),
        ({"kind": FrameKind.END}, "body of 1034 bytes, at most 0"),
        ({"kind": FrameKind.ERROR, "data_nbytes": 5000}, "at most 4096"),
    ],
)
def test_what_is_not_due_is_refused(changes, words):
    with pytest.raises(BadFrame, match=words):
        EXPECTED.decode(header(**changes).encode(), **DUE)


def resigned(raw: bytes, offset: int, value: bytes) -> bytes:
    changed = raw[4:offset] + value + raw[offset + len(value) :]
    return struct.pack("<I", zlib.crc32(changed)) + changed


@pytest.mark.parametrize(
    "offset, value, words",
    [
        (8, b"\x02\x00", "version 2"),
        (10, b"\x09", "kind 9"),
        (11, b"\x77", "dtype code 119"),
        (56, b"\x05", "checksum flag 5"),
    ],
)
def test_unknown_values_behind_a_valid_checksum(offset, value, words):
    with pytest.raises(BadFrame, match=words):
        EXPECTED.decode(resigned(header().encode(), offset, value), **DUE)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(raw):
    with pytest.raises(BadFrame):
        EXPECTED.decode(raw, **DUE)


@given(st.integers(0, 75), st.integers(1, 255))
def test_every_flipped_byte_is_caught(position, mask):
    raw = bytearray(header().encode())
    raw[position] ^= mask
    with pytest.raises(BadFrame):
        EXPECTED.decode(bytes(raw), **DUE)


@given(st.integers(0, 75))
def test_every_truncation_is_caught(length):
    with pytest.raises(BadFrame, match="expected 76"):
        EXPECTED.decode(header().encode()[:length], **DUE)


def test_an_error_of_an_earlier_microbatch_is_accepted():
    raw = header(
        kind=FrameKind.ERROR, microbatch_index=3, shape=(0, 0, 0), meta_nbytes=0, data_nbytes=40, body_crc=None
    )
    assert EXPECTED.decode(raw.encode(), **DUE).kind is FrameKind.ERROR


@given(st.text(max_size=6000))
def test_error_texts_are_bounded_and_printable(text):
    body = encode_error(text)
    assert len(body) <= 4096
    assert all(c.isprintable() for c in decode_error(body))


def test_body_checksum_is_crc32():
    data = torch.arange(256, dtype=torch.uint8)
    assert body_checksum(data) == zlib.crc32(bytes(range(256)))
    assert body_checksum(data[:0]) == 0
