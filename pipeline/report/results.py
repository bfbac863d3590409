"""A folder of results as a report sees it: comparable points in groups, failed points, other files.

Read from records and their per-token files alone. A file that is neither a record nor a failed point of a
sweep is named and skipped, whatever is wrong with it; so is a record whose figures are missing. Nothing is formatted
here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.schema import ModelConfig
from pipeline.records.environment import environment_changes
from pipeline.records.schema import schema_problem
from pipeline.records.store import (
    RecordError,
    codec_label,
    codec_labels,
    digest_of,
    disk_problem,
    model_label,
    read_failure,
    read_kind,
    read_per_token,
    read_record,
)
from pipeline.report.generation import KIND, GeneratedRun, read_generation
from pipeline.report.prediction import PipelineCosts
from pipeline.report.quality import Quality, compare

__all__ = [
    "PHASES",
    "FailedPoint",
    "LinkFigures",
    "MeasuredPoint",
    "Recommendation",
    "Results",
    "Setting",
    "is_uncompressed",
    "load_files",
    "load_generated",
    "load_records",
    "read_own_per_token",
    "read_results",
    "read_whole_record",
    "recommend",
    "setting_key",
    "summary_points",
]

# What a stage does, in the reader's words, and the record's key of its seconds.
PHASES = {
    "compute": "compute_s",
    "importance": "importance_s",
    "encode": "compress_s",
    "decode": "decompress_s",
    "wait": "wait_s",
}


@dataclass(frozen=True, kw_only=True)
class LinkFigures:
    """What one link carried: payload bytes per token, and all bytes sent (headers and padding too) in how many frames.
    `error` is the relative squared error of the reconstruction, None where it was not measured.
    """

    bytes_per_token: float
    sent_bytes: int
    num_frames: int
    error: float | None


@dataclass(frozen=True, kw_only=True)
class MeasuredPoint:
    """One record, its quality against the setting's baseline, and what a prediction needs.

    `quality` is None where there is no baseline or a per-token file cannot be used; `quality_note` says why, and
    `unread` tells the second case. `ppl_change` (0.01: 1%) is against the baseline, NaN or infinity where losses are
    not finite, None without a baseline and where `unread`. `elsewhere` says what this point ran on where the baseline
    ran on something else, which may change losses.
    `costs` is None where there is no link, or no time was taken (all was finished before a resumed run
    began).

    The properties are what tables and page show of the record; they alone know its keys.
    """

    record: dict[str, Any]
    label: str
    quality: Quality | None
    quality_note: str
    unread: bool
    elsewhere: str
    costs: PipelineCosts | None
    ppl_change: float | None

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

    @property
    def causal(self) -> bool:
        return self.record["causal"]

    @property
    def tokens_per_s(self) -> float:
        return self.record["tokens_per_s"]

    @property
    def encode_us_per_token(self) -> float | None:
        """Importance included; None where nothing crossed a link while time was taken."""
        return self._us_per_crossing("encode", "importance")

    @property
    def decode_us_per_token(self) -> float | None:
        return self._us_per_crossing("decode")

    @property
    def worst_error(self) -> float | None:
        """The largest of the links' relative squared errors."""
        return max((link.error for link in self.links.values() if link.error is not None), default=None)

    @property
    def links(self) -> dict[str, LinkFigures]:
        errors = self.record.get("reconstruction", {})
        return {
            name: LinkFigures(
                bytes_per_token=link["bytes_per_token"],
                sent_bytes=link["bytes"] + link["header_bytes"] + link["padding_bytes"],
                num_frames=link["tx"],
                error=errors.get(name, {}).get("relative_squared_error"),
            )
            for name, link in self.record["traffic_per_link"].items()
        }

    @property
    def stage_seconds(self) -> dict[int, dict[str, float]]:
        """Seconds by stage and phase (the keys of `PHASES`); 0 for a phase that the record lacks."""
        return {
            int(index): {phase: times.get(key, 0.0) for phase, key in PHASES.items()}
            for index, times in self.record["stages"].items()
        }

    @property
    def hidden_size(self) -> int:
        return self.record["model"]["hidden_size"]

    @property
    def model_name(self) -> str:
        return self.record["args"]["model_name"]

    @property
    def checkpoint(self) -> str:
        return self.record["model"]["checkpoint_fingerprint"]

    @property
    def dataset(self) -> Mapping[str, Any]:
        """`description`, `num_tokens`, `text_sha256` and `ids_sha256`."""
        return self.record["dataset"]

    @property
    def protocol(self) -> Mapping[str, Any]:
        return self.record["protocol"]

    @property
    def layers(self) -> list[tuple[int, int, int]]:
        """By stage: node, and the half-open range [start, end) of its layers."""
        return [(stage["node"], *stage["layers"]) for stage in self.record["plan"]]

    @property
    def backend(self) -> str:
        return self.record["backend"]

    @property
    def hosts(self) -> list[tuple[str, int]]:
        """By rank: host name and threads."""
        return [(rank["host"], rank["threads"]) for rank in self.record["ranks"]]

    @property
    def versions(self) -> Mapping[str, str]:
        return self.record["versions"]

    @property
    def run_id(self) -> str:
        return self.record["run_id"]

    @property
    def digest(self) -> str:
        return self.record["digest"]

    @property
    def finished_at(self) -> str:
        """UTC, to the second."""
        return self.record["finished_at"][:19]

    @property
    def notes(self) -> Sequence[str]:
        return self.record["notes"]

    def _us_per_crossing(self, *phases: str) -> float | None:
        """Microseconds of all stages, per token and link that it crossed."""
        crossings = self.record["timed_tokens"] * len(self.record["traffic_per_link"])
        seconds = sum(times[phase] for times in self.stage_seconds.values() for phase in phases)
        return 1e6 * seconds / crossings if crossings else None


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
        return self.points[0].hidden_size

    @property
    def prefix(self) -> str:
        """In front of a point's label, what tells points of several settings apart."""
        return f"[{self.name}] " if self.name else ""

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
    generated: tuple[GeneratedRun, ...] = ()

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
    records: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    failed: list[FailedPoint] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    generated: list[GeneratedRun] = field(default_factory=list)


