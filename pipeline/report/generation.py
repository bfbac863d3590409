"""Runs that generated, as rows of a table: what was asked for, how fast it came, what crossed the links."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.records.files import RecordError
from pipeline.records.labels import codec_label, model_label

__all__ = ["HEADINGS", "KIND", "SCHEMA_VERSION", "GeneratedRun", "read_generation"]

KIND = "thinwire generation"
SCHEMA_VERSION = 1
HEADINGS = (
    *("codec", "model", "requests", "failed", "tokens", "tokens/s", "TTFT ms", "ms/token", "ms/token p95"),
    *("bytes/token/link", "header bytes/token", "cache MiB", "rows, passes"),
)


@dataclass(frozen=True, kw_only=True)
class GeneratedRun:
    """One record, already in words: a cell per heading, and where its other figures are."""

    cells: tuple[str, ...]
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
    slots, passes = _count(schedule["max_slots"]), _count(schedule["passes"])
    cells = (
        codec_label(record),
        model_label(_text(record["args"]["model_name"])),
        str(_count(results["num_requests"])),
        str(_count(results["num_failed"])),
        str(_count(results["generated_tokens"])),
        f"{_number(results['tokens_per_s']):.2f}",
        _milliseconds(results["ttft_s"], "median"),
        _milliseconds(results["tpot_s"], "median"),
        _milliseconds(results["tpot_s"], "p95"),
        f"{payload / crossings:.1f}" if crossings else "-",
        f"{headers / crossings:.1f}" if crossings else "-",
        f"{sum(_count(rank['cache_bytes']) for rank in record['ranks']) / 2**20:.1f}",
        f"up to {slots}, {passes}",
    )
    return GeneratedRun(
        cells=cells, run_id=_text(record["run_id"]), notes=tuple(_text(note) for note in record["notes"])
    )


def _milliseconds(spread: Mapping[str, Any] | None, name: str) -> str:
    return "-" if spread is None else f"{1e3 * _number(spread[name]):.1f}"


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
