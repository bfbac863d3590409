"""Calibrate the codecs `klt` and `klt_fixed`, or the drafter `shortcut`, for a model and a plan.

    torchrun --nproc_per_node=4 -m pipeline.calibrate --config smollm2_135m.yaml \\
        --set dataset.split=validation --out calib/
    torchrun --nproc_per_node=4 run_pipeline.py --config smollm2_135m.yaml \\
        --compressor "klt(calibration=calib/, target_bits=1.5)"

The codecs have one file per link: calibration text goes through the model over the ranks, in windows of
`dataset.max_length` without overlap, and the loss's gradients come back. On several machines, copy the files to the
same place on all. Half of the tokens (`--mixture`) are not the config's but of texts of many kinds that come with this
project, since a codec that has seen one kind costs more on others. With `--shortcut`, the drafter's file is made
instead, which takes no gradients and no mixture, and which rank 0 alone reads; both may be in one folder. Without
torchrun one process plays all nodes. Use text that you will not score. One that was interrupted goes on when the same
command is given again, but with `--shortcut`.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compressors.console import run_command
from pipeline.config.options import OptionParser, add_config_options, given_keys, path_option, read_config
from pipeline.config.reading import NO_EMULATION, with_overrides
from pipeline.config.schema import ConfigError
from pipeline.runtime.launch import on_deployment

if TYPE_CHECKING:
    from pipeline.partition.plan import Plan
    from pipeline.runtime.deployment import Deployment

__all__ = ["main"]

DEFAULT_TOKENS = 50_000
DEFAULT_MIXTURE = 0.5
UNUSED = {
    "compressor": "calibration looks at the uncompressed model; leave it out",
    "compressor_per_link": "calibration looks at the uncompressed model; leave it out",
    "compressor_decode": "calibration looks at the uncompressed model; leave it out",
    "evaluation": "calibration scores no text; leave it out",
    "exp_dir": "calibration writes to --out; leave it out",
    "generation": "calibration generates nothing; leave it out",
    "links": "calibration emulates no network; leave it out",
    "links_per_link": "calibration emulates no network; leave it out",
    "measure_error": "calibration compresses nothing; leave it out",
    "wandb": "calibration logs nothing to Weights & Biases; leave it out",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=path_option, required=True, metavar="DIR", help="folder of the files")
    parser.add_argument(
        "--no-token-table", action="store_true", help="predict nothing from token ids, which are then not sent"
    )
    parser.add_argument(
        "--mixture",
        type=_share,
        metavar="SHARE",
        help=f"of the tokens that are of other kinds than the config's text (default: {DEFAULT_MIXTURE}; 0: none)",
    )
    parser.add_argument(
        "--shortcut", action="store_true", help="make the map of the drafter shortcut, and not the codecs' files"
    )
    add_config_options(parser, more_names={"first_k_tokens": ["--tokens"]})
    arguments = parser.parse_args(argv)
    if arguments.shortcut and arguments.no_token_table:
        parser.error("--no-token-table is about the codecs' files, which --shortcut does not make; leave one out")
    if arguments.shortcut and arguments.mixture is not None:
        parser.error("--mixture is about the codecs' files; --shortcut takes the config's text alone; leave one out")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        # Any valid stride while max_length is not known; windows that do not overlap follow.
        own = [("dataset.first_k_tokens", DEFAULT_TOKENS), ("compressor", "none"), ("compressor_per_link", {})]
        config = read_config(arguments, own=[*own, *NO_EMULATION, ("dataset.stride", 1)], unused=UNUSED)
        stride = config.dataset.max_length - (config.dataset.bos == "window")
        given = dict(given_keys(arguments)).get("dataset.stride", stride)
        if given != stride:
            raise ConfigError(f"dataset.stride is {given}, but calibration's windows do not overlap; leave it out")
        config = with_overrides(config, [("dataset.stride", stride)])
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2

    def work(deployment: Deployment) -> None:
        from pipeline.analysis.calibration import calibrate
        from pipeline.analysis.mixed_text import mixed_text
        from pipeline.analysis.shortcut_calibration import calibrate_shortcut

        if arguments.shortcut:
            calibrate_shortcut(config, deployment, arguments.out)
            return
        share = DEFAULT_MIXTURE if arguments.mixture is None else arguments.mixture
        deployment = dataclasses.replace(deployment, text=mixed_text(config, deployment, share))
        calibrate(config, deployment, arguments.out, use_token_ids=not arguments.no_token_table)

    def check(plan: Plan, model_config: Any) -> None:
        if not plan.links:
            raise ConfigError(f"partition.num_nodes is {config.partition.num_nodes}: there is no link to calibrate")
        if arguments.shortcut:
            from pipeline.analysis.shortcut_calibration import check_hidden_size
            from pipeline.drafting.shortcut_file import check_plan

            check_plan(plan)
            check_hidden_size(model_config.hidden_size)

    on_deployment(config, arguments.out, work, check)
    return 0


def _share(text: str) -> float:
    """The value of `--mixture` (argparse's `type`)."""
    try:
        share = float(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; give a share of the tokens, such as 0.5") from e
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; give a share from 0 to below 1, such as 0.5")
    return share


if __name__ == "__main__":
    run_command(main)