def load_records(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Records in `paths` (files, or folders of them), oldest first. What is no record is named on standard
    error.
    """
    return [record for _, record in load_files(paths)]


def load_generated(paths: Sequence[Path]) -> list[GeneratedRun]:
    """Runs that generated, in `paths`."""
    return _read_files(paths).generated


def load_files(paths: Sequence[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """`load_records` with the records' paths."""
    files = _read_files(paths)
    for failed in files.failed:
        print(f"failed point: {failed.label}: {failed.error}", file=sys.stderr)
    for text in files.skipped:
        print(f"skipped: {text}", file=sys.stderr)
    return files.records


def read_results(paths: Sequence[Path]) -> Results:
    """Everything in `paths` (files, or folders of them)."""
    files = _read_files(paths)
    groups: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path, record in files.records:
        groups.setdefault(setting_key(record), []).append((path, record))
    settings = []
    for members in groups.values():
        baseline = next((member for member in members if is_uncompressed(member[1])), None)
        points = tuple(_points(members, baseline))
        name = str(len(settings) + 1) if len(groups) > 1 else ""
        settings.append(Setting(name=name, title=_title(points[0].record), points=points))
    return Results(
        settings=tuple(settings),
        failed=tuple(files.failed),
        skipped=tuple(files.skipped),
        generated=tuple(files.generated),
    )


def summary_points(records: Sequence[dict[str, Any]]) -> list[tuple[MeasuredPoint, str]]:
    """For a console: points in the order of `records`, compared with the first uncompressed one of their setting by
    perplexity alone, since no per-token file is opened; so they have no quality, and no costs either.

    The text beside a point says tokens and windows where the points are of several settings, else nothing.
    """
    keys = [setting_key(record) for record in records]
    baselines: dict[str, dict[str, Any]] = {}
    for key, record in zip(keys, records, strict=True):
        if is_uncompressed(record):
            baselines.setdefault(key, record)
    points = []
    for key, record, label in zip(keys, records, codec_labels(records), strict=True):
        baseline = baselines.get(key)
        point = MeasuredPoint(
            record=record,
            label=label,
            quality=None,
            quality_note="",
            unread=False,
            elsewhere=_elsewhere(record, baseline),
            costs=None,
            ppl_change=_change(record, baseline) if baseline else None,
        )
        setting = f"{record['dataset']['num_tokens']} tokens, {_protocol_text(record)}" if len(set(keys)) > 1 else ""
        points.append((point, setting))
    return points


def setting_key(record: Mapping[str, Any]) -> str:
    """Equal for records whose perplexities may be compared: same model and precision, text and protocol."""
    weights = {key: record["args"][key] for key in ("dtype", "load_in_8bit", "load_in_4bit")}
    weights["threshold"] = _threshold(record)
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
        if p.quality and p.quality.ppl_ratio <= limit and p.causal and p.bytes_per_token is not None
    ]  # fmt: skip
    certain = [p for p in fit if p.uncompressed or (p.quality.ppl_interval and p.quality.ppl_interval[1] <= limit)]
    cheapest = [min(points, key=lambda p: p.bytes_per_token, default=None) for points in (fit, certain)]
    return Recommendation(cheapest=cheapest[0], certain=cheapest[1])


