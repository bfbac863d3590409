"""Runs that generated, read from their records: what was asked for, how fast it came, what crossed the links.

`generation_columns` says how they are shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.records.store import RecordError, codec_label, model_label

__all__ = ["KIND", "SCHEMA_VERSION", "GeneratedRun", "read_generation"]

KIND = "thinwire generation"
SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class GeneratedRun:
    """One record. `ttft_s`, `tpot_s` and `tpot_p95_s` (seconds to the first token, between tokens) are None where no
    request came that far, bytes per token of a link where nothing crossed one.
    """

    label: str
    model: str
    num_requests: int
    num_failed: int
    num_tokens: int
    tokens_per_s: float
    ttft_s: float | None
    tpot_s: float | None
    tpot_p95_s: float | None
    payload_bytes_per_token: float | None
    header_bytes_per_token: float | None
    cache_bytes: int
    max_rows: int
    passes: int
    run_id: str
    notes: tuple[str, ...]


def read_generation(path: Path, record: Mapping[str, Any]) -> GeneratedRun:
    """Of a record of this kind. Raises RecordError for one that lacks a figure, or has something else in its place."""
    try:
        return _read(record)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise RecordError(f"{path} is not a complete record of generation: {type(e).__name__}: {e}") from e


def _read(record: Mapping[str, Any]) -> GeneratedRun:
    if _count(record["schema_version"]) != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {record['schema_version']}, this release reads {SCHEMA_VERSION}")
    results, links, schedule = record["results"], record["traffic_per_link"].values(), record["schedule"]
    crossings = sum(_count(link["tokens"]) for link in links)
    payload = sum(_count(link["payload_bytes"]) for link in links)
    headers = sum(_count(link["header_bytes"]) for link in links)
    return GeneratedRun(
        label=codec_label(record),
        model=model_label(_text(record["args"]["model_name"])),
        num_requests=_count(results["num_requests"]),
        num_failed=_count(results["num_failed"]),
        num_tokens=_count(results["generated_tokens"]),
        tokens_per_s=_number(results["tokens_per_s"]),
        ttft_s=_part(results["ttft_s"], "median"),
        tpot_s=_part(results["tpot_s"], "median"),
        tpot_p95_s=_part(results["tpot_s"], "p95"),
        payload_bytes_per_token=payload / crossings if crossings else None,
        header_bytes_per_token=headers / crossings if crossings else None,
        cache_bytes=sum(_count(rank["cache_bytes"]) for rank in record["ranks"]),
        max_rows=_count(schedule["max_slots"]),
        passes=_count(schedule["passes"]),
        run_id=_text(record["run_id"]),
        notes=tuple(_text(note) for note in record["notes"]),
    )


def _part(spread: Mapping[str, Any] | None, name: str) -> float | None:
    return None if spread is None else _number(spread[name])


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{str(value)[:40]!r} is no figure")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{str(value)[:40]!r} is no count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is no text")
    return value
