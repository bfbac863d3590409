"""What a calibrated codec knows: one safetensors file per link, and one of token ids, the same for all links.

Written once and read on every rank. A file's metadata name the format, the link, the model's checkpoint and the text,
and a file of another link or checkpoint is refused. Shapes and dtypes are checked, so that a codec can trust what it
got. `compressors.klt.fit` makes the content.

**What is shared.** A process reads, hashes and checks a file once, however many codecs ask for it. The large tables
(the matrices of a link, the features of the token ids) stay mappings of the file, so that the processes of one machine
have them in memory once, and pages that nobody uses not at all. What kernels use as indices or bounds is copied, since
they do not look. A mapping shows what is done to its file. A new file in its place, which is how files are written
here, does nothing to it. A file that is shorter than its header says is refused before it is mapped. One that is
overwritten or cut short later is noticed before and after each frame (`Calibration.check_unchanged`). What remains is a
file that is cut short while a frame is being computed from it: a read beyond its new end ends the process with SIGBUS,
and with it the run. No number comes of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from compressors.base import LinkInfo
from compressors.klt.tensor_fields import tensor_field
from compressors.klt.token_table import TokenTable
from compressors.options import option_error
from compressors.user_files import InputError, user_path

__all__ = [
    "FORMAT",
    "TOKENS_FILE",
    "Calibration",
    "LinkCalibration",
    "Origin",
    "file_name",
    "read_calibration",
    "write_calibration",
    "write_token_table",
]

FORMAT = "thinwire klt 3"
TOKENS_FILE = "token-ids.safetensors"

_BLOCK_NBYTES = 2**22  # of a file that is being hashed
_TICK_NS = 100_000_000  # a file written within this time of another may have the same time stamp


@dataclass(frozen=True, kw_only=True, eq=False)
class LinkCalibration:
    """The statistics of one link. H channels and components, D features, C model classes, S + 1 symbols.

    A token x of root mean square u is coded as components y = (x / u - mean) @ encode, in order of falling variance
    once predicted; x = (y @ decode + mean) u. "Eighths" are 8 log2(.), rounded.
    """

    mean: torch.Tensor = tensor_field(torch.float32, "H")
    encode: torch.Tensor = tensor_field(torch.bfloat16, "H", "H", mapped=True)
    decode: torch.Tensor = tensor_field(torch.bfloat16, "H", "H", mapped=True)
    # The same of klt_fixed, which predicts nothing.
    fixed_encode: torch.Tensor = tensor_field(torch.bfloat16, "H", "H", mapped=True)
    fixed_decode: torch.Tensor = tensor_field(torch.bfloat16, "H", "H", mapped=True)
    fixed_size: torch.Tensor = tensor_field(torch.float32, "H")  # standard deviation of its components
    component_eighths: torch.Tensor = tensor_field(torch.int32, "H")  # mean |y - prediction|
    token_out: torch.Tensor = tensor_field(torch.bfloat16, "D", "H", mapped=True)  # prediction: features @ out + bias
    token_bias: torch.Tensor = tensor_field(torch.float32, "H")
    finer: torch.Tensor = tensor_field(torch.float32, "H")  # quarter octaves of the token's step: y @ finer + bias
    finer_bias: torch.Tensor = tensor_field(torch.float32, "two")  # constant, and per octave of u
    rms_eighths: torch.Tensor = tensor_field(torch.int32, "one")  # median of u
    side_classes: torch.Tensor = tensor_field(torch.int32, "two")  # of u and of the step's refinement
    trust_starts: torch.Tensor = tensor_field(torch.int32, "T")  # cumulative frequencies of `kernels.trust`
    magnitude: torch.Tensor = tensor_field(torch.int64, "M")  # expected size of a class's levels, steps / 256
    starts: torch.Tensor = tensor_field(torch.int32, "C", "S")  # cumulative frequencies by quantiser and class
    rate_steps: torch.Tensor = tensor_field(torch.float64, "N")  # steps, rising
    rate_bits: torch.Tensor = tensor_field(torch.float64, "N")  # and the bits/value that held-out text took at them

    @property
    def hidden_size(self) -> int:
        return self.mean.numel()

    @property
    def uses_token_ids(self) -> bool:
        return self.token_out.numel() > 0


def file_name(link_name: str) -> str:
    """`layer:7:node0->node1` to `layer-7-node0-node1.safetensors`."""
    return re.sub(r"[^A-Za-z0-9]+", "-", link_name).strip("-") + ".safetensors"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What was calibrated, and on what. `text` says it in words; nothing reads it but people."""

    checkpoint: str
    text_sha256: str
    text: str = ""


