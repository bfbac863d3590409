"""A folder of results as a report sees it: comparable points in groups, failed points, other files.

Read from records and their per-token files alone. What is no record of any kind is named and skipped, whatever is wrong
with it. Nothing is formatted here.
"""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.records.environment import environment_changes
from pipeline.records.failed_point import FailedPoint
from pipeline.records.files import RecordError, disk_problem
from pipeline.records.generation_record import GenerationRecord
from pipeline.records.identity import digest_of
from pipeline.records.labels import codec_labels, emulation_labels, model_label, weights_key, weights_label
from pipeline.records.run_record import RunRecord
from pipeline.records.store import read_any, read_per_token
from pipeline.records.tasks_record import TasksRecord
from pipeline.report.printable import printable
from pipeline.report.generation import GeneratedRun
from pipeline.report.measured_point import MeasuredPoint, is_uncompressed
from pipeline.report.prediction import PipelineCosts
from pipeline.report.quality import compare

__all__ = [
    "Recommendation",
    "Results",
    "Setting",
    "load_files",
    "load_generated",
    "load_records",
    "load_tasks",
    "read_own_per_token",
    "read_results",
    "recommend",
    "setting_key",
    "summary_points",
]


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
        return self.points[0].record.model.hidden_size

    @property
    def prefix(self) -> str:
        """In front of a point's label, what tells points of several settings apart."""
        return f"[{self.name}] " if self.name else ""

    @property
    def baseline(self) -> MeasuredPoint | None:
        """The oldest uncompressed point."""
        return next((point for point in self.points if point.uncompressed), None)


@dataclass(frozen=True, kw_only=True)
class Results:
    """`skipped` says of each file that is no record why, `skipped_names` how it is called."""

    settings: tuple[Setting, ...]
    failed: tuple[FailedPoint, ...]
    skipped: tuple[str, ...]
    skipped_names: tuple[str, ...]
    generated: tuple[GeneratedRun, ...] = ()
    tasks: tuple[TasksRecord, ...] = ()

    @property
    def points(self) -> list[MeasuredPoint]:
        return [point for _, point in self.members]

    @property
    def members(self) -> list[tuple[Setting, MeasuredPoint]]:
        """All points, each with its setting."""
        return [(setting, point) for setting in self.settings for point in setting.points]


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The cheapest causal point within a budget, and the cheapest whose whole interval is; None where there
    is none.
    """

    cheapest: MeasuredPoint | None
    certain: MeasuredPoint | None


@dataclass
class _Files:
    records: list[tuple[Path, RunRecord]] = field(default_factory=list)
    failed: list[FailedPoint] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, why)
    generated: list[GeneratedRun] = field(default_factory=list)
    tasks: list[TasksRecord] = field(default_factory=list)


def load_records(paths: Sequence[Path]) -> list[RunRecord]:
    """Records in `paths` (files, or folders of them), oldest first. What is no record is named on standard
    error.
    """
    return [record for _, record in load_files(paths)]


def load_generated(paths: Sequence[Path]) -> list[GeneratedRun]:
    """Runs that generated, in `paths`."""
    return _read_files(paths).generated


def load_tasks(paths: Sequence[Path]) -> list[TasksRecord]:
    """Runs of tasks, in `paths`."""
    return _read_files(paths).tasks


def load_files(paths: Sequence[Path]) -> list[tuple[Path, RunRecord]]:
    """`load_records` with the records' paths."""
    files = _read_files(paths)
    for failed in files.failed:
        print(printable(f"failed point: {failed.label}: {failed.error}", sys.stderr), file=sys.stderr)
    for _, text in files.skipped:
        print(printable(f"skipped: {text}", sys.stderr), file=sys.stderr)
    return files.records


def read_results(paths: Sequence[Path]) -> Results:
    """Everything in `paths` (files, or folders of them)."""
    files = _read_files(paths)
    groups: dict[str, list[tuple[Path, RunRecord]]] = {}
    for path, record in files.records:
        groups.setdefault(setting_key(record), []).append((path, record))
    settings: list[Setting] = []
    for members in groups.values():
        baseline = next((member for member in members if is_uncompressed(member[1])), None)
        points = tuple(_points(members, baseline))
        name = str(len(settings) + 1) if len(groups) > 1 else ""
        settings.append(Setting(name=name, title=_title(points[0].record), points=points))
    return Results(
        settings=tuple(settings),
        failed=tuple(files.failed),
        skipped=tuple(text for _, text in files.skipped),
        skipped_names=tuple(name for name, _ in files.skipped),
        generated=tuple(files.generated),
        tasks=tuple(files.tasks),
    )


def summary_points(records: Sequence[RunRecord]) -> list[tuple[MeasuredPoint, str]]:
    """For a console: points in the order of `records`, compared with the first uncompressed one of their setting by
    perplexity alone, since no per-token file is opened; so they have no quality, and no costs either.

    The text beside a point says tokens and windows where the points are of several settings, and how weights were held
    where that differs, else nothing.
    """
    keys = [setting_key(record) for record in records]
    held = [weights_label(record) for record in records]
    baselines: dict[str, RunRecord] = {}
    for key, record in zip(keys, records, strict=True):
        if is_uncompressed(record):
            baselines.setdefault(key, record)
    points = []
    labels = zip(codec_labels(records), emulation_labels(records), strict=True)
    for key, record, weights, (codecs, emulated) in zip(keys, records, held, labels, strict=True):
        baseline = baselines.get(key)
        point = MeasuredPoint(
            record=record,
            codecs=codecs,
            emulated=emulated,
            quality=None,
            quality_note="",
            unread=False,
            elsewhere=_elsewhere(record, baseline),
            costs=None,
            ppl_change=_change(record, baseline) if baseline else None,
        )
        setting = f"{record.dataset.num_tokens} tokens, {_windows(record)}" if len(set(keys)) > 1 else ""
        setting += f", {weights}" if len(set(held)) > 1 else ""
        points.append((point, setting))
    return points


