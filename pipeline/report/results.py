"""A folder of results as a report sees it: comparable points in groups, failed points, other files.

Read from records and their per-token files alone. A file that is neither a record nor a failed point of a
sweep is named and skipped; so is a record whose figures are missing. Nothing is formatted here.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.records.schema import schema_problem
from pipeline.records.store import (
    RecordError,
    codec_label,
    digest_of,
    model_label,
    read_failure,
    read_per_token,
    read_record,
)
from pipeline.report.prediction import PipelineCosts
from pipeline.report.quality import Quality, compare

__all__ = [
    "FailedPoint",
    "MeasuredPoint",
    "Recommendation",
    "Results",
    "Setting",
    "is_uncompressed",
    "load_records",
    "read_results",
    "recommend",
    "setting_key",
]


@dataclass(frozen=True, kw_only=True)
class MeasuredPoint:
    """One record, its quality against the setting's baseline, and what a prediction needs.

    `quality` is None where there is no baseline or a per-token file cannot be used; `quality_note` says why.
    `costs` is None where there is no link, or no time was taken (all was finished before a resumed run
    began).
    """

    record: dict[str, Any]
    label: str
    quality: Quality | None
    quality_note: str
    costs: PipelineCosts | None

    @property
    def ppl(self) -> float | None:
        return self.record["results"]["avg_ppl"]

    @property
    def bytes_per_token(self) -> float | None:
        return self.record["traffic_totals"]["bytes_per_token"]

    @property
    def bits_per_value(self) -> float | None:
        return self.record["traffic_totals"]["bits_per_value"]

    @property
    def uncompressed(self) -> bool:
        return is_uncompressed(self.record)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Points of one model, text and protocol, oldest first. `name` is a number where there are several
    settings.
    """

    name: str
    title: str
    points: tuple[MeasuredPoint, ...]

    @property
    def hidden_size(self) -> int:
        return self.points[0].record["model"]["hidden_size"]

    @property
    def baseline(self) -> MeasuredPoint | None:
        """The oldest uncompressed point."""
        return next((point for point in self.points if point.uncompressed), None)


@dataclass(frozen=True, kw_only=True)
class FailedPoint:
    """A point of a sweep that ended in an error."""

    label: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Results:
    settings: tuple[Setting, ...]
    failed: tuple[FailedPoint, ...]
    skipped: tuple[str, ...]

    @property
    def points(self) -> list[MeasuredPoint]:
        return [point for setting in self.settings for point in setting.points]


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The cheapest causal point within a budget, and the cheapest whose whole interval is; None where there
    is none.
    """

    cheapest: MeasuredPoint | None
    certain: MeasuredPoint | None


@dataclass
class _Files:
    records: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    failed: list[FailedPoint] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def load_records(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Records in `paths` (files, or folders of them), oldest first. What is no record is named on standard
    error.
    """
    files = _read_files(paths)
    for failed in files.failed:
        print(f"failed point: {failed.label}: {failed.error}", file=sys.stderr)
    for text in files.skipped:
        print(f"skipped: {text}", file=sys.stderr)
    return [record for _, record in files.records]


def read_results(paths: Sequence[Path]) -> Results:
    """Everything in `paths` (files, or folders of them)."""
    files = _read_files(paths)
    groups: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path, record in files.records:
        groups.setdefault(setting_key(record), []).append((path, record))
    settings = []
    for members in groups.values():
        baseline = next((path for path, record in members if is_uncompressed(record)), None)
        points = []
        for path, record in members:
            try:
                points.append(_point(path, record, baseline))
            except (AttributeError, KeyError, TypeError, ZeroDivisionError) as e:
                files.skipped.append(f"{path} is not a complete run record: {type(e).__name__}: {e}")
        if points:
            name = str(len(settings) + 1) if len(groups) > 1 else ""
            settings.append(Setting(name=name, title=_title(points[0].record), points=tuple(points)))
    return Results(settings=tuple(settings), failed=tuple(files.failed), skipped=tuple(files.skipped))


def setting_key(record: Mapping[str, Any]) -> str:
    """Equal for records whose perplexities may be compared: same model and precision, text and protocol."""
    weights = {key: record["args"][key] for key in ("dtype", "load_in_8bit", "load_in_4bit")}
    return digest_of([record["model"], weights, record["dataset"], record["protocol"]])


def is_uncompressed(record: Mapping[str, Any]) -> bool:
    """Whether no link compresses, or there is none."""
    return all(codec["name"] == "none" for codec in record["codecs"].values())


def recommend(setting: Setting, max_ppl_increase: float) -> Recommendation:
    """Fewest bytes per token among causal points whose perplexity is at most 1 + `max_ppl_increase` times the
    baseline's. Codecs that are not causal are left out: their perplexity is flattered.
    """
    limit = 1 + max_ppl_increase
    fit = [
        p for p in setting.points
        if p.quality and p.quality.ppl_ratio <= limit and p.record["causal"] and p.bytes_per_token is not None
    ]  # fmt: skip
    certain = [p for p in fit if p.uncompressed or (p.quality.ppl_interval and p.quality.ppl_interval[1] <= limit)]
    cheapest = [min(points, key=lambda p: p.bytes_per_token, default=None) for points in (fit, certain)]
    return Recommendation(cheapest=cheapest[0], certain=cheapest[1])


def _read_files(paths: Sequence[Path]) -> _Files:
    files = _Files()
    for path in (f for p in paths for f in (sorted(p.glob("*.json")) if p.is_dir() else [p])):
        try:
            failure = read_failure(path)
            if failure:
                label, error = (str(failure.get(key, "")) for key in ("label", "error"))
                files.failed.append(FailedPoint(label=label or path.stem, error=error))
                continue
            record = read_record(path)
            if problem := schema_problem(record):
                raise RecordError(f"{path} is not a complete run record: {problem}")
            codec_label(record)  # made from what the user wrote
            files.records.append((path, record))
        except RecordError as e:
            files.skipped.append(str(e))
        except (AttributeError, KeyError, TypeError) as e:
            files.skipped.append(f"{path} is not a complete run record: {type(e).__name__}: {e}")
    files.records.sort(key=lambda item: item[1]["finished_at"])
    return files


def _point(path: Path, record: dict[str, Any], baseline: Path | None) -> MeasuredPoint:
    quality, note = None, "no uncompressed point of the same model, text and protocol"
    if baseline is not None:
        try:
            quality, note = compare(read_per_token(baseline), _own_per_token(path, record)), ""
        except ValueError as e:  # RecordError too
            note = str(e)
    return MeasuredPoint(
        record=record,
        label=codec_label(record),
        quality=quality,
        quality_note=note,
        costs=PipelineCosts.of(record) if record["traffic_per_link"] and record["timed_tokens"] else None,
    )


def _own_per_token(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """The per-token file, if it is the record's."""
    per_token = read_per_token(path)
    if len(per_token["loss"]) != record["results"]["total_loss_tokens"]:
        raise RecordError(
            f"{path.with_suffix('.safetensors')} has {len(per_token['loss'])} tokens, "
            f"its record {record['results']['total_loss_tokens']}"
        )
    return per_token


def _title(record: Mapping[str, Any]) -> str:
    dataset, protocol, args = record["dataset"], record["protocol"], record["args"]
    weights = " 8-bit weights" if args["load_in_8bit"] else " 4-bit weights" if args["load_in_4bit"] else ""
    return (
        f"{model_label(args['model_name'])} {args['dtype']}{weights}, {dataset['num_tokens']:,} tokens of "
        f"{dataset['description']}, windows {protocol['max_length']}/{protocol['stride']}"
    )