def write_calibration(
    folder: Path,
    calibration: LinkCalibration,
    origin: Origin,
    *,
    link_name: str,
    num_tokens: int,
    fitted_from: str = "",
) -> Path:
    """Write the file of a link; returns its path. Raises ValueError where the disk does not take it.

    `fitted_from` is a digest by which a calibration knows its own file again.
    """
    facts = {"link": link_name, "num_tokens": str(num_tokens), "fitted_from": fitted_from}
    return _write(folder / file_name(link_name), calibration, {**dataclasses.asdict(origin), **facts})


def write_token_table(folder: Path, table: TokenTable, origin: Origin) -> Path:
    """Write the file of token ids; returns its path. Raises ValueError where the disk does not take it."""
    return _write(folder / TOKENS_FILE, table, dataclasses.asdict(origin))


def _write(path: Path, content: LinkCalibration | TokenTable, facts: dict[str, str]) -> Path:
    tensors = {f.name: getattr(content, f.name).contiguous() for f in dataclasses.fields(content)}
    unfinished = path.with_suffix(".tmp")
    try:
        # Written here, not by safetensors: its files can be read by their owner alone.
        unfinished.write_bytes(save(tensors, {"format": FORMAT, **facts}))
        unfinished.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise ValueError(
            f"the calibration {path} cannot be written: {e.strerror or e}; make room there, or name another folder"
        ) from e
    return path


@dataclass(frozen=True, kw_only=True, eq=False)
class _File:
    """A file that has been hashed and checked, and what it holds as a `TokenTable` or a `LinkCalibration`.

    `opened` is the file that is mapped, whatever its path leads to by now; `stamp` is from before it was read.
    """

    path: Path
    opened: BinaryIO
    stamp: tuple[int, ...]
    read_ns: int
    content: Any
    facts: Mapping[str, str]
    digest: bytes

    @property
    def is_unchanged(self) -> bool:
        return _stamp(os.fstat(self.opened.fileno())) == self.stamp

    @property
    def is_in_place(self) -> bool:
        try:
            return _stamp(self.path.stat()) == self.stamp
        except OSError:
            return False


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """What a link's codecs know: the link's statistics, the token table, and a SHA-256 (hex) of both files."""

    link: LinkCalibration
    tokens: TokenTable
    digest: str
    files: Sequence[_File]

    def check_unchanged(self) -> None:
        """Raise ValueError where a file was overwritten or cut short.

        To be called before a frame, since reading behind a new end would end the process, and after it, since what was
        computed may be anything.
        """
        for file in self.files:
            if not file.is_unchanged:
                raise ValueError(
                    f"{file.path} was overwritten while in use: what was computed from it may be wrong; run again, and "
                    "put other files beside it or in its place (mv), not into it (cp)"
                )


