"""Calibrate the codecs `klt` and `klt_fixed` for a model and a plan: one file per link.

    torchrun --nproc_per_node=4 -m pipeline.calibrate --config smollm2_135m.yaml \\
        --set dataset.split=validation --out calib/
    torchrun --nproc_per_node=4 run_pipeline.py --config smollm2_135m.yaml \\
        --compressor "klt(calibration=calib/, target_bits=1.5)"

Calibration text goes through the model over the ranks, in windows of `dataset.max_length` without overlap, and the
loss's gradients come back. On several machines, copy the files to the same place on all. Without torchrun one process
plays all nodes. Use text that you will not score.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import ConfigError, find_config, load_config, parse_override
from pipeline.runtime.launch import on_deployment

if TYPE_CHECKING:
    from pipeline.runtime.deployment import Deployment

__all__ = ["main"]

DEFAULT_TOKENS = 50_000


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", metavar="YAML", help="a path, or a name in configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the files")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help="of the text's beginning; 0: all")
    parser.add_argument(
        "--no-token-table", action="store_true", help="predict nothing from token ids, which are then not sent"
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        # Any valid stride while max_length is not known; windows that do not overlap follow below.
        overrides = [*(parse_override(text) for text in arguments.overrides), ("dataset.stride", 1)]
        config = load_config(find_config(arguments.config) if arguments.config else None, overrides)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    stride = config.dataset.max_length - (config.dataset.bos == "window")
    dataset = dataclasses.replace(config.dataset, first_k_tokens=arguments.tokens, stride=stride)
    config = dataclasses.replace(config, dataset=dataset, compressor="none", compressor_per_link={})

    def work(deployment: Deployment) -> None:
        from pipeline.analysis.calibration import calibrate

        calibrate(config, deployment, arguments.out, use_token_ids=not arguments.no_token_table)

    on_deployment(config, arguments.out, work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
