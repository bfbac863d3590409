"""The table of records that a console shows, and the files of a report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.records.files import RecordError, disk_problem, write_whole
from pipeline.records.run_record import RunRecord
from pipeline.report import generation_columns
from pipeline.report.columns import shown
from pipeline.report.printable import printable
from pipeline.report.html_page import html_page
from pipeline.report.point_columns import CONSOLE_COLUMNS
from pipeline.report.recommendation import Outlook, verdict_text
from pipeline.report.results import load_generated, load_records, load_tasks, read_results, summary_points
from pipeline.report.tasks import tasks_tables
from pipeline.report.text_page import csv_table, generation_csv, markdown_page, tasks_csv

__all__ = ["load_records", "print_summary", "summary_rows", "write_report"]


def summary_rows(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """One row of text per record, by the columns' keys.

    The change of perplexity is against the first uncompressed record of the same model, text and protocol. Where
    records differ in these, the note begins with tokens and windows.
    """
    rows, points = [], summary_points(records)
    columns = shown(CONSOLE_COLUMNS, [point for point, _ in points])
    for point, setting in points:
        row = {column.key: column.text(point) for column in columns}
        rows.append(row | {"note": ", ".join(filter(None, (setting, row["note"])))})
    return rows


def print_summary(paths: Sequence[Path]) -> None:
    """Print the table of `paths` and where the records lie. What is no record is named on standard error."""
    generated, tasks = load_generated(paths), load_tasks(paths)
    rows = summary_rows(load_records(paths))
    if rows or not (generated or tasks):
        headings = {column.key: column.heading for column in CONSOLE_COLUMNS}
        keys = rows[0] if rows else [column.key for column in CONSOLE_COLUMNS if not column.if_any]
        _print_table([headings[key] for key in keys], [list(row.values()) for row in rows])
    if generated:
        columns = shown(generation_columns.SHOWN_COLUMNS, generated)
        _print_table([c.heading for c in columns], [[c.text(run) for c in columns] for run in generated])
    for table in tasks_tables(tasks):
        print(printable(table.title, sys.stdout))
        _print_table(table.headings, table.rows)
    places = paths if len(paths) == 1 else dict.fromkeys(path if path.is_dir() else path.parent for path in paths)
    for place in places:
        print(printable(f"record{'s in' if place.is_dir() else ''}: {place}", sys.stdout))


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    lines = [[printable(cell, sys.stdout) for cell in line] for line in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_report(paths: Sequence[Path], page: Path, outlook: Outlook) -> None:
    """Write `page` (HTML), and Markdown and CSV of the same name beside it. Raises RecordError.

    Runs that generated have a CSV of their own, `.generation.csv`, as have runs of tasks, `.tasks.csv`.
    """
    if page.suffix not in (".html", ".htm"):  # .md and .csv would overwrite the page, .json a record
        raise RecordError(f"the page {str(page)!r} must end in .html; Markdown and CSV are written beside it")
    results = read_results(paths)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RecordError(f"the folder {page.parent} cannot be made: {disk_problem(e)}, or name another") from e
    files = {
        page: html_page(results, outlook),
        page.with_suffix(".md"): markdown_page(results, outlook),
        page.with_suffix(".csv"): csv_table(results),
    }
    if results.generated:
        files[page.with_suffix(".generation.csv")] = generation_csv(results)
    if results.tasks:
        files[page.with_suffix(".tasks.csv")] = tasks_csv(results)
    for path, text in files.items():
        try:
            # Names of files may have bytes that are no UTF-8.
            write_whole(path, text.encode(errors="backslashreplace"))
        except OSError as e:
            raise RecordError(f"the report {path} cannot be written: {disk_problem(e)}, or name another file") from e
        print(printable(f"report: {path}", sys.stdout))
    for setting in results.settings:
        print(printable(f"{setting.title}: {verdict_text(results, setting, outlook)}", sys.stdout))
