"""Reports from run records; nothing else is read.

python -m pipeline.report results/demo                  # a table on the console
python -m pipeline.report results/demo -o report.html   # a page; report.md and report.csv beside it
"""

from __future__ import annotations

import argparse
import math
import os
import sys

from compressors.console import run_command
from pipeline.config.options import OptionParser, path_option
from pipeline.report.recommendation import Outlook
from pipeline.report.results import load_records
from pipeline.report.summary import print_summary, write_report


def _share(text: str) -> float:
    """`1%` or `0.01`."""
    value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(text)
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(text)
    return value


_share.__name__, _positive.__name__ = "share (1% or 0.01)", "number above 0"  # argparse's messages use them


def make_parser() -> argparse.ArgumentParser:
    defaults = Outlook()
    parser = OptionParser(prog="python -m pipeline.report", description="Tables and a page from run records.")
    parser.add_argument("paths", nargs="+", type=path_option, help="records, or folders of them")
    parser.add_argument(
        "-o", "--output", type=path_option, metavar="HTML", help="write a page, with .md and .csv beside it"
    )
    parser.add_argument("--png", type=path_option, help="also draw perplexity against bytes per token")
    parser.add_argument("--mbits", nargs="+", type=_positive, metavar="MBIT/S", default=defaults.bandwidths_mbits)
    parser.add_argument("--rtt-ms", nargs="+", type=_positive, metavar="MS", default=defaults.rtts_ms)
    parser.add_argument(
        "--max-ppl-increase",
        type=_share,
        default=defaults.max_ppl_increase,
        help="recommend the cheapest codec within this (default 1%%)",
    )
    return parser


def main() -> int:
    parser = make_parser()
    arguments = parser.parse_args()
    missing = [str(path) for path in arguments.paths if not os.path.lexists(path)]
    if missing:
        parser.error(f"no such file or folder: {', '.join(missing)}")
    outlook = Outlook(
        bandwidths_mbits=tuple(arguments.mbits),
        rtts_ms=tuple(arguments.rtt_ms),
        max_ppl_increase=arguments.max_ppl_increase,
    )
    print_summary(arguments.paths)
    try:
        if arguments.output:
            write_report(arguments.paths, arguments.output, outlook)
        if arguments.png:
            from pipeline.report.plots import plot_rate_quality

            plot_rate_quality(load_records(arguments.paths), arguments.png)
            print(f"figure: {arguments.png}")
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
