"""What a calibrated codec knows: one safetensors file per link, and one of token ids, the same for all links.

Written once and read on every rank. A file's metadata name the format, the link, the model's checkpoint and the text,
and a file of another link or checkpoint is refused. Shapes and dtypes are checked, so that a codec can trust what it
got. `compressors.klt.fit` makes the content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from compressors.base import LinkInfo
from compressors.options import option_error
from compressors.user_files import InputError, user_path

__all__ = [
    "FORMAT",
    "TOKENS_FILE",
    "LinkCalibration",
    "TokenTable",
    "file_name",
    "read_calibration",
    "write_calibration",
    "write_token_table",
]

FORMAT = "thinwire klt 2"
TOKENS_FILE = "token-ids.safetensors"


def _tensor(dtype: torch.dtype, *shape: str) -> torch.Tensor:
    """A field with its dtype and the names of its sizes; equal names are equal sizes."""
    return dataclasses.field(metadata={"dtype": dtype, "shape": shape})


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """Of V token ids: D features each, codes[id] * scales, and ranks to code ids with. Without ids, V and D are 0."""

    codes: torch.Tensor = _tensor(torch.int8, "V", "D")
    scales: torch.Tensor = _tensor(torch.float32, "D")
    ranks: torch.Tensor = _tensor(torch.int32, "V")  # of ids by frequency, the most frequent first
    rank_starts: torch.Tensor = _tensor(torch.int32, "B")  # cumulative frequencies of the bit length of rank + 1

    @property
    def num_ids(self) -> int:
        return len(self.ranks)

    @classmethod
    def empty(cls) -> TokenTable:
        return cls(
            codes=torch.zeros(0, 0, dtype=torch.int8),
            scales=torch.zeros(0),
            ranks=torch.zeros(0, dtype=torch.int32),
            rank_starts=torch.tensor([0, 1 << 15], dtype=torch.int32),
        )

    def features(self, ids: torch.Tensor) -> torch.Tensor:
        """Float32 [N, D] of ids [N]."""
        return self.codes[ids.long()].float() * self.scales


@dataclass(frozen=True, kw_only=True, eq=False)
class LinkCalibration:
    """The statistics of one link. H channels and components, R rank, D features, C model classes, S + 1 symbols.

    A token x of root mean square u is coded as components y = (x / u - mean) @ encode, in order of falling variance
    once predicted; x = (y @ decode + mean) u. "Eighths" are 8 log2(.), rounded.
    """

    mean: torch.Tensor = _tensor(torch.float32, "H")
    encode: torch.Tensor = _tensor(torch.float32, "H", "H")
    decode: torch.Tensor = _tensor(torch.float32, "H", "H")
    fixed_encode: torch.Tensor = _tensor(torch.float32, "H", "H")  # the same of klt_fixed, which predicts nothing
    fixed_decode: torch.Tensor = _tensor(torch.float32, "H", "H")
    fixed_size: torch.Tensor = _tensor(torch.float32, "H")  # standard deviation of its components
    component_eighths: torch.Tensor = _tensor(torch.int32, "H")  # mean |y - prediction|
    temporal_in: torch.Tensor = _tensor(torch.float32, "H", "R")  # prediction: y of the token before @ in @ out
    temporal_out: torch.Tensor = _tensor(torch.float32, "R", "H")
    token_out: torch.Tensor = _tensor(torch.float32, "D", "H")  # prediction: features @ out + bias
    token_bias: torch.Tensor = _tensor(torch.float32, "H")
    finer: torch.Tensor = _tensor(torch.float32, "H")  # quarter octaves of the token's step: y @ finer + bias
    finer_bias: torch.Tensor = _tensor(torch.float32, "two")  # constant, and per octave of u
    rms_eighths: torch.Tensor = _tensor(torch.int32, "one")  # median of u
    side_classes: torch.Tensor = _tensor(torch.int32, "two")  # of u and of the step's refinement
    magnitude: torch.Tensor = _tensor(torch.int64, "M")  # expected size of a class's levels, steps / 256
    starts: torch.Tensor = _tensor(torch.int32, "C", "S")  # cumulative frequencies by quantiser and class
    rate_steps: torch.Tensor = _tensor(torch.float64, "N")  # steps, rising
    rate_bits: torch.Tensor = _tensor(torch.float64, "N")  # and the bits/value that held-out text took at them

    @property
    def hidden_size(self) -> int:
        return self.mean.numel()

    @property
    def uses_token_ids(self) -> bool:
        return self.token_out.numel() > 0


def file_name(link_name: str) -> str:
    """`layer:7:node0->node1` to `layer-7-node0-node1.safetensors`."""
    return re.sub(r"[^A-Za-z0-9]+", "-", link_name).strip("-") + ".safetensors"


def write_calibration(
    folder: Path, calibration: LinkCalibration, *, link_name: str, checkpoint: str, text_sha256: str, num_tokens: int
) -> Path:
    """Write the file of a link; returns its path."""
    facts = {"link": link_name, "checkpoint": checkpoint, "text_sha256": text_sha256, "num_tokens": str(num_tokens)}
    return _write(folder / file_name(link_name), calibration, facts)


def write_token_table(folder: Path, table: TokenTable, *, checkpoint: str, text_sha256: str) -> Path:
    """Write the file of token ids; returns its path."""
    return _write(folder / TOKENS_FILE, table, {"checkpoint": checkpoint, "text_sha256": text_sha256})


def _write(path: Path, content: LinkCalibration | TokenTable, facts: dict[str, str]) -> Path:
    tensors = {f.name: getattr(content, f.name).contiguous() for f in dataclasses.fields(content)}
    unfinished = path.with_suffix(".tmp")
    unfinished.write_bytes(save(tensors, {"format": FORMAT, **facts}))
    unfinished.replace(path)
    return path


def read_calibration(codec: str, folder: str, link: LinkInfo | None) -> tuple[LinkCalibration, TokenTable, str]:
    """The link's calibration in `folder`, the token table that goes with it, and a SHA-256 of both files.

    Raises ValueError for a file that is missing, damaged, or of another format, link, hidden size or checkpoint.
    """
    if link is None:
        raise option_error(codec, "calibration", folder, "a calibration needs a link (LinkInfo) to look up")
    expected = {"format": FORMAT} | ({"checkpoint": link.checkpoint} if link.checkpoint is not None else {})
    try:
        place = Path(user_path(folder))
    except (InputError, TypeError) as e:
        raise option_error(codec, "calibration", folder, f"a folder ({e})") from e
    path = place / file_name(link.name)
    calibration, metadata, digest = _read(codec, path, LinkCalibration, expected | {"link": link.name})
    if calibration.hidden_size != link.hidden_size:
        raise option_error(
            codec, "calibration", str(path), f"hidden size {link.hidden_size}, got {calibration.hidden_size}"
        )
    _check_frequencies(codec, path, calibration.starts)
    _check_models(codec, path, calibration)
    if not calibration.uses_token_ids:
        return calibration, TokenTable.empty(), digest.hex()
    expected |= {key: metadata.get(key) for key in ("checkpoint", "text_sha256")}
    tokens, _, tokens_digest = _read(codec, place / TOKENS_FILE, TokenTable, expected)
    _check_frequencies(codec, place / TOKENS_FILE, tokens.rank_starts)
    in_order = torch.equal(tokens.ranks.sort().values, torch.arange(tokens.num_ids, dtype=torch.int32))
    fits = tokens.rank_starts.numel() == tokens.num_ids.bit_length() + 1
    if tokens.codes.shape[1] != calibration.token_out.shape[0] or not in_order or not fits:
        raise option_error(codec, "calibration", str(place / TOKENS_FILE), f"the file written with {path.name}")
    return calibration, tokens, hashlib.sha256(digest + tokens_digest).hexdigest()


def _read(codec: str, path: Path, cls: type, expected: dict[str, str | None]) -> tuple[Any, dict[str, str], bytes]:
    """A file's content as `cls`, its metadata, which must have what is `expected`, and its SHA-256."""
    made_by = "made by python -m pipeline.calibrate"
    try:
        blob = path.read_bytes()
    except OSError as e:
        raise option_error(
            codec, "calibration", str(path.parent), f"a folder with {path.name}, {made_by} ({e.strerror})"
        ) from e
    try:
        tensors, metadata = load(blob), _metadata(blob)
    except (SafetensorError, ValueError) as e:
        raise option_error(codec, "calibration", str(path), f"a safetensors file {made_by} ({e})") from e
    for key, value in expected.items():
        if metadata.get(key) != value:
            raise option_error(
                codec, "calibration", str(path), f"a file with {key} {value!r}, this one has {metadata.get(key)!r}"
            )
    return _checked(codec, path, cls, tensors), metadata, hashlib.sha256(blob).digest()


