"""A run's results on disk: one strict JSON record, and beside it a safetensors file with a row per scored token.

Numbers that JSON cannot hold (NaN, infinity) are written as null and flagged. Files appear whole or not at all.
Reports read these files and nothing else.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

__all__ = [
    "RecordError",
    "check_writable",
    "codec_label",
    "config_label",
    "digest_of",
    "failure_path",
    "make_run_id",
    "model_label",
    "read_failure",
    "read_per_token",
    "read_record",
    "software_versions",
    "write_failure",
    "write_record",
]

SCHEMA_VERSION = 1
FAILURE_KIND = "failed point"
_REQUIRED_KEYS = ("schema_version", "run_id", "args", "results", "traffic_totals", "traffic_per_link", "time_run_s")
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
    """Create `folder` and write a file in it, so that a run does not end with nowhere to put its result.

    Raises RecordError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
    except OSError as e:
        raise RecordError(f"exp_dir {str(folder)!r} cannot be written to: {e.strerror or e}") from e


def write_record(folder: Path, record: Mapping[str, Any], per_token: Mapping[str, np.ndarray]) -> Path:
    """Write `<run_id>.safetensors`, then `<run_id>.json`; returns the latter's path.

    A run id that is taken gets a number behind it. Raises RecordError when the disk does not take it.
    """
    run_id, attempt = record["run_id"], 1
    while (folder / f"{run_id}.json").exists():
        attempt += 1
        run_id = f"{record['run_id']}-{attempt}"
    record = {
        "schema_version": SCHEMA_VERSION,
        **record,
        "run_id": run_id,
        "finished_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "per_token_file": f"{run_id}.safetensors",
    }
    finite, record = _finite(record)
    record["finite"] = finite
    path = folder / f"{run_id}.json"
    try:
        partial = folder / f".{run_id}.safetensors.partial"
        save_file(dict(per_token), partial)
        os.replace(partial, folder / f"{run_id}.safetensors")
    except (OSError, SafetensorError) as e:
        raise RecordError(f"the record {path} cannot be written: {getattr(e, 'strerror', None) or e}") from e
    _write_json(path, record)
    return path


def read_record(path: Path) -> dict[str, Any]:
    """Read a record back. Raises RecordError for anything else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as e:
        raise RecordError(f"{path} is not a complete JSON file: {e}") from e
    missing = [key for key in _REQUIRED_KEYS if not isinstance(record, dict) or key not in record]
    if missing:
        raise RecordError(f"{path} is not a run record: it lacks {', '.join(missing)}")
    if record["schema_version"] != SCHEMA_VERSION:
        raise RecordError(f"{path} has schema version {record['schema_version']}, this program reads {SCHEMA_VERSION}")
    return record


def read_per_token(record_path: Path) -> dict[str, np.ndarray]:
    """The per-token file beside a record: `loss` float32, `top1` int32 and `window` int32, one row per token."""
    path = record_path.with_suffix(".safetensors")
    try:
        return load_file(path)
    except Exception as e:  # safetensors raises its own type for a damaged file
        raise RecordError(f"{path} cannot be read: {e}") from e


def write_failure(folder: Path, failure: Mapping[str, Any]) -> Path:
    """Write `failed-<failure_id>.json`: that a point of a sweep has failed, and why; replaces an older one.

    `failure` has `failure_id`, `label`, `error` and `args`. Raises RecordError.
    """
    path = failure_path(folder, failure["failure_id"])
    _write_json(
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
    try:
        failure = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return failure if isinstance(failure, dict) and failure.get("kind") == FAILURE_KIND else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a strict JSON file that appears whole or not at all. Raises RecordError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as e:
        raise RecordError(f"the record {path} cannot be written: {e.strerror or e}") from e


def model_label(name: str) -> str:
    """The last part of a model's name or path, without `.gguf`."""
    return Path(name).name.removesuffix(".gguf")


def codec_label(record: Mapping[str, Any]) -> str:
    """The codecs of a run for tables: what the user wrote, and what differs on single links."""
    return config_label(record["args"]["config"]) if record["codecs"] else "unsplit"


def config_label(config: Mapping[str, Any]) -> str:
    """`codec_label` of a config that has not been run."""
    own = [f"{name}: {_spec_label(spec)}" for name, spec in config["compressor_per_link"].items()]
    return ", ".join([_spec_label(config["compressor"]), *own])


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
