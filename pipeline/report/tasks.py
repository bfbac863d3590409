"""Scores of tasks by codec, with standard errors, and what each codec changes, sample by sample.

Runs are compared where model, weights, documents and the harness' settings are the same. A change is the mean over
samples of the differences to the oldest uncompressed run's; its standard error is theirs, since both runs have the same
samples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.records.identity import digest_of
from pipeline.records.labels import (
    chain_names,
    codec_labels,
    emulation_label,
    model_label,
    weights_key,
    weights_label,
)
from pipeline.records.tasks_record import TaskMetric, TaskScores, TasksRecord
from pipeline.report.columns import MISSING, number, significant

__all__ = ["TasksTable", "TaskScore", "task_scores", "tasks_tables"]

CSV_HEADINGS = (
    *("setting", "codec", "bits_per_value", "bytes_per_token", "task", "metric", "filter", "num_samples"),
    *("score", "stderr", "change", "change_stderr", "run_id"),
)


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A metric of a task in one run. Change and its standard error are None where there is nothing to compare with,
    bits and bytes per token (of links, payload) where nothing crossed one.
    """

    setting: str
    codec: str
    bits_per_value: float | None
    bytes_per_token: float | None
    task: str
    metric: str
    filter: str
    num_samples: int
    score: float | None
    stderr: float | None
    change: float | None
    change_stderr: float | None
    run_id: str

    @property
    def values(self) -> list[str | float | int | None]:
        """In the order of `CSV_HEADINGS`."""
        return [getattr(self, name) for name in CSV_HEADINGS]


@dataclass(frozen=True, kw_only=True)
class TasksTable:
    """One setting's scores: a row per run, a column per task and metric."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def task_scores(records: Sequence[TasksRecord]) -> list[TaskScore]:
    """Of all runs, by setting, the oldest runs first."""
    found = []
    for title, members in _by_setting(records).items():
        baseline = next((record for record in members if _is_uncompressed(record)), None)
        for record, label in zip(members, _labels(members), strict=True):
            for task in record.tasks:
                for metric in task.metrics:
                    found.append(_score(title, label, record, task, metric, baseline))
    return found


def tasks_tables(records: Sequence[TasksRecord]) -> list[TasksTable]:
    """By setting. A cell is score ± standard error, and in brackets the change to the uncompressed run ± its own."""
    tables: dict[str, dict[str, dict[str, TaskScore]]] = {}
    for score in task_scores(records):
        tables.setdefault(score.setting, {}).setdefault(score.run_id, {})[_column(score)] = score
    return [_table(title, list(runs.values())) for title, runs in tables.items()]


def paired_change(own: Sequence[float], others: Sequence[float]) -> tuple[float, float | None]:
    """Mean of the samples' differences, and its standard error; None for that of a single sample."""
    differences = [a - b for a, b in zip(own, others, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, None
    return mean, statistics.stdev(differences) / math.sqrt(len(differences))


def _by_setting(records: Sequence[TasksRecord]) -> dict[str, list[TasksRecord]]:
    groups: dict[str, list[TasksRecord]] = {}
    for record in sorted(records, key=lambda record: record.finished_at):
        groups.setdefault(_setting_key(record), []).append(record)
    titles = [_title(members[0]) for members in groups.values()]
    numbered = [f"[{place}] {title}" if len(titles) > 1 else title for place, title in enumerate(titles, 1)]
    return dict(zip(numbered, groups.values(), strict=True))


def _setting_key(record: TasksRecord) -> str:
    """Equal for runs whose scores may be compared, but for documents, which are compared task by task."""
    args, harness = record.args, record.harness
    asked = [harness.num_fewshot, harness.apply_chat_template, harness.max_length, harness.version]
    generation = (args.config.model_extra or {}).get("generation", {})
    sampling = [generation.get(key) for key in ("top_k", "top_p", "min_p", "repetition_penalty", "seed")]
    return digest_of([weights_key(record), *asked, *sampling])


def _title(record: TasksRecord) -> str:
    harness = record.harness
    shots = "" if harness.num_fewshot is None else f", {harness.num_fewshot} examples"
    template = ", chat template" if harness.apply_chat_template else ""
    model = f"{model_label(record.args.model_name)} {weights_label(record)}"
    return f"{model}, lm_eval {harness.version}{shots}{template}"


def _labels(members: Sequence[TasksRecord]) -> list[str]:
    codecs = codec_labels(members)
    emulated = [emulation_label(record.emulation, chain_names(record)) for record in members]
    return [f"{codec} {network}".rstrip() for codec, network in zip(codecs, emulated, strict=True)]


def _is_uncompressed(record: TasksRecord) -> bool:
    codecs = [*record.codecs.values(), *record.codecs_decode.values()]
    return all(codec.name == "none" for codec in codecs)


def _score(
    title: str, label: str, record: TasksRecord, task: TaskScores, metric: TaskMetric, baseline: TasksRecord | None
) -> TaskScore:
    links = record.traffic_per_link.values()
    num_tokens, nbytes = sum(link.tokens for link in links), sum(link.payload_bytes for link in links)
    change, change_stderr = _change(task, metric, record, baseline)
    return TaskScore(
        setting=title,
        codec=label,
        bits_per_value=8 * nbytes / (num_tokens * record.model.hidden_size) if num_tokens else None,
        bytes_per_token=nbytes / num_tokens if num_tokens else None,
        task=task.name,
        metric=metric.name,
        filter=metric.filter,
        num_samples=task.num_samples,
        score=metric.value,
        stderr=metric.stderr,
        change=change,
        change_stderr=change_stderr,
        run_id=record.run_id,
    )


def _change(
    task: TaskScores, metric: TaskMetric, record: TasksRecord, baseline: TasksRecord | None
) -> tuple[float | None, float | None]:
    if baseline is None or record is baseline or metric.samples is None:
        return None, None
    for other in baseline.tasks:
        if (other.name, other.version, other.docs_sha256) == (task.name, task.version, task.docs_sha256):
            for same in other.metrics:
                if (same.name, same.filter) == (metric.name, metric.filter) and same.samples is not None:
                    return paired_change(metric.samples, same.samples)
    return None, None


def _column(score: TaskScore) -> str:
    chosen = "" if score.filter == "none" else f" ({score.filter})"
    return f"{score.task} {score.metric}{chosen}"


def _table(title: str, runs: Sequence[dict[str, TaskScore]]) -> TasksTable:
    columns = list(dict.fromkeys(column for run in runs for column in run))
    rows = []
    for run in runs:
        first = next(iter(run.values()))
        cells = [_cell(run[column]) if column in run else MISSING for column in columns]
        rows.append([first.codec, number(".3f")(first.bits_per_value), *cells])
    return TasksTable(title=title, headings=["codec", "bits/value", *columns], rows=rows)


def _cell(score: TaskScore) -> str:
    own = significant(score.score) + ("" if score.stderr is None else f" ± {significant(score.stderr, 2)}")
    if score.change is None:
        return own
    error = "" if score.change_stderr is None else f" ± {significant(score.change_stderr, 2)}"
    return f"{own} ({score.change:+.3g}{error})"
