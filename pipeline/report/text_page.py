"""The report as Markdown and as CSV, with the page's columns; CSV has raw values."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from pipeline.report.generation import HEADINGS
from pipeline.report.point_columns import COLUMNS, SHOWN_COLUMNS, significant
from pipeline.report.prediction import predict_decode, predict_prefill
from pipeline.report.recommendation import Outlook, recommendation_text
from pipeline.report.results import Results, Setting

__all__ = ["csv_table", "markdown_page"]


def markdown_page(results: Results, outlook: Outlook) -> str:
    """Per setting: recommendation, points, predictions; then what failed or was skipped."""
    parts = ["# Thinwire report"]
    for setting in results.settings:
        parts += [
            f"## {_escape(setting.title)}",
            _escape(recommendation_text(setting, outlook)),
            _points(setting),
        ]
        if unread := sorted({f"- {_escape(p.label)}: {_escape(p.quality_note)}" for p in setting.points if p.unread}):
            parts += ["Without quality figures:", "\n".join(unread)]
        if any(point.costs for point in setting.points):
            parts += [
                "Predicted prefill, tokens/s (what binds):",
                _predictions(setting, outlook, decode=False),
            ]
        if any(point.costs and point.costs.one_token for point in setting.points):
            parts += [
                "Predicted decode of one sequence, ms/token (mostly), from one-token forwards over a short cache:",
                _predictions(setting, outlook, decode=True),
            ]
    if results.generated:
        parts += ["## Generation, measured", _table(HEADINGS, [run.cells for run in results.generated])]
        if notes := sorted({f"- {_escape(note)}" for run in results.generated for note in run.notes}):
            parts.append("\n".join(notes))
    problems = [
        f"{_escape(p.label)} ran on something else than the uncompressed point, which may change its losses: "
        f"{_escape(p.elsewhere)}"
        for p in results.points
        if p.elsewhere
    ]
    problems += [f"failed: {_escape(f.label)}: {_escape(f.error)}" for f in results.failed]
    problems += [f"skipped: {_escape(text)}" for text in results.skipped]
    if problems:
        parts.append("\n".join(f"- {problem}" for problem in problems))
    return "\n\n".join(parts) + "\n"


def csv_table(results: Results) -> str:
    """One line per point, raw values; empty where a figure is missing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["setting", *(column.key for column in COLUMNS), "run_id", "digest"])
    for setting in results.settings:
        for point in setting.points:
            values = [column.value(point) for column in COLUMNS]
            writer.writerow([setting.title, *values, point.record.run_id, point.record.digest])
    return out.getvalue()


def _points(setting: Setting) -> str:
    rows = [[column.text(point) for column in SHOWN_COLUMNS] for point in setting.points]
    return _table([column.heading for column in SHOWN_COLUMNS], rows)


def _predictions(setting: Setting, outlook: Outlook, *, decode: bool) -> str:
    rows = []
    for point in filter(lambda p: p.costs, setting.points):
        cells = [point.label]
        for _, network in outlook.networks:
            if decode:
                latency = predict_decode(point.costs, network)
                cells.append(f"{significant(1e3 * latency.total_s)} ({latency.binds})" if latency else "–")
            else:
                rate = predict_prefill(point.costs, network)
                cells.append(f"{significant(rate.tokens_per_s)} ({rate.binds})")
        rows.append(cells)
    return _table(["codec", *(name for name, _ in outlook.networks)], rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] + ["---:"] * (len(headings) - 1), *rows]
    return "\n".join("| " + " | ".join(_escape(cell) for cell in line) + " |" for line in lines)


def _escape(text: str) -> str:
    """Text that stays in its cell and is no markup."""
    for char in "\\`*_[]|":
        text = text.replace(char, "\\" + char)
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
