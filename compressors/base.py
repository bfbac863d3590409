"""The contract between a codec and everything else: Compressor, Payload, LinkInfo, CorruptPayload.

A codec turns the hidden states that leave one pipeline stage into bytes and back. It knows neither
ranks nor process groups nor frames; the pipeline puts a header in front of the bytes and moves them.

    x [B, T, H]  --compress-->  Payload  --header, link, header-->  Payload  --decompress-->  x' [B, T, H]

Rules that a codec keeps (`python -m compressors.check` tests them):

* The bytes are real and complete: `decompress` is called on a codec object of another process, which has
  seen nothing but its own options.
* An object serves one end of a link, as encoder or as decoder, and one thread at a time; objects share no state that
  frames change.
* No state crosses frames, nor runs. Scratch buffers may be reused: `Payload.data` is valid until the same codec
  object's next `compress`, the result of `decompress` belongs to the caller.
* `max_nbytes(shape)` is a true upper bound; buffers of that size are posted before the bytes arrive.
* Every option is a keyword argument of `__init__` and is stored under its own name (the convention of
  scikit-learn's estimators), so that the canonical config, and with it the codec id in each frame, can be
  derived.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

__all__ = ["Compressor", "CorruptPayload", "LinkInfo", "Payload"]

MAX_META_ENTRIES = 64
MAX_META_NBYTES = 4096

_META_COUNT = struct.Struct("<B")
_META_ENTRY = struct.Struct("<BB")  # length of the key, type of the value
_META_VALUE = {0: struct.Struct("<q"), 1: struct.Struct("<d")}  # int64, float64
_META_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,63}")


class CorruptPayload(ValueError):
    """The bytes cannot have been written by this codec with these options for this shape."""


@dataclass(frozen=True, kw_only=True)
class LinkInfo:
    """What a codec may know of the link that it serves; both ends derive it from the config.

    `name` is the link's name (`layer:7:node0->node1`), `dtype` that of the hidden states on both sides, `checkpoint`
    the fingerprint of the model's files where it is known. No frame has more than `max_tokens` tokens (B * T): the
    config's batch size times its window length, the same on both ends and while the weights are still to be loaded.
    """

    name: str
    hidden_size: int
    max_tokens: int
    dtype: torch.dtype = torch.float32
    checkpoint: str | None = None


@dataclass(frozen=True, eq=False)
class Payload:
    """One compressed tensor.

    `data` is a contiguous 1-D uint8 tensor on any device, `shape` the shape of the original tensor, which
    travels in the frame's header. `meta` holds a few named numbers that travel in front of `data` and count
    as payload. Sizes are derived: there is no way to claim one.
    """

    data: torch.Tensor
    shape: tuple[int, ...]
    meta: Mapping[str, int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.data.dtype != torch.uint8 or self.data.dim() != 1 or not self.data.is_contiguous():
            raise TypeError(
                "Payload.data must be one contiguous 1-D uint8 tensor, got "
                f"{self.data.dtype} of shape {tuple(self.data.shape)}; "
                "compressors.bitpack.concat_bytes joins tensors of any dtype into one"
            )
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))

    @property
    def meta_nbytes(self) -> int:
        """Bytes that `meta` takes on the wire; 0 when there is none."""
        return len(encode_meta(self.meta))

    @property
    def nbytes(self) -> int:
        """Bytes that cross the link for this payload, without the frame's header."""
        return self.data.numel() + self.meta_nbytes


