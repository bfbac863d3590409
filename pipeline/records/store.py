"""A run's results on disk: one strict JSON record, and beside it a safetensors file with a row per scored token.

Numbers that JSON cannot hold (NaN, infinity) are written as null and flagged. Files appear whole or not at all.
Reports read these files and nothing else.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

__all__ = [
    "RecordError",
    "check_writable",
    "codec_label",
    "codec_labels",
    "config_label",
    "digest_of",
    "disk_problem",
    "failure_path",
    "free_name",
    "make_run_id",
    "model_label",
    "read_failure",
    "read_kind",
    "read_per_token",
    "read_record",
    "software_versions",
    "write_failure",
    "write_figure",
    "write_json",
    "write_record",
    "write_whole",
]

SCHEMA_VERSION = 1
FAILURE_KIND = "failed point"
_REQUIRED_KEYS = ("schema_version", "run_id", "args", "results", "traffic_totals", "traffic_per_link", "time_run_s")
_PER_TOKEN = {"loss": np.dtype(np.float32), "top1": np.dtype(np.int32), "window": np.dtype(np.int32)}
_MAX_BYTES = 64 << 20  # far beyond any record; what is larger is not even read
_PACKAGES = ("torch", "transformers", "bitsandbytes", "safetensors", "tokenizers", "numpy", "numba")


class RecordError(ValueError):
    """A file that is no record of this program, or a folder that records cannot be written to."""


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def make_run_id(*words: str) -> str:
    """`20260131-235959-smollm2-nf4`: UTC time and a few words, safe as a file name."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    safe = ["".join(c if c.isalnum() or c in "._" else "-" for c in word).strip("-")[:40] for word in words]
    return "-".join([now, *filter(None, safe)])


def software_versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def check_writable(folder: Path) -> None:
    """Create `folder`, write a file in it and lock that, so that a run does not end with nowhere to put its result.

    Raises RecordError.
    """
    problem = "cannot be written to"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            problem = "is on a file system that cannot lock files, as a run must do with its journal"
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise RecordError(
            f"the folder of the results, {folder}, {problem}: {disk_problem(e)}, or name another (--exp_dir, --out)"
        ) from e


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, readable for whom the umask says.

    Raises OSError; what was there before is there still, and nothing else.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def free_name(path: Path) -> Path:
    """`path`, or the first of `<path>2`, `<path>3`, ... where something has that name."""
    free, number = path, 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}{number}")
    return free


