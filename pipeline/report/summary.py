"""The table of records that a console shows, and the files of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.records.files import RecordError, disk_problem, write_whole
from pipeline.records.labels import codec_labels
from pipeline.records.run_record import RunRecord
from pipeline.report.generation import HEADINGS
from pipeline.report.html_page import html_page
from pipeline.report.recommendation import Outlook, recommendation_text
from pipeline.report.results import is_uncompressed, load_generated, load_records, read_results, setting_key
from pipeline.report.text_page import csv_table, markdown_page

__all__ = ["load_records", "print_summary", "summary_rows", "write_report"]

_COLUMNS = (
    "codec",
    "perplexity",
    "change",
    "bytes/token/link",
    "bits/value",
    "encode us/token",
    "decode us/token",
    "tokens/s",
    "note",
)


def summary_rows(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """One row of text per record.

    `change` is against the first uncompressed record of the same model, text and protocol. Encode (importance
    included) and decode times are means over links, per token that crosses; tokens per second count what the model
    processed.
    """
    baselines: dict[str, float | None] = {}
    for record in records:
        if is_uncompressed(record):
            baselines.setdefault(setting_key(record), record.results.avg_ppl)
    one_setting = len({setting_key(record) for record in records}) == 1
    rows = []
    for record, label in zip(records, codec_labels(records), strict=True):
        totals, stages = record.traffic_totals, record.stages.values()
        ppl, baseline = record.results.avg_ppl, baselines.get(setting_key(record))
        crossings = (record.timed_tokens or 0) * len(record.traffic_per_link)
        rows.append(
            {
                "codec": _printable(label),
                "perplexity": "not finite" if ppl is None else f"{ppl:.4f}" if ppl < 1e5 else f"{ppl:.3g}",
                "change": "" if baseline is None or ppl is None else _change(ppl / baseline),
                "bytes/token/link": _number(totals.bytes_per_token, ".1f"),
                "bits/value": _number(totals.bits_per_value, ".3f"),
                "encode us/token": _per_token(sum(s.compress_s + s.importance_s for s in stages), crossings),
                "decode us/token": _per_token(sum(s.decompress_s for s in stages), crossings),
                "tokens/s": _number(record.tokens_per_s, ".0f"),
                "note": ", ".join(filter(None, _notes(record, one_setting))),
            }
        )
    return rows


def _notes(record: RunRecord, one_setting: bool) -> list[str]:
    """What the other columns do not tell: what the row was run on where rows differ in that, and non-causality."""
    protocol = record.protocol
    setting = f"{record.dataset.num_tokens} tokens, windows {protocol.max_length}/{protocol.stride}"
    return ["" if one_setting else setting, "" if record.causal else "not causal"]


def print_summary(paths: Sequence[Path]) -> None:
    """Print the table of `paths` and where the records lie. What is no record is named on standard error."""
    generated = load_generated(paths)
    rows = summary_rows(load_records(paths))
    if rows or not generated:
        _print_table(_COLUMNS, [[row[c] for c in _COLUMNS] for row in rows])
    if generated:
        _print_table(HEADINGS, [list(map(_printable, run.cells)) for run in generated])
    places = paths if len(paths) == 1 else dict.fromkeys(path if path.is_dir() else path.parent for path in paths)
    for place in places:
        print(_printable(f"record{'s in' if place.is_dir() else ''}: {place}"))


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for line in (headings, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_report(paths: Sequence[Path], page: Path, outlook: Outlook) -> None:
    """Write `page` (HTML), and Markdown and CSV of the same name beside it. Raises RecordError."""
    results = read_results(paths)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise RecordError(f"the folder {page.parent} cannot be made: {disk_problem(e)}, or name another") from e
    for path, text in (
        (page, html_page(results, outlook)),
        (page.with_suffix(".md"), markdown_page(results, outlook)),
        (page.with_suffix(".csv"), csv_table(results)),
    ):
        try:
            # Names of files may have bytes that are no UTF-8.
            write_whole(path, text.encode(errors="backslashreplace"))
        except OSError as e:
            raise RecordError(f"the report {path} cannot be written: {disk_problem(e)}, or name another file") from e
        print(f"report: {path}")
    for setting in results.settings:
        print(f"{setting.title}: {recommendation_text(setting, outlook)}")


def _change(ratio: float) -> str:
    return f"{ratio - 1:+.2%}" if ratio < 10 else f"x {ratio:.3g}"


def _per_token(seconds: float, num_tokens: int) -> str:
    return f"{1e6 * seconds / num_tokens:.2f}" if num_tokens else "-"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _printable(text: str) -> str:
    """Without what would move a terminal's cursor or break a line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
