"""Entry point: parse, compose, run, record.

    torchrun --nproc_per_node=4 run_pipeline.py --config demo.yaml
    python run_pipeline.py --config demo.yaml --compressor nf4
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import FLAG_KEYS, ConfigError, RunConfig, find_config, load_config, parse_override
from pipeline.watchdog import Watchdog
from pipeline.world import World


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Run a causal LM split over ranks, hidden states compressed, and measure its perplexity.",
        epilog="Every key of a config can be set with --set; see docs/configuration.md.",
    )
    parser.add_argument("--config", metavar="YAML", help="a path, or a name in configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--plan", action="store_true", help="print stages, links, bytes and memory; load nothing")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run from its journal")
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


def read_config(arguments: argparse.Namespace) -> RunConfig:
    """YAML, then flags, then --set."""
    overrides = [
        (key, getattr(arguments, flag)) for flag, key in FLAG_KEYS.items() if getattr(arguments, flag) is not None
    ]
    overrides += [parse_override(text) for text in arguments.overrides]
    return load_config(find_config(arguments.config) if arguments.config else None, overrides)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        config = read_config(arguments)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    if arguments.plan:
        return show_plan(config)
    return run(config, resume=arguments.resume)


def show_plan(config: RunConfig) -> int:
    from pipeline.plan_report import plan_text

    try:
        print(plan_text(config))
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def run(config: RunConfig, *, resume: bool) -> int:
    try:
        world = World.from_environment()
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    watchdog = Watchdog(world, config.runtime.timeout_s)
    try:
        path = evaluate(config, world, watchdog, resume=resume)
    except (Exception, KeyboardInterrupt) as e:
        watchdog.abort(e)
    if path is not None:
        from pipeline.report import print_summary

        print_summary([path])
    return 0


def evaluate(config: RunConfig, world: World, watchdog: Watchdog, *, resume: bool) -> Path | None:
    """Path of the record on rank 0, None elsewhere."""
    # Torch's C++ stacks for a lost connection would bury the message that names the lost rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from pipeline.distributed import Control

    # Joined before the imports of seconds: from here on, what goes wrong on one rank is known to all.
    runtime = config.runtime
    control = Control(
        world,
        timeout_s=runtime.timeout_s,
        load_timeout_s=runtime.load_timeout_s,
        interface=runtime.interface,
        watchdog=watchdog,
    )
    from pipeline.allocator import keep_freed_memory, return_freed_memory
    from pipeline.deployment import deploy
    from pipeline.evaluation import Evaluation
    from pipeline.record import check_writable

    if world.rank == 0:
        check_writable(Path(config.exp_dir))
    return_freed_memory()
    deployment = deploy(config, control)
    keep_freed_memory()
    # torchrun --max_restarts repeats the command as it was, and means to go on.
    path = Evaluation(config, deployment).run(resume=resume or world.attempt > 0)
    control.close()
    return path


if __name__ == "__main__":
    sys.exit(main())
