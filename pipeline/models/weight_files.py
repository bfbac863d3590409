"""The safetensors files of a model's directory: which ones they are, and what tells checkpoints apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

__all__ = ["checkpoint_fingerprint", "file_fingerprint", "reading", "weight_files"]

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
FINGERPRINT_SAMPLES = 16
FINGERPRINT_SAMPLE_BYTES = 64 << 10
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000  # the format's own limit


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files that loading reads, by name: `model.safetensors`, else the shards of its index.

    The rule is transformers' own, so a directory may hold other safetensors beside them. Raises ValueError
    when there are none, when a shard is missing, and for an index that is not valid.
    """
    single = model_dir / "model.safetensors"
    index = model_dir / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = _shard_names(index)
        missing = [shard for shard in names if not (model_dir / shard).is_file()]
        if missing:
            raise ValueError(
                f"{model_dir} lacks {len(missing)} of the {len(names)} weight files that {index.name} names, "
                f"the first is {missing[0]}; download or copy the model again"
            )
        return [model_dir / shard for shard in names]
    pickles = sorted(p.name for p in model_dir.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{model_dir} has no safetensors, only pickled weights ({pickles[0]}). A pickle can run code "
            "when it is read, so none is; convert it to safetensors, or take a repository that has them"
        )
    raise ValueError(
        f"{model_dir} holds no weights: neither {single.name} nor {index.name} is there (pickled weights, "
        "such as pytorch_model.bin, are neither downloaded nor read)"
    )


@contextmanager
def reading(path: Path, what: str = "it") -> Iterator[None]:
    """Name the file, and what there is against it, in what goes wrong while `what` of it is read. Raises ValueError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: {what} cannot be read ({type(error).__name__}: {error}); check the disk and the access rights, "
            "copy or download the file again, or let model.stage_to copy the model to a disk of this machine first"
        ) from error


def checkpoint_fingerprint(model_dir: Path) -> str:
    """SHA-256 (hex) of what tells checkpoints apart at little cost, also at 64 GB.

    Covers the bytes of `config.json` and, for each weight file in name order, its name, its size, its header
    (names, dtypes, shapes) and 64 KiB samples at up to 16 evenly spaced offsets, the first and last bytes
    included. It is a fingerprint, not a proof: a change between the samples goes unnoticed. It does not
    depend on the directory's path. Raises ValueError for a missing config, and for a file that is not
    safetensors or is cut short.
    """
    config = model_dir / "config.json"
    if not config.is_file():
        raise ValueError(f"{model_dir} has no config.json, so it is not a model directory")
    digest = hashlib.sha256()
    with reading(config):
        _update_framed(digest, config.read_bytes())
    for path in weight_files(model_dir):
        _update_with_file(digest, path)
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """What `checkpoint_fingerprint` takes of a weight file, of this one alone."""
    digest = hashlib.sha256()
    _update_with_file(digest, path)
    return digest.hexdigest()


def _update_with_file(digest, path: Path) -> None:
    _update_framed(digest, path.name.encode())
    with reading(path), open(path, "rb") as file:
        size = path.stat().st_size
        _update_framed(digest, str(size).encode())
        header = _read_safetensors_header(file, path, size)
        _update_framed(digest, header)
        data_start = 8 + len(header)
        for offset in _sample_offsets(size - data_start):
            file.seek(data_start + offset)
            _update_framed(digest, file.read(FINGERPRINT_SAMPLE_BYTES))


def _shard_names(index: Path) -> list[str]:
    with reading(index):
        content = index.read_bytes()
    try:
        names = sorted(set(json.loads(content)["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a valid index of safetensors files: {error!r}") from error
    for shard in names:
        # The names come from outside and become paths to read and, when staging, to write.
        if PurePosixPath(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index} names {shard!r}; expected safetensors files in the same directory")
    return names


def _update_framed(digest, field: bytes) -> None:
    """Hash `field` with its length in front, so that no two lists of fields give the same stream."""
    digest.update(len(field).to_bytes(8, "little"))
    digest.update(field)


def _read_safetensors_header(file, path: Path, size: int) -> bytes:
    header_nbytes = int.from_bytes(file.read(8), "little")
    if size < 8 or header_nbytes > min(size - 8, MAX_SAFETENSORS_HEADER_BYTES):
        raise ValueError(
            f"{path} is not a safetensors file, or is cut short: it has {size} bytes and announces a header "
            f"of {header_nbytes}"
        )
    header = file.read(header_nbytes)
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        data_nbytes = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file: header not readable ({error!r})") from error
    expected_size = 8 + header_nbytes + data_nbytes
    if size != expected_size:
        raise ValueError(f"{path} has {size} bytes, its header announces {expected_size}; fetch it again")
    return header


def _sample_offsets(data_nbytes: int) -> list[int]:
    """Offsets into the data part; together the samples cover all of it up to 16 x 64 KiB."""
    num_samples = min(FINGERPRINT_SAMPLES, -(-data_nbytes // FINGERPRINT_SAMPLE_BYTES))
    last = max(0, data_nbytes - FINGERPRINT_SAMPLE_BYTES)
    return [index * last // max(1, num_samples - 1) for index in range(num_samples)]
