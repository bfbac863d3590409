"""What codecs cost on texts of several kinds, and by how much that differs from the first kind.

    python -m benchmarks.texts_by_kind --wikitext wiki.test.raw --out build/kinds    # or files of your own
    python -m benchmarks.kinds_of_text --kind wikitext=build/kinds/wikitext.txt --kind python=build/kinds/python.txt \\
        --codec nf4 --codec "klt(calibration=calib/, step=0.7)" --out build/kinds_result

Each text goes through the demo's model as a sweep of `run_pipeline` in one process, `none` first. Per kind and codec:
bits a value (payloads that were sent, links together), the change of perplexity against `none` on the same tokens, and
both divided by the first kind's. A table and a JSON with all of it are written. Points whose records are there already
are not run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compressors.console import run_command
from pipeline.config.options import OptionParser, path_option
from pipeline.config.schema import DEMO_MODEL
from pipeline.records.environment import software_versions
from pipeline.records.files import write_json
from pipeline.records.run_record import RunRecord
from pipeline.report.results import load_records


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", type=_named, action="append", required=True, metavar="NAME=FILE", dest="kinds")
    parser.add_argument("--codec", action="append", required=True, metavar="CODEC", dest="codecs")
    parser.add_argument("--tokens", type=int, default=5120, help="of each kind")
    parser.add_argument("--window", type=int, default=1024, help="tokens; windows do not overlap")
    parser.add_argument("--out", type=path_option, required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    codecs = list(dict.fromkeys(["none", *arguments.codecs]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    sweep = arguments.out / "sweep.yaml"
    # JSON is YAML.
    sweep.write_text(json.dumps({"name": "kinds", "points": [{"compressor": codec} for codec in codecs]}))
    rows: list[dict[str, Any]] = []
    for kind, path in arguments.kinds:
        folder = arguments.out / kind
        run(sweep, path, folder, num_tokens=arguments.tokens, window=arguments.window)
        rows += measured(kind, {r.args.config.compressor: r for r in load_records([folder])}, codecs)
        print(f"{kind} done", file=sys.stderr, flush=True)
    add_ratios(rows)
    write_json(
        arguments.out / "kinds_of_text.json",
        {
            "kind": "thinwire kinds of text",
            "model": DEMO_MODEL,
            "window": arguments.window,
            "versions": software_versions(),
            "by_text": rows,
        },
    )
    print(table(rows))
    return 0


def run(sweep: Path, text: Path, folder: Path, *, num_tokens: int, window: int) -> None:
    """The sweep over one text. Raises SystemExit with what it said where a point fails."""
    keys = {"dataset.name": "text", "dataset.path": text, "partition.num_nodes": 4, "runtime.threads": 1}
    command = [sys.executable, "run_pipeline.py", "--config", "demo.yaml", "--sweep", str(sweep)]
    command += ["--exp_dir", str(folder), "--first_k_tokens", str(num_tokens)]
    command += ["--max_length", str(window), "--stride", str(window)]
    command += [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    done = subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{text}: {done.stderr.decode(errors='replace')[-2000:]}")


def measured(kind: str, records: dict[str, RunRecord], codecs: Sequence[str]) -> list[dict[str, Any]]:
    """A row per codec, in their order."""
    rows = []
    for codec in codecs:
        record, uncompressed = records[codec], records["none"]
        assert record.results.avg_ppl is not None and uncompressed.results.avg_ppl is not None
        rows.append(
            {
                "text": kind,
                "codec": codec,
                "text_sha256": record.dataset.text_sha256,
                "tokens": record.results.total_processed_tokens,
                "ppl": record.results.avg_ppl,
                "bits_per_value": record.traffic_totals.bits_per_value,
                "ppl_change": record.results.avg_ppl / uncompressed.results.avg_ppl - 1,
            }
        )
    return rows


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Add both figures divided by those of the first kind."""
    first = {row["codec"]: row for row in rows if row["text"] == rows[0]["text"]}
    for row in rows:
        own = first[row["codec"]]
        row["bits_ratio"] = row["bits_per_value"] / own["bits_per_value"]
        row["change_ratio"] = row["ppl_change"] / own["ppl_change"] if own["ppl_change"] else None


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a row per kind and codec."""
    headings = ("text", "codec", "bits/value", "change", "bits, x first", "change, x first")
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for row in rows:
        ratio = "" if row["change_ratio"] is None else f"{row['change_ratio']:.2f}"
        cells = (
            *(row["text"], f"`{row['codec']}`", f"{row['bits_per_value']:.3f}", f"{row['ppl_change']:+.2%}"),
            *(f"{row['bits_ratio']:.2f}", ratio),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _named(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator or not name:
        raise ArgumentTypeError(f"{text!r}: write it as NAME=FILE")
    return name, path_option(path)


if __name__ == "__main__":
    run_command(main)