def read_calibration(codec: str, folder: str, link: LinkInfo | None) -> Calibration:
    """The link's calibration in `folder` and the token table that goes with it.

    Raises ValueError for a file that is missing, damaged, or of another link, hidden size or checkpoint.
    """
    if link is None:
        raise option_error(codec, "calibration", folder, "a calibration needs a link (LinkInfo) to look up")
    checkpoint = {"checkpoint": link.checkpoint} if link.checkpoint is not None else {}
    try:
        place = Path(user_path(folder))
    except (InputError, TypeError) as e:
        raise option_error(codec, "calibration", folder, f"a folder ({e})") from e
    path = place / file_name(link.name)
    of_link = _read(codec, path, LinkCalibration, checkpoint | {"link": link.name})
    calibration = of_link.content
    if calibration.hidden_size != link.hidden_size:
        raise option_error(
            codec, "calibration", str(path), f"hidden size {link.hidden_size}, got {calibration.hidden_size}"
        )
    if not calibration.uses_token_ids:
        return Calibration(link=calibration, tokens=TokenTable.empty(), digest=of_link.digest.hex(), files=[of_link])
    origin = {key: of_link.facts.get(key) for key in ("checkpoint", "text_sha256")}
    of_tokens = _read(codec, place / TOKENS_FILE, TokenTable, checkpoint | origin)
    if of_tokens.content.num_features != calibration.token_out.shape[0]:
        raise option_error(codec, "calibration", str(of_tokens.path), f"the file written with {path.name}")
    return Calibration(
        link=calibration,
        tokens=of_tokens.content,
        digest=hashlib.sha256(of_link.digest + of_tokens.digest).hexdigest(),
        files=[of_link, of_tokens],
    )


_files: dict[tuple[Path, type], _File] = {}  # what this process has read


def _read(codec: str, path: Path, cls: type, expected: Mapping[str, str | None]) -> _File:
    """The file at `path`, which holds a `cls` and whose metadata must have what is `expected`.

    It is read once for as long as it stays the same.
    """
    key = path.absolute(), cls
    file = _files.get(key)
    if file is None or not file.is_in_place or file.read_ns - file.stamp[-1] < _TICK_NS:
        file = _files[key] = _open(codec, path, cls, expected)
    _check_facts(codec, path, file.facts, expected)
    return file


def _open(codec: str, path: Path, cls: type, expected: Mapping[str, str | None]) -> _File:
    made_by = "made by python -m pipeline.calibrate"
    try:
        with contextlib.ExitStack() as stack:
            opened = stack.enter_context(path.open("rb"))
            stamp, read_ns = _stamp(os.fstat(opened.fileno())), time.time_ns()
            _check_size(codec, path, opened)
            tensors, facts = _mapped(path)
            # Before names and shapes, which are others in a file of another format.
            _check_facts(codec, path, facts, {"format": FORMAT, **expected})
            _check(codec, path, cls, tensors)
            del tensors  # pages that the checks have touched count as this process's for as long as they are mapped
            file = _File(
                path=path,
                opened=opened,
                stamp=stamp,
                read_ns=read_ns,
                content=_content(cls, _mapped(path)[0]),
                facts=facts,
                digest=_digest(opened),
            )
            stack.pop_all()
    except OSError as e:
        raise option_error(
            codec, "calibration", str(path.parent), f"a folder with {path.name}, {made_by} ({e.strerror})"
        ) from e
    except (SafetensorError, RuntimeError) as e:  # the latter where the file cannot be mapped
        raise option_error(codec, "calibration", str(path), f"a safetensors file {made_by} ({e})") from e
    if not (file.is_unchanged and file.is_in_place):
        raise option_error(codec, "calibration", str(path), "a file that nobody writes to while it is read")
    return file


def _check_size(codec: str, path: Path, file: BinaryIO) -> None:
    """Raise ValueError where a file is not as long as its header says: 8 bytes n, n of JSON, then the tensors' data."""
    size, made_by = os.fstat(file.fileno()).st_size, "a safetensors file made by python -m pipeline.calibrate"
    try:
        header_nbytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(header_nbytes, size)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, LookupError, AttributeError) as e:
        raise option_error(codec, "calibration", str(path), f"{made_by} (its header cannot be read)") from e
    expected = 8 + header_nbytes + max(ends, default=0)
    if size != expected:
        raise option_error(codec, "calibration", str(path), f"{made_by}, of {expected} bytes (this one has {size})")
    file.seek(0)