def _read_files(paths: Sequence[Path]) -> _Files:
    files = _Files()
    for path in paths:
        try:
            inside = sorted(p for p in path.iterdir() if p.suffix == ".json") if path.is_dir() else [path]
        except OSError as e:
            files.skipped.append(f"{path} cannot be listed: {disk_problem(e)}")
            continue
        for file in inside:
            try:
                failure = read_failure(file)
                generated = None if failure else read_kind(file, KIND)
                if generated is not None:
                    files.generated.append(read_generation(file, generated))
                elif failure:
                    label, error = (str(failure.get(key, "")) for key in ("label", "error"))
                    files.failed.append(FailedPoint(label=label or file.stem, error=error))
                else:
                    files.records.append((file, read_whole_record(file)))
            except RecordError as e:
                files.skipped.append(str(e))
            except Exception as e:  # nothing that stands in one file may keep the others from the report
                files.skipped.append(f"{file} cannot be read: {type(e).__name__}: {e}")
    files.records.sort(key=lambda item: item[1]["finished_at"])
    return files


def read_whole_record(path: Path) -> dict[str, Any]:
    """A record of which everything can be shown. Raises RecordError."""
    record = read_record(path)
    try:
        problem = schema_problem(record)
        if problem is None:
            codec_label(record), setting_key(record), _title(record), _costs(record)
    except Exception as e:  # parts that users name: codec specs, links
        problem = f"{type(e).__name__}: {e}"
    if problem is not None:
        raise RecordError(f"{path} is not a complete run record: {problem}")
    return record


def _points(
    members: Sequence[tuple[Path, dict[str, Any]]], baseline: tuple[Path, dict[str, Any]] | None
) -> Iterator[MeasuredPoint]:
    """The points of one setting, compared with its baseline token by token."""
    uncompressed, problem = None, "no uncompressed point of the same model, text and protocol"
    if baseline is not None:
        try:
            uncompressed = read_own_per_token(*baseline)
        except RecordError as e:
            problem = f"of the uncompressed point: {e}"
    for path, record in members:
        quality, note = None, problem
        if uncompressed is not None:
            try:
                own = uncompressed if path == baseline[0] else read_own_per_token(path, record)
                quality, note = compare(uncompressed, own), ""
            except ValueError as e:  # RecordError too
                note = str(e)
        yield MeasuredPoint(
            record=record,
            label=codec_label(record),
            quality=quality,
            quality_note=note,
            elsewhere=_elsewhere(record, baseline[1] if baseline else None),
            unread=quality is None and baseline is not None,
            costs=_costs(record),
            ppl_change=quality.ppl_ratio - 1 if quality else None,
        )


def _change(record: Mapping[str, Any], baseline: Mapping[str, Any]) -> float:
    """Of the perplexity; NaN where one is not finite."""
    ppl, baseline_ppl = record["results"]["avg_ppl"], baseline["results"]["avg_ppl"]
    return math.nan if ppl is None or baseline_ppl is None else ppl / baseline_ppl - 1


def _elsewhere(record: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> str:
    own, other = record.get("environment"), baseline and baseline.get("environment")
    return environment_changes(other, own) if own and other else ""


def _costs(record: Mapping[str, Any]) -> PipelineCosts | None:
    return PipelineCosts.of(record) if record["traffic_per_link"] and record["timed_tokens"] else None


def read_own_per_token(path: Path, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The per-token file beside a record, if it is the record's. Raises RecordError."""
    per_token = read_per_token(path)
    file, results = path.with_suffix(".safetensors"), record["results"]
    if len(per_token["loss"]) != results["total_loss_tokens"]:
        raise RecordError(f"{file} has {len(per_token['loss'])} tokens, its record {results['total_loss_tokens']}")
    mean = float(per_token["loss"].mean(dtype=np.float64)) if len(per_token["loss"]) else math.nan
    if results["avg_ppl"] is not None and not abs(mean - math.log(results["avg_ppl"])) < 1e-6 * max(1.0, abs(mean)):
        raise RecordError(
            f"{file} is another run's: its mean loss is {mean:.6g}, its record's perplexity {results['avg_ppl']:.6g}"
        )
    return per_token


def _protocol_text(record: Mapping[str, Any]) -> str:
    protocol = record["protocol"]
    return f"windows {protocol['max_length']}/{protocol['stride']}"


def _threshold(record: Mapping[str, Any]) -> float:
    """Of 8-bit weights' outliers."""
    model = record["args"]["config"].get("model", {})
    return model.get("load_in_8bit_threshold", ModelConfig.load_in_8bit_threshold)


def _title(record: Mapping[str, Any]) -> str:
    dataset, args = record["dataset"], record["args"]
    weights = " 8-bit weights" if args["load_in_8bit"] else " 4-bit weights" if args["load_in_4bit"] else ""
    if _threshold(record) != ModelConfig.load_in_8bit_threshold:
        weights += f" (threshold {_threshold(record):g})"
    return (
        f"{model_label(args['model_name'])} {args['dtype']}{weights}, {dataset['num_tokens']:,} tokens of "
        f"{dataset['description']}, {_protocol_text(record)}"
    )
