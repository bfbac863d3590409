"""A run's results on disk: one strict JSON record, and beside it a safetensors file with a row per scored token.

Numbers that JSON cannot hold (NaN, infinity) are written as null and flagged. Files appear whole or not at all.
Reports read these files and nothing else.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save

from pipeline.records.files import RecordError, disk_problem, write_json, write_whole

__all__ = [
    "failure_path",
    "read_failure",
    "read_kind",
    "read_per_token",
    "read_record",
    "write_failure",
    "write_record",
]

SCHEMA_VERSION = 1
FAILURE_KIND = "failed point"
_REQUIRED_KEYS = ("schema_version", "run_id", "args", "results", "traffic_totals", "traffic_per_link", "time_run_s")
_PER_TOKEN = {"loss": np.dtype(np.float32), "top1": np.dtype(np.int32), "window": np.dtype(np.int32)}
_MAX_BYTES = 64 << 20  # far beyond any record; what is larger is not even read


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
