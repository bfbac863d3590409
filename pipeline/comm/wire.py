"""Frames: a checksummed header in front of a codec's bytes.

    base header (60 bytes) | trail (8 bytes per upstream link) | meta | data

The base header says whose bytes these are and how many; the trail repeats what the micro-batch has cost on the
links before this one, so that rank 0 learns every link's payload bytes from the frames themselves and can write
them to its journal. Both have a size that sender and receiver derive from the plan. Lengths are checked against
what the plan allows before anything is read or allocated. No process group here: this module turns headers into
bytes and back.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

import torch

from pipeline.comm.watchdog import PipelineError

__all__ = [
    "BadFrame",
    "Expectation",
    "FrameKind",
    "Header",
    "RemoteError",
    "body_checksum",
    "decode_error",
    "encode_error",
    "header_nbytes",
]

MAGIC = b"TWfr"
VERSION = 1
MAX_ERROR_NBYTES = 4096

# checksum of the rest, magic, version, kind, dtype, stage, trail entries, codec id, micro-batch, B, T, H,
# meta bytes, data bytes, body checksum, body is checksummed
_BASE = struct.Struct("<I4sHBBHHQIIIIIQII")
_TRAIL_ENTRY = struct.Struct("<Q")
_DTYPES = {0: torch.uint8, 1: torch.float32, 2: torch.float16, 3: torch.bfloat16}
_DTYPE_CODES = {dtype: code for code, dtype in _DTYPES.items()}


class BadFrame(PipelineError):
    """Bytes that are not the frame which the plan says comes next."""


class RemoteError(PipelineError):
    """Another rank failed and said so in a frame; the text is its message, with its rank and position."""

    names_place = True


class FrameKind(IntEnum):
    DATA = 1
    ERROR = 2  # the body is a UTF-8 message; no further frame follows
    END = 3  # the sender has no more micro-batches


@dataclass(frozen=True, kw_only=True)
class Header:
    """What travels in front of a payload.

    `shape` is (B, T, H) of the original tensor and `dtype` its type, `trail` the payload bytes that this
    micro-batch took on each earlier link. `body_crc` is None where the body stays on a GPU and is not
    checksummed.
    """

    kind: FrameKind
    stage_index: int
    microbatch_index: int
    codec_id: int
    dtype: torch.dtype
    shape: tuple[int, int, int]
    meta_nbytes: int
    data_nbytes: int
    body_crc: int | None
    trail: tuple[int, ...] = ()

    @property
    def body_nbytes(self) -> int:
        return self.meta_nbytes + self.data_nbytes

    def encode(self) -> bytes:
        base = _BASE.pack(
            0,
            MAGIC,
            VERSION,
            self.kind,
            _DTYPE_CODES[self.dtype],
            self.stage_index,
            len(self.trail),
            self.codec_id,
            self.microbatch_index,
            *self.shape,
            self.meta_nbytes,
            self.data_nbytes,
            self.body_crc or 0,
            self.body_crc is not None,
        )
        unsigned = (base + b"".join(_TRAIL_ENTRY.pack(n) for n in self.trail))[4:]
        return struct.pack("<I", zlib.crc32(unsigned)) + unsigned


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What the plan says of a link's frames; every header is held against it."""

    stage_index: int
    num_trail: int
    codec_id: int
    dtype: torch.dtype

    def decode(self, raw: bytes, *, microbatch_index: int, shape: tuple[int, int, int], max_body_nbytes: int) -> Header:
        """Parse a header. Raises BadFrame when it is damaged or is not the frame that is due.

        `shape` is the micro-batch's (B, T, H) and `max_body_nbytes` the codec's bound for it. Of an ERROR or
        END frame only identity and length are checked.
        """
        expected_nbytes = header_nbytes(self.num_trail)
        if len(raw) < expected_nbytes:
            raise BadFrame(f"header of {len(raw)} bytes, expected {expected_nbytes}")
        raw = bytes(raw[:expected_nbytes])
        crc, magic, version, kind, dtype, stage, num_trail, codec_id, microbatch, *rest = _BASE.unpack_from(raw)
        b, t, h, meta_nbytes, data_nbytes, body_crc, has_crc = rest
        if magic != MAGIC:
            raise BadFrame(f"magic {magic!r}, expected {MAGIC!r}: these bytes are no frame")
        if zlib.crc32(raw[4:]) != crc:
            raise BadFrame("the header's checksum does not match: it was damaged on the way")
        if version != VERSION:
            raise BadFrame(f"frame version {version}, this program speaks {VERSION}: run one release on all ranks")
        if kind not in FrameKind.__members__.values() or dtype not in _DTYPES or has_crc not in (0, 1):
            raise BadFrame(f"kind {kind}, dtype code {dtype} or checksum flag {has_crc} is unknown")
        trail = tuple(
            _TRAIL_ENTRY.unpack_from(raw, _BASE.size + i * _TRAIL_ENTRY.size)[0] for i in range(self.num_trail)
        )
        header = Header(
            kind=FrameKind(kind),
            stage_index=stage,
            microbatch_index=microbatch,
            codec_id=codec_id,
            dtype=_DTYPES[dtype],
            shape=(b, t, h),
            meta_nbytes=meta_nbytes,
            data_nbytes=data_nbytes,
            body_crc=body_crc if has_crc else None,
            trail=trail,
        )
        checks: list[tuple[str, object, object]] = [
            ("trail entries", num_trail, self.num_trail),
            ("stage", stage, self.stage_index),
        ]
        if header.kind is not FrameKind.ERROR:
            checks.append(("micro-batch", microbatch, microbatch_index))
        if header.kind is FrameKind.DATA:
            checks += [
                ("codec id", codec_id, self.codec_id),
                ("dtype", header.dtype, self.dtype),
                ("shape", header.shape, shape),
            ]
        for what, got, expected in checks:
            if got != expected:
                raise BadFrame(f"{what} {got}, expected {expected}")
        bound = {FrameKind.DATA: max_body_nbytes, FrameKind.ERROR: MAX_ERROR_NBYTES, FrameKind.END: 0}[header.kind]
        if header.body_nbytes > bound:
            raise BadFrame(f"body of {header.body_nbytes} bytes, at most {bound} are possible here")
        return header


def header_nbytes(num_trail: int) -> int:
    """Size of a header on a link with `num_trail` links before it."""
    return _BASE.size + num_trail * _TRAIL_ENTRY.size


def body_checksum(body: torch.Tensor) -> int:
    """CRC-32 of a uint8 tensor in host memory."""
    return zlib.crc32(body.numpy().data)


def encode_error(message: str) -> bytes:
    """Body of an ERROR frame: UTF-8, cut to its bound."""
    return message.encode(errors="replace")[:MAX_ERROR_NBYTES]


def decode_error(body: bytes) -> str:
    """Inverse of `encode_error`; control characters become spaces, since the text goes to a terminal."""
    text = body.decode(errors="replace")
    return "".join(c if c.isprintable() else " " for c in text)
