"""The report as Markdown and as CSV, with the page's columns; CSV has raw values."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from pipeline.report import generation_columns, point_columns
from pipeline.report.columns import Column, Row, Value, shown, significant
from pipeline.report.generation import drafter_table
from pipeline.report.printable import escape_controls
from pipeline.report.recommendation import Outlook, predict, predicted_figure, verdict_text
from pipeline.report.results import Results, Setting
from pipeline.report.tasks import CSV_HEADINGS, task_scores, tasks_tables

__all__ = ["csv_table", "generation_csv", "markdown_page", "tasks_csv"]


def markdown_page(results: Results, outlook: Outlook) -> str:
    """Per setting: recommendation, points, predictions; then tasks, what generated, and what failed or was skipped."""
    parts = ["# Thinwire report"]
    for setting in results.settings:
        parts += _setting(results, setting, outlook)
    for table in tasks_tables(results.tasks):
        parts += [f"## Tasks: {_escape(table.title)}", _table(table.headings, table.rows)]
    if results.tasks:
        parts.append("In brackets: the change to the uncompressed run, sample by sample; ± is a standard error.")
    if results.generated:
        parts += ["## Generation, measured", _column_table(generation_columns.SHOWN_COLUMNS, results.generated)]
        headings, rows = drafter_table(results.generated)
        if rows:
            parts += ["Drafts that were right, of those judged, by depth:", _table(headings, rows)]
        parts += _list({note for run in results.generated for note in run.notes})
    problems = [
        f"{p.label} ran on something else than the uncompressed point, which may change its losses: {p.elsewhere}"
        for p in results.points
        if p.elsewhere
    ]
    problems += [f"failed: {failed.label}: {failed.error}" for failed in results.failed]
    problems += [f"skipped: {text}" for text in results.skipped]
    if problems:
        parts.append("\n".join(f"- {_escape(problem)}" for problem in problems))
    return "\n\n".join(parts) + "\n"


def csv_table(results: Results) -> str:
    """One line per point, raw values; empty where a figure is missing."""
    columns = point_columns.COLUMNS
    lines = [[setting.title, *(column.value(point) for column in columns)] for setting, point in results.members]
    return _csv(["setting", *(column.key for column in columns)], lines)


def tasks_csv(results: Results) -> str:
    """One line per run, task and metric, raw values; empty where a figure is missing."""
    return _csv(CSV_HEADINGS, [score.values for score in task_scores(results.tasks)])


def generation_csv(results: Results) -> str:
    """One line per run that generated, likewise."""
    columns = generation_columns.COLUMNS
    lines = [[column.value(run) for column in columns] for run in results.generated]
    return _csv([column.key for column in columns], lines)


def _csv(keys: Sequence[str], lines: Iterable[Sequence[Value]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([keys, *lines])
    return out.getvalue()


def _setting(results: Results, setting: Setting, outlook: Outlook) -> list[str]:
    parts = [
        f"## {_escape(setting.title)}",
        _escape(verdict_text(results, setting, outlook)),
        _column_table(point_columns.SHOWN_COLUMNS, setting.points),
    ]
    if unread := {f"{point.label}: {point.quality_note}" for point in setting.points if point.unread}:
        parts += ["Without quality figures:", *_list(unread)]
    costs = [point.costs for point in setting.points if point.costs]
    if costs:
        parts += ["Predicted prefill, tokens/s (what binds):", _predictions(setting, outlook, decode=False)]
    if any(cost.one_token for cost in costs):
        parts += [
            "Predicted decode of one sequence, ms/token (mostly), from one-token forwards over a short cache:",
            _predictions(setting, outlook, decode=True),
        ]
    return parts


def _predictions(setting: Setting, outlook: Outlook, *, decode: bool) -> str:
    rows = []
    for point in setting.points:
        if point.costs is None:
            continue
        cells = [point.label]
        for _, network in outlook.networks:
            prediction = predict(point, network, decode=decode)
            binds = f" ({prediction.binds})" if prediction else ""
            cells.append(significant(predicted_figure(prediction, decode=decode)) + binds)
        rows.append(cells)
    return _table(["codec", *(name for name, _ in outlook.networks)], rows)


def _column_table(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> str:
    those = shown(columns, rows)
    return _table([column.heading for column in those], [[column.text(row) for column in those] for row in rows])


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)


def _list(texts: set[str]) -> list[str]:
    """As one part of the page, or none."""
    return ["\n".join(f"- {_escape(text)}" for text in sorted(texts))] if texts else []


def _escape(text: str) -> str:
    """Text that stays in its cell, is no markup and moves no terminal's cursor."""
    shown = escape_controls(" ".join(text.split()))
    for char in "\\`*_[]|~":
        shown = shown.replace(char, "\\" + char)
    return shown.replace("&", "&amp;").replace("<", "&lt;")