def _digest(file: BinaryIO) -> bytes:
    """SHA-256 of a file, which is read and not mapped: it stays out of this process's memory."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK_NBYTES):
        digest.update(block)
    return digest.digest()


def _content(cls: type, tensors: Mapping[str, torch.Tensor]) -> Any:
    """`cls` of mapped tensors, those that do not stay in the file as copies."""
    fields = dataclasses.fields(cls)
    return cls(**{f.name: tensors[f.name] if f.metadata["mapped"] else tensors[f.name].clone() for f in fields})


def _mapped(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A safetensors file's tensors, as mappings of which nothing is read yet, and its metadata."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    """What changes with another file or other content; the time last."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _check_facts(codec: str, path: Path, facts: Mapping[str, str], expected: Mapping[str, str | None]) -> None:
    for key, value in expected.items():
        if facts.get(key) != value:
            raise option_error(
                codec, "calibration", str(path), f"a file with {key} {value!r}, this one has {facts.get(key)!r}"
            )


def _check(codec: str, path: Path, cls: type, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless these are a `cls` that codecs can trust."""
    fields = dataclasses.fields(cls)
    sizes: dict[str, int] = {"one": 1, "two": 2, "eight": 8}
    if tensors.keys() != {f.name for f in fields}:
        raise _not_whole(codec, path, f"tensors {sorted(tensors)}")
    for f in fields:
        tensor, names = tensors[f.name], f.metadata["shape"]
        fits = tensor.dtype == f.metadata["dtype"] and tensor.dim() == len(names)
        if not fits or any(sizes.setdefault(n, size) != size for n, size in zip(names, tensor.shape, strict=True)):
            raise _not_whole(codec, path, f"{f.name} is {tensor.dtype} {tuple(tensor.shape)}")
        # A sum, since isfinite() takes several times the tensor's memory; float32 and bf16 cannot overflow in it.
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float64).isfinite():
            raise _not_whole(codec, path, f"{f.name} is not finite")
    content = cls(**tensors)
    if cls is LinkCalibration:
        _check_frequencies(codec, path, content.starts)
        _check_frequencies(codec, path, content.trust_starts)
        _check_models(codec, path, content)
        return
    if (fault := content.fault()) is not None:
        raise _not_whole(codec, path, fault)


def _check_frequencies(codec: str, path: Path, starts: torch.Tensor) -> None:
    """Cumulative frequencies rise from 0 to 2**15 by at least 1 a symbol; the decoder relies on it."""
    ends_right = (starts[..., 0] == 0).all() and (starts[..., -1] == 1 << 15).all()
    if starts.shape[-1] < 2 or not ends_right or (starts.diff(dim=-1) < 1).any():
        raise _not_whole(codec, path, "these are no cumulative frequencies")


def _check_models(codec: str, path: Path, calibration: LinkCalibration) -> None:
    """The tables are as large as the kernels, which do not look, take them to be."""
    from compressors.kernels import klt as kernels
    from compressors.kernels.trust import NUM_TRUSTS

    classes = calibration.side_classes
    fits = calibration.starts.shape == (2 * kernels.NUM_CLASSES, kernels.NUM_SYMBOLS + 1)
    fits &= calibration.trust_starts.numel() == NUM_TRUSTS + 1
    fits &= calibration.magnitude.numel() == kernels.LAST_WIDE_CLASS - kernels.FIRST_CLASS + 1
    if not fits or classes.min() < kernels.FIRST_CLASS or classes.max() > kernels.LAST_CLASS:
        raise _not_whole(codec, path, "models of other sizes")


def _not_whole(codec: str, path: Path, what: str) -> ValueError:
    return option_error(codec, "calibration", str(path), f"a whole file of format {FORMAT!r} ({what})")
