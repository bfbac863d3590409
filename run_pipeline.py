"""Entry point: parse, compose, run, record.

torchrun --nproc_per_node=4 run_pipeline.py --config demo.yaml
python run_pipeline.py --config demo.yaml --compressor nf4
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import FLAG_KEYS, ConfigError, RunConfig, find_config, load_config, parse_override
from pipeline.config.sweep_file import Sweep, find_sweep, load_sweep
from pipeline.runtime.launch import on_deployment

if TYPE_CHECKING:
    from pipeline.evaluation.sweep import SweepResult
    from pipeline.runtime.deployment import Deployment

EXIT_POINTS_FAILED = 3


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run a causal LM split over ranks, hidden states compressed, and measure its perplexity.",
        epilog="Every key of a config can be set with --set; see docs/configuration.md.",
    )
    parser.add_argument("--config", metavar="YAML", help="a path, or a name in configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--plan", action="store_true", help="print stages, links, bytes and memory; load nothing")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run from its journal")
    parser.add_argument(
        "--sweep", metavar="YAML", help="run every point of a sweep, a path or a name in configs/sweeps/"
    )
    original = parser.add_argument_group("flags of the original benchmark")
    flags = {
        "model_name": {"metavar": "ID|DIR|FILE"},
        "model_dir": {"metavar": "DIR", "help": "cache of downloads and conversions"},
        "dtype": {"choices": ("fp32", "fp16", "bf16")},
        "compressor": {"help": "a codec, e.g. nf4 or package.module:Class(option=value)"},
        "batch_size": {"type": int, "help": "windows per micro-batch"},
        "first_k_tokens": {"type": int, "help": "0: all"},
        "max_length": {"type": int},
        "stride": {"type": int},
        "exp_dir": {"metavar": "DIR", "help": "where records go"},
        "wandb_project": {},
        "wandb_run_name": {},
    }
    for name in ("load_in_8bit", "load_in_4bit"):
        original.add_argument(f"--{name}", action="store_true", default=None)
    original.add_argument("--wandb", action=argparse.BooleanOptionalAction, default=None)
    for name, options in flags.items():
        original.add_argument(f"--{name}", default=None, **options)
    return parser


def read_config(arguments: argparse.Namespace, sweep: Sweep | None) -> RunConfig:
    """YAML, then the sweep's base, then flags, then --set."""
    overrides = [("measure_error", True), *sweep.base] if sweep else []
    overrides += [
        (key, getattr(arguments, flag)) for flag, key in FLAG_KEYS.items() if getattr(arguments, flag) is not None
    ]
    overrides += [parse_override(text) for text in arguments.overrides]
    return load_config(find_config(arguments.config) if arguments.config else None, overrides)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        sweep = load_sweep(find_sweep(arguments.sweep)) if arguments.sweep else None
        config = read_config(arguments, sweep)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if arguments.plan:
        return show_plan(config)
    if sweep:
        return run_sweep(sweep, config)
    return run(config, resume=arguments.resume)


def show_plan(config: RunConfig) -> int:
    from pipeline.runtime.plan_report import plan_text

    try:
        print(plan_text(config))
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def run(config: RunConfig, *, resume: bool) -> int:
    def evaluate(deployment: Deployment) -> Path | None:
        from pipeline.evaluation.evaluation import Evaluation

        # torchrun --max_restarts repeats the command as it was, and means to go on.
        restarted = deployment.control.world.attempt > 0
        return Evaluation(config, deployment).run(resume=resume or restarted)

    path = on_deployment(config, Path(config.exp_dir), evaluate)
    if path is not None:
        from pipeline.report.summary import print_summary

        print_summary([path])
    return 0


def run_sweep(sweep: Sweep, config: RunConfig) -> int:
    """Returns 3 on rank 0 when points have failed. The other ranks do not: torchrun would end rank 0 in its report."""

    def run_points(deployment: Deployment) -> SweepResult:
        from pipeline.evaluation.sweep import run_points

        return run_points(sweep, config, deployment)

    result = on_deployment(sweep.deployed(config), Path(config.exp_dir), run_points)
    if result.records or result.failures:
        show_sweep(sweep, config, result)
    return EXIT_POINTS_FAILED if result.failures else 0


def show_sweep(sweep: Sweep, config: RunConfig, result: SweepResult) -> None:
    """Final table, list of failed points, and report."""
    from pipeline.evaluation.sweep import write_page
    from pipeline.records.store import read_failure
    from pipeline.report.summary import print_summary

    print_summary(result.records)
    for path in result.failures:
        failure = read_failure(path)
        print(f"failed: {failure['label']}: {failure['error']}", file=sys.stderr)
    if result.num_run and result.records:
        write_page(sweep, config, result)


if __name__ == "__main__":
    sys.exit(main())