class Compressor(ABC):
    """Base class of all codecs. A subclass needs `name`, `compress` and `decompress`.

    Class attributes:
        name: the name in configs, tables and records.
        format_version: raise it when the bytes that the codec writes for the same input change.
        causal: the reconstruction of token t depends on no later token and on no other row.
        frame_invariant: the reconstruction of a token depends neither on which tokens came in the same frame nor on
            how a text was cut into frames or rows batched, bit for bit. Such a codec is causal, and it alone may carry
            a generation, whose frames rank 0 makes up as it goes.
        fixed_size: the payload's size follows from the shape and equals `max_nbytes(shape)`.
        needs: side inputs that `compress` takes as keywords, from `("importance", "token_ids")`. They exist
            at the sender only, but for those in `decoder_needs`.
        decoder_needs: those of `needs` that travel in the frame beside the payload and that `decompress` takes as
            keywords too; only `"token_ids"` does. A frame without them cannot be decoded.
        importance_metric: name of the metric that computes the importance, for a codec that needs it.
    All but `format_version` may be set per instance where they depend on options.
    """

    name: str
    format_version: ClassVar[int] = 1
    causal: bool = True
    frame_invariant: bool = False
    fixed_size: bool = False
    needs: tuple[str, ...] = ()
    decoder_needs: tuple[str, ...] = ()
    importance_metric: str | None = None
    link: LinkInfo | None

    def __init__(self, *, link: LinkInfo | None = None) -> None:
        self.link = link

    @abstractmethod
    def compress(self, x: torch.Tensor, **side: Any) -> Payload:
        """Encode hidden states `x` [B, T, H] in float32, float16 or bfloat16, in tests also float64; B, T may be 0.

        `side` has the inputs in `needs`: importance float32 [B, T], token_ids integer [B, T]. What is no float32 may be
        converted to it first.
        """

    @abstractmethod
    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype, **side: Any) -> torch.Tensor:
        """Decode to a new tensor of `payload.shape` and `dtype` on `device`.

        `side` has the inputs in `decoder_needs`, as `compress` got them, on any device.
        Raises CorruptPayload when length or content is impossible for the shape; any other bytes give a
        tensor of the right shape.
        """

    def _data_without_meta(self, payload: Payload) -> torch.Tensor:
        """`payload.data`, for a codec that writes no meta. Raises CorruptPayload if there is some."""
        if payload.meta:
            raise CorruptPayload(f"{self.name} writes no meta, got {dict(payload.meta)}")
        return payload.data

    def max_nbytes(self, shape: Sequence[int]) -> int:
        """Upper bound of `Payload.nbytes` for an input of `shape`, exact when `fixed_size`.

        The default admits raw float32 and 1 KiB more; a codec that knows better says so, since receive
        buffers have this size.
        """
        return 4 * math.prod(shape) + 1024

    def config(self) -> dict[str, Any]:
        """Canonical options, defaults included, JSON types only: `{"name": ..., "group_size": 64, ...}`."""
        config: dict[str, Any] = {"name": self.name}
        for option in option_names(type(self)):
            config[option] = _map_codecs(getattr(self, option), lambda codec: codec.config())
        return config

    def format_config(self) -> dict[str, Any]:
        """`config()` with the format version of every codec inside: all that determines the bytes."""
        config = self.config() | {"format_version": self.format_version}
        if not type(self).__module__.startswith("compressors."):
            config["source"] = _source_digest(type(self))
        for option in option_names(type(self)):
            if _holds_codecs(value := getattr(self, option)):
                config[option] = _map_codecs(value, lambda codec: codec.format_config())
        return config

    def codec_id(self) -> int:
        """64-bit digest of `format_config()`; in every frame's header, so that both ends must agree."""
        canonical = json.dumps(self.format_config(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "little")


def _holds_codecs(value: Any) -> bool:
    """Whether an option is a codec or a list with codecs in it."""
    return isinstance(value, Compressor) or (isinstance(value, list) and any(map(_holds_codecs, value)))


def _map_codecs(value: Any, describe: Callable[[Compressor], dict[str, Any]]) -> Any:
    """An option's value with every codec replaced by its description."""
    if isinstance(value, Compressor):
        return describe(value)
    return [_map_codecs(item, describe) for item in value] if _holds_codecs(value) else value


@functools.cache
def _source_digest(cls: type) -> str | None:
    """SHA-256 of the file that a plug-in class stands in, whose author may forget `format_version`."""
    try:
        return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
    except (OSError, TypeError):  # typed into an interpreter, say
        return None


def option_names(cls: type[Compressor]) -> list[str]:
    """Names of the options that a codec class takes, in the order of its signature."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    return [p.name for p in parameters if p.name not in ("self", "link") and p.kind != p.VAR_KEYWORD]


def encode_meta(meta: Mapping[str, int | float]) -> bytes:
    """Serialise `meta`: count, then key length, type, key and 8 value bytes each. Empty meta is no bytes.

    Raises TypeError for a value that is not int or float, ValueError for a bad key or too many entries.
    """
    if not meta:
        return b""
    if len(meta) > MAX_META_ENTRIES:
        raise ValueError(f"Payload.meta has {len(meta)} entries, at most {MAX_META_ENTRIES} are allowed")
    parts = [_META_COUNT.pack(len(meta))]
    for key, value in meta.items():
        if not isinstance(key, str) or not _META_KEY.fullmatch(key):
            raise ValueError(f"Payload.meta key {key!r} must match {_META_KEY.pattern}")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"Payload.meta[{key!r}] must be int or float, got {type(value).__name__}")
        kind = 0 if isinstance(value, int) else 1
        encoded = key.encode()
        try:
            parts += [_META_ENTRY.pack(len(encoded), kind), encoded, _META_VALUE[kind].pack(value)]
        except struct.error as e:
            raise ValueError(f"Payload.meta[{key!r}] = {value} does not fit into 64 bits") from e
    encoded_meta = b"".join(parts)
    if len(encoded_meta) > MAX_META_NBYTES:
        raise ValueError(f"Payload.meta takes {len(encoded_meta)} bytes, at most {MAX_META_NBYTES} are allowed")
    return encoded_meta


def decode_meta(blob: bytes) -> dict[str, int | float]:
    """Inverse of `encode_meta`. Raises CorruptPayload for anything that `encode_meta` cannot have written."""
    if not blob:
        return {}
    meta: dict[str, int | float] = {}
    try:
        (count,) = _META_COUNT.unpack_from(blob, 0)
        offset = _META_COUNT.size
        for _ in range(count):
            key_length, kind = _META_ENTRY.unpack_from(blob, offset)
            offset += _META_ENTRY.size
            key = blob[offset : offset + key_length].decode("ascii")
            offset += key_length
            (meta[key],) = _META_VALUE[kind].unpack_from(blob, offset)
            offset += _META_VALUE[kind].size
    except (struct.error, KeyError, UnicodeDecodeError) as e:
        raise CorruptPayload(f"payload meta of {len(blob)} bytes cannot be read: {e}") from e
    if offset != len(blob) or not meta or _encode_meta_or_none(meta) != blob:
        raise CorruptPayload(f"payload meta of {len(blob)} bytes is not in canonical form")
    return meta


def _encode_meta_or_none(meta: Mapping[str, int | float]) -> bytes | None:
    """`encode_meta`, or None where it would raise."""
    try:
        return encode_meta(meta)
    except (TypeError, ValueError):
        return None
