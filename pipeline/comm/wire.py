"""Frames: what a rank must know of a pass, around a codec's bytes.

    base (12 bytes) | body: data, meta | tail: rows (4 bytes each), what else the pass has

The base says how long the body is and which parts the tail has. What both ends know is not sent: codec, dtype, place in
the chain and the number of frames before this one go into the checksum, so that a frame that is another link's, another
release's or out of turn is refused like a damaged one. The data comes right behind the base, aligned for views.

Lengths are checked against what the link allows before anything is read or allocated. No process group here: this
module turns headers into bytes and back.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.comm.watchdog import PipelineError
from pipeline.partition.passes import Pass, PassKind, Row

__all__ = [
    "BASE_NBYTES",
    "MAX_NOTE_NBYTES",
    "BadFrame",
    "Header",
    "WireFormat",
    "decode_text",
    "encode_text",
    "header_nbytes",
    "is_end",
]

VERSION = 3
MAX_BODY_NBYTES = 2**32 - 1
MAX_ROWS = 255
MAX_ROW_TOKENS = 2**16 - 1
MAX_SLOT = 255
MAX_START = 2**23 - 1
MAX_NOTE_NBYTES = 4096

_BASE = struct.Struct("<IIBBH")  # checksum of all that follows, body bytes, code, rows, tokens a row
BASE_NBYTES = _BASE.size
_CODE_PLACE = 8
_ROW = struct.Struct("<I")  # slot, start in 23 bits, and whether it has a `from_slot`
_INDEX = struct.Struct("<I")
_LENGTH = struct.Struct("<H")
# The code: the kind of pass in two bits (0: END), then flags. No pass samples and scores: both together are `echoes`.
_FAILED, _SAMPLES, _SCORES, _HAS_IDS, _HAS_META, _HAS_NOTE = (1 << bit for bit in range(2, 8))
_MAX_VARINT_NBYTES = 5


class BadFrame(PipelineError):
    """Bytes that are not the frame which comes next on this link."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What travels around a payload; `work` is None in the END of a stream.

    `trail` holds the payload bytes that the pass took on the links before this one, `token_ids` int64 [rows, tokens]
    what later ranks need of the input, `note` bytes for the head's rank. With `failed` the body is the cause, as text.
    """

    work: Pass | None
    failed: bool = False
    body_nbytes: int = 0
    meta_nbytes: int = 0
    trail: tuple[int, ...] = ()
    token_ids: np.ndarray | None = field(default=None, compare=False)
    note: bytes = b""


@dataclass(frozen=True, kw_only=True)
class WireFormat:
    """How one link writes headers, on both ends alike.

    `codec_ids` are those of the link's codecs, `dtype` that of the hidden states, None where there are none;
    `num_trail` links lie before it; a token id takes `id_nbytes` bytes.
    """

    link_index: int
    num_trail: int
    codec_ids: tuple[int, ...]
    dtype: torch.dtype | None = None
    id_nbytes: int = 4

    def encode(self, header: Header) -> tuple[bytes, bytes]:
        """(base with a checksum of 0, tail). Raises ValueError for what does not fit into its fields."""
        work = header.work
        if work is None:
            return _BASE.pack(0, 0, 0, 0, 0), b""
        self._check_fits(header, work)
        code = int(work.kind)
        code |= (_FAILED * header.failed) | (_SAMPLES * work.samples) | (_SCORES * (work.scores or work.echoes))
        code |= (_HAS_IDS * (header.token_ids is not None)) | (_HAS_META * (header.meta_nbytes > 0))
        code |= _HAS_NOTE * (len(header.note) > 0)
        base = _BASE.pack(0, header.body_nbytes, code, len(work.rows), work.num_tokens)
        parts = [_ROW.pack(r.slot | r.start << 8 | (r.from_slot is not None) << 31) for r in work.rows]
        parts.append(bytes(r.from_slot for r in work.rows if r.from_slot is not None))
        if work.microbatch_index is not None:
            parts.append(_INDEX.pack(work.microbatch_index))
        parts += map(_varint, header.trail)
        if header.meta_nbytes:
            parts.append(_LENGTH.pack(header.meta_nbytes))
        if header.token_ids is not None:
            parts.append(_ids_to_bytes(header.token_ids, self.id_nbytes))
        if header.note:
            parts += [_LENGTH.pack(len(header.note)), header.note]
        return base, b"".join(parts)

    def checksum(self, sequence: int, *parts: memoryview | bytes) -> int:
        """CRC-32 of `parts` (all of a frame but its checksum) as the frame number `sequence` of the link."""
        place = struct.pack("<BHI", VERSION, self.link_index, sequence & 0xFFFFFFFF)
        codecs = struct.pack(f"<{len(self.codec_ids)}Q", *self.codec_ids)
        crc = zlib.crc32(place + codecs + str(self.dtype).encode())
        for part in parts:
            crc = zlib.crc32(part, crc)
        return crc

    def decode(self, base: bytes, tail: bytes) -> tuple[Header, int]:
        """(header, bytes of its tail); `tail` may go on behind its end. Raises BadFrame for what no sender writes.

        What it says is certain only when the checksum has been compared.
        """
        _, body_nbytes, code, num_rows, num_tokens = _BASE.unpack(base)
        if not code & 3:
            if body_nbytes or code or num_rows or num_tokens:
                raise BadFrame(f"END with code {code}, {body_nbytes} bytes and {num_rows} rows")
            return Header(work=None), 0
        reader = _Reader(tail)
        try:
            kind = PassKind(code & 3)
            words = [reader.unpack(_ROW) for _ in range(num_rows)]
            sources = [reader.take(1)[0] if word >> 31 else None for word in words]
            rows = tuple(
                Row(word & 0xFF, word >> 8 & MAX_START, source) for word, source in zip(words, sources, strict=True)
            )
            samples, scores = bool(code & _SAMPLES), bool(code & _SCORES)
            echoes = samples and scores
            if echoes and kind is not PassKind.PREFILL:
                raise BadFrame(f"a {kind.name} pass that samples and scores")
            is_indexed = kind is PassKind.SCORE or (scores and not echoes)
            index = reader.unpack(_INDEX) if is_indexed else None
            trail = tuple(reader.varint() for _ in range(self.num_trail))
            meta_nbytes = reader.unpack(_LENGTH) if code & _HAS_META else 0
            ids = None
            if code & _HAS_IDS:
                if not num_rows * num_tokens:
                    raise BadFrame(f"token ids of {num_rows} rows of {num_tokens} tokens")
                ids = _ids_from_bytes(reader.take(num_rows * num_tokens * self.id_nbytes), num_rows, self.id_nbytes)
            note = bytes(reader.take(reader.unpack(_LENGTH))) if code & _HAS_NOTE else b""
        except (struct.error, IndexError) as e:
            raise BadFrame(f"a tail of {len(tail)} bytes ends too early: {e}") from e
        if meta_nbytes > body_nbytes:
            raise BadFrame(f"{meta_nbytes} bytes of meta in a body of {body_nbytes}")
        work = Pass(
            kind=kind,
            rows=rows,
            num_tokens=num_tokens,
            samples=samples,
            echoes=echoes,
            scores=scores and not echoes,
            microbatch_index=index,
        )
        header = Header(
            work=work,
            failed=bool(code & _FAILED),
            body_nbytes=body_nbytes,
            meta_nbytes=meta_nbytes,
            trail=trail,
            token_ids=ids,
            note=note,
        )
        return header, reader.position

    @staticmethod
    def is_failure(base: bytes) -> bool:
        """By the code of a base header; damage shows later."""
        return bool(base[_CODE_PLACE] & _FAILED)

    def max_tail_nbytes(self, *, max_rows: int, max_ids: int) -> int:
        """Bound of a tail on this link."""
        fixed = _INDEX.size + _MAX_VARINT_NBYTES * self.num_trail + 2 * _LENGTH.size + MAX_NOTE_NBYTES
        return fixed + max_rows * (_ROW.size + 1) + max_ids * self.id_nbytes

    def _check_fits(self, header: Header, work: Pass) -> None:
        if len(work.rows) > MAX_ROWS or work.num_tokens > MAX_ROW_TOKENS:
            raise ValueError(
                f"{len(work.rows)} rows of {work.num_tokens} tokens do not fit into a frame, which has at most "
                f"{MAX_ROWS} rows and {MAX_ROW_TOKENS} tokens a row"
            )
        if (work.samples and work.scores) or (work.echoes and not (work.samples and work.kind is PassKind.PREFILL)):
            raise ValueError(f"{work} cannot sample and score, and a PREFILL that samples alone can echo")
        for row in work.rows:
            slots = (row.slot, row.slot if row.from_slot is None else row.from_slot)
            if not 0 <= min(slots) <= max(slots) <= MAX_SLOT or not 0 <= row.start <= MAX_START:
                raise ValueError(f"{row} does not fit into a frame: slots go up to {MAX_SLOT}, start to {MAX_START}")
        if header.body_nbytes > MAX_BODY_NBYTES:
            raise ValueError(
                f"a payload of {header.body_nbytes} bytes does not fit into a frame, which has at most "
                f"{MAX_BODY_NBYTES}; lower batch_size or dataset.max_length"
            )
        if len(header.note) > MAX_NOTE_NBYTES:
            raise ValueError(f"a note of {len(header.note)} bytes, a frame has at most {MAX_NOTE_NBYTES}")
        ids = header.token_ids
        if ids is not None and ids.size and not 0 <= ids.min() <= ids.max() < 256**self.id_nbytes:
            raise ValueError(f"token ids {ids.min()} to {ids.max()} do not fit into {self.id_nbytes} bytes each")


def is_end(frame: torch.Tensor) -> bool:
    """Whether a uint8 tensor holds an END, by its code; damage shows later."""
    return not int(frame[_CODE_PLACE]) & 3


def header_nbytes(*, trail: Sequence[int], num_rows: int = 0, is_indexed: bool = False, meta: bool = False) -> int:
    """Bytes of a frame that are not payload: without token ids and notes. `is_indexed` in scoring."""
    return (
        BASE_NBYTES
        + num_rows * _ROW.size
        + is_indexed * _INDEX.size
        + sum(len(_varint(nbytes)) for nbytes in trail)
        + meta * _LENGTH.size
    )


class _Reader:
    """Takes parts off the front of bytes. Raises struct.error behind their end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def take(self, nbytes: int) -> bytes:
        part = self._data[self.position : self.position + nbytes]
        if len(part) < nbytes:
            raise struct.error(f"{nbytes} bytes wanted at {self.position}")
        self.position += nbytes
        return part

    def unpack(self, form: struct.Struct) -> int:
        (value,) = form.unpack(self.take(form.size))
        return value

    def varint(self) -> int:
        value = 0
        for place in range(_MAX_VARINT_NBYTES):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                return value
        raise struct.error("a number of more than five bytes")


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that another byte follows (LEB128)."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _ids_to_bytes(ids: np.ndarray, nbytes: int) -> bytes:
    return np.ascontiguousarray(ids.astype("<u4")).view(np.uint8).reshape(-1, 4)[:, :nbytes].tobytes()


def _ids_from_bytes(data: bytes, num_rows: int, nbytes: int) -> np.ndarray:
    wide = np.zeros((len(data) // nbytes, 4), np.uint8)
    wide[:, :nbytes] = np.frombuffer(data, np.uint8).reshape(-1, nbytes)
    return wide.view("<u4").reshape(num_rows, -1).astype(np.int64)


def encode_text(message: str) -> bytes:
    """UTF-8, cut to the bound of a failure's body."""
    return message.encode(errors="replace")[:MAX_NOTE_NBYTES]


def decode_text(body: bytes) -> str:
    """Inverse of `encode_text`; control characters become spaces, since the text goes to a terminal."""
    text = body.decode(errors="replace")
    return "".join(c if c.isprintable() else " " for c in text)