def _metadata(blob: bytes) -> dict[str, str]:
    """The string pairs in a safetensors file's header, whose length `load` has checked."""
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    return header.get("__metadata__") or {}


def _checked(codec: str, path: Path, cls: type, tensors: dict[str, torch.Tensor]) -> Any:
    """`cls` of tensors with the right names, dtypes and sizes."""
    fields = dataclasses.fields(cls)
    sizes: dict[str, int] = {"one": 1, "two": 2}
    if tensors.keys() != {f.name for f in fields}:
        raise _not_whole(codec, path, f"tensors {sorted(tensors)}")
    for f in fields:
        tensor, names = tensors[f.name], f.metadata["shape"]
        fits = tensor.dtype == f.metadata["dtype"] and tensor.dim() == len(names)
        if not fits or any(sizes.setdefault(n, size) != size for n, size in zip(names, tensor.shape)):
            raise _not_whole(codec, path, f"{f.name} is {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise _not_whole(codec, path, f"{f.name} is not finite")
    return cls(**tensors)


def _check_frequencies(codec: str, path: Path, starts: torch.Tensor) -> None:
    """Cumulative frequencies rise from 0 to 2**15 by at least 1 a symbol; the decoder relies on it."""
    ends_right = (starts[..., 0] == 0).all() and (starts[..., -1] == 1 << 15).all()
    if starts.shape[-1] < 2 or not ends_right or (starts.diff(dim=-1) < 1).any():
        raise _not_whole(codec, path, "these are no cumulative frequencies")


def _check_models(codec: str, path: Path, calibration: LinkCalibration) -> None:
    """The tables are as large as the kernels, which do not look, take them to be."""
    from compressors.kernels import klt as kernels

    classes = calibration.side_classes
    fits = calibration.starts.shape == (2 * kernels.NUM_CLASSES, kernels.NUM_SYMBOLS + 1)
    fits &= calibration.magnitude.numel() == kernels.LAST_WIDE_CLASS - kernels.FIRST_CLASS + 1
    if not fits or classes.min() < kernels.FIRST_CLASS or classes.max() > kernels.LAST_WIDE_CLASS:
        raise _not_whole(codec, path, "models of other sizes")


def _not_whole(codec: str, path: Path, what: str) -> ValueError:
    return option_error(codec, "calibration", str(path), f"a whole file of format {FORMAT!r} ({what})")
