"""Tables from run records; nothing else is read.

    python -m pipeline.report results/demo
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.record import RecordError, codec_label, read_record

__all__ = ["load_records", "print_summary", "summary_rows"]

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


def load_records(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Records in `paths` (files, or folders of them), oldest first. What is no record is named and skipped."""
    files = [f for path in paths for f in (sorted(path.glob("*.json")) if path.is_dir() else [path])]
    records = []
    for file in files:
        try:
            records.append(read_record(file))
        except RecordError as e:
            print(f"skipped: {e}", file=sys.stderr)
    return sorted(records, key=lambda record: record["finished_at"])


def summary_rows(records: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """One row of text per record.

    `change` is against the first record of the same model, text and protocol with codec `none` or no links. Encode
    and decode times are means over links, per token that crosses; tokens per second count what the model processed.
    """
    rows = []
    for record in records:
        totals, stages = record["traffic_totals"], record["stages"].values()
        ppl = record["results"]["avg_ppl"]
        baseline = next(
            (r["results"]["avg_ppl"] for r in records if codec_label(r) in ("none", "unsplit") and _comparable(r, record)),
            None,
        )
        crossings = record["timed_tokens"] * len(record["traffic_per_link"])
        rows.append(
            {
                "codec": codec_label(record),
                "perplexity": "not finite" if ppl is None else f"{ppl:.4f}" if ppl < 1e5 else f"{ppl:.3g}",
                "change": "" if baseline is None or ppl is None else _change(ppl / baseline),
                "bytes/token/link": _number(totals["bytes_per_token"], ".1f"),
                "bits/value": _number(totals["bits_per_value"], ".3f"),
                "encode us/token": _per_token(sum(s["compress_s"] for s in stages), crossings),
                "decode us/token": _per_token(sum(s["decompress_s"] for s in stages), crossings),
                "tokens/s": _number(record["tokens_per_s"], ".0f"),
                "note": "" if record["causal"] else "not causal",
            }
        )
    return rows


def print_summary(paths: Sequence[Path]) -> None:
    """Print the table of `paths` and where the records lie."""
    records = load_records(paths)
    rows = summary_rows(records)
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) if rows else len(c) for c in _COLUMNS}
    print("  ".join(c.ljust(widths[c]) for c in _COLUMNS).rstrip())
    for row in rows:
        print("  ".join(row[c].ljust(widths[c]) for c in _COLUMNS).rstrip())
    for path in paths:
        print(f"record{'s in' if path.is_dir() else ''}: {path}")


def _comparable(a: dict[str, Any], b: dict[str, Any]) -> bool:
    arguments = ("dtype", "load_in_8bit", "load_in_4bit")
    return all(a[key] == b[key] for key in ("model", "dataset", "protocol")) and all(
        a["args"][key] == b["args"][key] for key in arguments
    )


def _change(ratio: float) -> str:
    return f"{ratio - 1:+.2%}" if ratio < 10 else f"x {ratio:.3g}"


def _per_token(seconds: float, num_tokens: int) -> str:
    return f"{1e6 * seconds / num_tokens:.2f}" if num_tokens else "-"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the table of run records.")
    parser.add_argument("paths", nargs="+", type=Path, help="records, or folders of them")
    parser.add_argument("--png", type=Path, help="also draw perplexity against bytes per token")
    arguments = parser.parse_args()
    print_summary(arguments.paths)
    if arguments.png:
        from pipeline.plots import plot_rate_quality

        plot_rate_quality(load_records(arguments.paths), arguments.png)
        print(f"figure: {arguments.png}")


if __name__ == "__main__":
    main()