def write_figure(path: Path, figure: Any, *, dpi: int) -> None:
    """Write a matplotlib figure, in the format of the path's suffix or as PNG. Raises RecordError."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format=path.suffix.removeprefix(".") or "png")
    try:
        write_whole(path, content.getvalue())
    except OSError as e:
        raise RecordError(f"the figure {path} cannot be written: {disk_problem(e)}, or name another file") from e


def disk_problem(error: OSError) -> str:
    """What the system says, and what to do about it."""
    told = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{told}; make room there"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{told}; give this user the right to write there"
    return told


def write_record(folder: Path, record: Mapping[str, Any], per_token: Mapping[str, np.ndarray]) -> Path:
    """Write `<run_id>.safetensors`, then `<run_id>.json`; returns the latter's path.

    A run id that is taken gets a number behind it. Raises RecordError when the disk does not take it.
    """
    run_id, attempt = record["run_id"], 1
    while (folder / f"{run_id}.json").exists():
        attempt += 1
        run_id = f"{record['run_id']}-{attempt}"
    content = {
        "schema_version": SCHEMA_VERSION,
        **record,
        "run_id": run_id,
        "finished_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "per_token_file": f"{run_id}.safetensors",
    }
    finite, content = _finite(content)
    content["finite"] = finite
    path = folder / f"{run_id}.json"
    try:
        write_whole(path.with_suffix(".safetensors"), save(dict(per_token)))
    except OSError as e:
        raise RecordError(f"the record {path} cannot be written: {disk_problem(e)}") from e
    try:
        write_json(path, content)
    except RecordError:
        with contextlib.suppress(OSError):
            path.with_suffix(".safetensors").unlink()
        raise
    return path


def read_record(path: Path) -> dict[str, Any]:
    """Read a record back. Raises RecordError for anything else."""
    record = _read_json(path)
    missing = [key for key in _REQUIRED_KEYS if not isinstance(record, dict) or key not in record]
    if missing:
        raise RecordError(f"{path} is not a run record: it lacks {', '.join(missing)}")
    if record["schema_version"] != SCHEMA_VERSION:
        found = str(record["schema_version"])[:40]
        raise RecordError(f"{path} has schema version {found}, this program reads {SCHEMA_VERSION}")
    return record


def read_per_token(record_path: Path) -> dict[str, np.ndarray]:
    """The per-token file beside a record: `loss` float32, `top1` int32 and `window` int32, one row per token.

    Raises RecordError for a file that is missing, damaged or has other columns.
    """
    path = record_path.with_suffix(".safetensors")
    try:
        if path.exists() and not path.is_file():
            raise RecordError(f"{path} cannot be read: it is no regular file")
        columns = load_file(path)
    except RecordError:
        raise
    except Exception as e:  # safetensors raises its own type for a damaged file
        raise RecordError(f"{path} cannot be read: {e}") from e
    for name, dtype in _PER_TOKEN.items():
        if name not in columns:
            raise RecordError(f"{path} cannot be read: it lacks the column {name}")
        if columns[name].dtype != dtype or columns[name].shape != (columns["loss"].size,):
            found = f"{columns[name].dtype} {columns[name].shape}"
            raise RecordError(f"{path} cannot be read: {name} must be a column of {dtype} as long as loss, not {found}")
    return columns


def write_failure(folder: Path, failure: Mapping[str, Any]) -> Path:
    """Write `failed-<failure_id>.json`: that a point of a sweep has failed, and why; replaces an older one.

    `failure` has `failure_id`, `label`, `error` and `args`. Raises RecordError.
    """
    path = failure_path(folder, failure["failure_id"])
    write_json(
        path,
        {
            "schema_version": SCHEMA_VERSION,
            "kind": FAILURE_KIND,
            **failure,
            "finished_at": datetime.datetime.now(datetime.UTC).isoformat(),
        },
    )
    return path


def failure_path(folder: Path, failure_id: str) -> Path:
    """Where `write_failure` puts a failure."""
    return folder / f"failed-{failure_id}.json"


def read_failure(path: Path) -> dict[str, Any] | None:
    """What `write_failure` wrote; None for any other file."""
    return read_kind(path, FAILURE_KIND)


def read_kind(path: Path, kind: str) -> dict[str, Any] | None:
    """A JSON file that says it is of this kind; None for any other file."""
    try:
        value = _read_json(path)
    except RecordError:
        return None
    return value if isinstance(value, dict) and value.get("kind") == kind else None


def _read_json(path: Path) -> Any:
    """The JSON value of a file, all of which a report can write again. Raises RecordError."""
    try:
        if path.exists() and not path.is_file():  # a pipe or a device would be read forever
            raise ValueError("it is no regular file")
        if (size := path.stat().st_size) > _MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes, no record has more than {_MAX_BYTES:,}")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        # Lone surrogates and floats beyond the largest one (1e999) pass the parser.
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        return value
    except (OSError, ValueError, RecursionError, MemoryError) as e:
        raise RecordError(f"{path} is not a complete JSON file: {e}") from e


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a strict JSON file that appears whole or not at all. Raises RecordError."""
    try:
        write_whole(path, json.dumps(value, indent=1, allow_nan=False).encode())
    except OSError as e:
        raise RecordError(f"{path} cannot be written: {disk_problem(e)}") from e


def model_label(name: str) -> str:
    """The last part of a model's name or path, without `.gguf`."""
    return Path(name).name.removesuffix(".gguf")


def codec_label(record: Mapping[str, Any]) -> str:
    """The codecs of a run for tables: what the user wrote, and what differs on single links."""
    return config_label(record["args"]["config"]) if record["codecs"] else "unsplit"


def codec_labels(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Labels of runs that stand together, without the paths of calibrations if these do not tell any two apart."""
    labels = [codec_label(record) for record in records]
    short = [re.sub(r"calibration=[^,)]*, ", "", label) for label in labels]
    return short if len(set(short)) == len(set(labels)) else labels


def config_label(config: Mapping[str, Any]) -> str:
    """`codec_label` of a config that has not been run."""
    own = [f"{name}: {_spec_label(spec)}" for name, spec in config["compressor_per_link"].items()]
    decode = config.get("compressor_decode")
    decoding = [] if decode is None else [f"decoding {_spec_label(decode)}"]
    return ", ".join([_spec_label(config["compressor"]), *own, *decoding])


def _spec_label(spec: Any) -> str:
    """A codec spec in its short form."""
    if not isinstance(spec, Mapping):
        return str(spec)
    options = [f"{key}={_spec_label(value)}" for key, value in spec.items() if key != "name"]
    return f"{spec['name']}({', '.join(options)})" if options else str(spec["name"])


def _finite(value: Any) -> tuple[bool, Any]:
    """`value` with non-finite floats replaced by None, and whether there was none."""
    if isinstance(value, float) and not math.isfinite(value):
        return False, None
    if isinstance(value, Mapping):
        parts = {str(key): _finite(item) for key, item in value.items()}
        return all(ok for ok, _ in parts.values()), {key: item for key, (_, item) in parts.items()}
    if isinstance(value, (list, tuple)):
        items = [_finite(item) for item in value]
        return all(ok for ok, _ in items), [item for _, item in items]
    return True, value