def setting_key(record: RunRecord) -> str:
    """Equal for records whose perplexities may be compared: same model, held alike, same text and protocol."""
    return digest_of([weights_key(record), record.dataset.model_dump(), record.protocol.model_dump()])


def recommend(setting: Setting, max_ppl_increase: float) -> Recommendation:
    """Fewest bytes per token among causal points whose perplexity is at most 1 + `max_ppl_increase` times the
    baseline's. Codecs that are not causal are left out: their perplexity is flattered.
    """
    limit = 1 + max_ppl_increase
    fit, certain = [], []  # (bytes per token, place, point)
    for place, point in enumerate(setting.points):
        nbytes, quality = point.bytes_per_token, point.quality
        if quality and quality.ppl_ratio <= limit and point.causal and nbytes is not None:
            fit.append((nbytes, place, point))
            if point.uncompressed or (quality.ppl_interval and quality.ppl_interval[1] <= limit):
                certain.append((nbytes, place, point))
    return Recommendation(
        cheapest=min(fit)[2] if fit else None,
        certain=min(certain)[2] if certain else None,
    )


def _read_files(paths: Sequence[Path]) -> _Files:
    files = _Files()
    for path in paths:
        try:
            inside = sorted(p for p in path.iterdir() if p.suffix == ".json") if path.is_dir() else [path]
        except OSError as e:
            files.skipped.append((path.name, f"{path} cannot be listed: {disk_problem(e)}"))
            continue
        for file in inside:
            try:
                record = read_any(file)
            except RecordError as e:
                files.skipped.append((file.name, str(e)))
                continue
            match record:
                case RunRecord():
                    files.records.append((file, record))
                case GenerationRecord():
                    files.generated.append(GeneratedRun.of(record))
                case TasksRecord():
                    files.tasks.append(record)
                case FailedPoint():
                    files.failed.append(record)
    files.records.sort(key=lambda item: _finished(item[1]))
    return files


def _finished(record: RunRecord) -> datetime.datetime:
    """When a run ended; of times without an offset, as other programs write them, UTC is taken for it."""
    if record.finished_at is None:  # before records said so, they were older
        return datetime.datetime.min.replace(tzinfo=datetime.UTC)
    time = datetime.datetime.fromisoformat(record.finished_at)
    return time if time.utcoffset() is not None else time.replace(tzinfo=datetime.UTC)


def _points(
    members: Sequence[tuple[Path, RunRecord]], baseline: tuple[Path, RunRecord] | None
) -> Iterator[MeasuredPoint]:
    """The points of one setting, compared with its baseline token by token."""
    baseline_path, uncompressed, problem = None, None, "no uncompressed point of the same model, text and protocol"
    if baseline is not None:
        baseline_path = baseline[0]
        try:
            uncompressed = read_own_per_token(*baseline)
        except RecordError as e:
            problem = f"of the uncompressed point: {e}"
    records = [record for _, record in members]
    labels = zip(codec_labels(records), emulation_labels(records), strict=True)
    for (codecs, emulated), (path, record) in zip(labels, members, strict=True):
        quality, note = None, problem
        if uncompressed is not None:
            try:
                own = uncompressed if path == baseline_path else read_own_per_token(path, record)
                quality, note = compare(uncompressed, own), ""
            except ValueError as e:  # RecordError too
                note = str(e)
        yield MeasuredPoint(
            record=record,
            codecs=codecs,
            emulated=emulated,
            quality=quality,
            quality_note=note,
            elsewhere=_elsewhere(record, baseline[1] if baseline else None),
            unread=quality is None and baseline is not None,
            costs=PipelineCosts.of(record),
            ppl_change=quality.ppl_ratio - 1 if quality else None,
        )


def _change(record: RunRecord, baseline: RunRecord) -> float:
    """Of the perplexity; NaN where one is not finite."""
    ppl, baseline_ppl = record.results.avg_ppl, baseline.results.avg_ppl
    return math.nan if ppl is None or baseline_ppl is None else ppl / baseline_ppl - 1


def _elsewhere(record: RunRecord, baseline: RunRecord | None) -> str:
    own, other = record.environment, baseline and baseline.environment
    return environment_changes(other, own) if own and other else ""


def read_own_per_token(path: Path, record: RunRecord) -> dict[str, np.ndarray]:
    """The per-token file beside a record, if it is the record's. Raises RecordError."""
    per_token = read_per_token(path)
    file, results = path.with_suffix(".safetensors"), record.results
    if len(per_token["loss"]) != results.total_loss_tokens:
        raise RecordError(f"{file} has {len(per_token['loss'])} tokens, its record {results.total_loss_tokens}")
    mean = float(per_token["loss"].mean(dtype=np.float64)) if len(per_token["loss"]) else math.nan
    if results.avg_ppl is not None and not abs(mean - math.log(results.avg_ppl)) < 1e-6 * max(1.0, abs(mean)):
        raise RecordError(
            f"{file} is another run's: its mean loss is {mean:.6g}, its record's perplexity {results.avg_ppl:.6g}"
        )
    return per_token


def _windows(record: RunRecord) -> str:
    return f"windows {record.protocol.max_length}/{record.protocol.stride}"


def _title(record: RunRecord) -> str:
    dataset = record.dataset
    return (
        f"{model_label(record.args.model_name)} {weights_label(record)}, {dataset.num_tokens:,} tokens of "
        f"{dataset.description}, {_windows(record)}"
    )
