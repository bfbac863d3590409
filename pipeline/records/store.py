"""Records on disk: a strict JSON file each, and beside an evaluation's a safetensors file with a row per scored token.

Between the models, which say what is in a record, and the folders that reports read. Files appear whole or not at all.
What is no record, or is damaged, is a RecordError; nothing else is raised for the content of a file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors.numpy import load_file, save

from pipeline.records.base import problem_in
from pipeline.records.failed_point import FAILURE_KIND, FailedPoint
from pipeline.records.files import RecordError, disk_problem, write_whole
from pipeline.records.generation_record import GENERATION_KIND, GenerationRecord
from pipeline.records.migrations import lift
from pipeline.records.run_record import RUN_KIND, RunRecord
from pipeline.records.tasks_record import TASKS_KIND, TasksRecord

__all__ = [
    "AnyRecord",
    "failure_path",
    "read_any",
    "read_failure",
    "read_generation",
    "read_per_token",
    "read_record",
    "write_failure",
    "write_generation",
    "write_record",
    "write_tasks",
]

AnyRecord = RunRecord | GenerationRecord | TasksRecord | FailedPoint

_MODELS: dict[str, type[AnyRecord]] = {
    RUN_KIND: RunRecord,
    GENERATION_KIND: GenerationRecord,
    TASKS_KIND: TasksRecord,
    FAILURE_KIND: FailedPoint,
}
_PER_TOKEN = {"loss": np.dtype(np.float32), "top1": np.dtype(np.int32), "window": np.dtype(np.int32)}
_MAX_BYTES = 64 << 20  # far beyond any record; what is larger is not even read


def write_record(folder: Path, record: RunRecord, per_token: Mapping[str, np.ndarray]) -> Path:
    """Write `<run_id>.safetensors`, then `<run_id>.json`; returns the latter's path.

    A run id that is taken gets a number behind it. Raises RecordError when the disk does not take it.
    """
    run_id, attempt = record.run_id, 1
    while (folder / f"{run_id}.json").exists():
        attempt += 1
        run_id = f"{record.run_id}-{attempt}"
    record = record.model_copy(update={"run_id": run_id, "per_token_file": f"{run_id}.safetensors"})
    path = folder / f"{run_id}.json"
    content = _content(record)
    try:
        write_whole(path.with_suffix(".safetensors"), save(dict(per_token)))
    except OSError as e:
        raise RecordError(f"the record {path} cannot be written: {disk_problem(e)}") from e
    try:
        _write(path, content)
    except RecordError:
        with contextlib.suppress(OSError):
            path.with_suffix(".safetensors").unlink()
        raise
    return path


def write_generation(folder: Path, record: GenerationRecord) -> Path:
    """Write `<run_id>.json`; returns its path. Raises RecordError when the disk does not take it."""
    return _write(folder / f"{record.run_id}.json", _content(record))


def write_tasks(folder: Path, record: TasksRecord) -> Path:
    """Write `<run_id>.json`; returns its path. Raises RecordError when the disk does not take it."""
    return _write(folder / f"{record.run_id}.json", _content(record))


def write_failure(folder: Path, failure: FailedPoint) -> Path:
    """Write `failed-<failure_id>.json`, in place of an older one; returns its path. Raises RecordError."""
    return _write(failure_path(folder, failure.failure_id), _content(failure))


def failure_path(folder: Path, failure_id: str) -> Path:
    """Where `write_failure` puts a failure."""
    return folder / f"failed-{failure_id}.json"


def read_any(path: Path) -> AnyRecord:
    """Read a record of whatever kind and version. Raises RecordError for anything else."""
    value = _read_json(path)
    try:
        lifted = lift(value)
        kind = lifted.get("kind")
        if not isinstance(kind, str) or kind not in _MODELS:
            raise ValueError(f"kind is {str(kind)[:40]!r}, not {', '.join(map(repr, _MODELS))}")
        return _MODELS[kind].model_validate_json(json.dumps(lifted))
    except ValidationError as e:
        raise RecordError(f"{path} is not a complete record: {problem_in(e)}") from e
    except (ValueError, RecursionError) as e:
        raise RecordError(f"{path} is not a record: {e}") from e


def read_record(path: Path) -> RunRecord:
    """Read an evaluation's record. Raises RecordError for anything else."""
    record = read_any(path)
    if not isinstance(record, RunRecord):
        raise RecordError(f"{path} is not the record of an evaluation: its kind is {record.kind!r}")
    return record


def read_generation(path: Path) -> GenerationRecord:
    """Read the record of a run that answered prompts. Raises RecordError for anything else."""
    record = read_any(path)
    if not isinstance(record, GenerationRecord):
        raise RecordError(f"{path} is not the record of answers: its kind is {record.kind!r}")
    return record


def read_failure(path: Path) -> FailedPoint | None:
    """What `write_failure` wrote; None for any other file."""
    try:
        record = read_any(path)
    except RecordError:
        return None
    return record if isinstance(record, FailedPoint) else None


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


def _content(record: AnyRecord) -> bytes:
    """The file of a record. Raises RuntimeError for one that could not be read back, naming the key: a bug."""
    text = json.dumps(record.model_dump(mode="json"), indent=1, allow_nan=False)
    try:
        type(record).model_validate_json(text)
    except ValidationError as e:
        raise RuntimeError(f"a record that nobody could read is not written: {problem_in(e)}; this is a bug") from e
    return text.encode()


def _write(path: Path, content: bytes) -> Path:
    try:
        write_whole(path, content)
    except OSError as e:
        raise RecordError(f"{path} cannot be written: {disk_problem(e)}") from e
    return path


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
