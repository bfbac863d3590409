"""Start an analysis of a model on all ranks.

    torchrun --nproc_per_node=2 -m pipeline.analyse layers --config demo_importance.yaml --out results/layers
    torchrun --nproc_per_node=2 -m pipeline.analyse heads --config demo_relevance.yaml --out results/relevance
    torchrun --nproc_per_node=2 -m pipeline.analyse oracle --config demo_importance.yaml --out results/oracle

* `layers` compares, for every pair of layers, which tokens they find important: layers.json and a figure per metric.
* `heads` finds each attention head's relevance by AttnLRP: head_relevance.safetensors for the metric `head_weighted`,
  relevance.json and relevance.png.
* `oracle` finds each token's importance at each link from the loss gradient: token_importance.safetensors for the
  metric `oracle`. It looks at the very text that is scored: for comparison, not for use.

Without torchrun one process plays all nodes.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import ConfigError, find_config, load_config, parse_override
from pipeline.runtime.launch import on_deployment

if TYPE_CHECKING:
    from pipeline.runtime.deployment import Deployment


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("analysis", choices=("layers", "heads", "oracle"))
    parser.add_argument("--config", metavar="YAML", help="a path, or a name in configs/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        overrides = [parse_override(text) for text in arguments.overrides]
        config = load_config(find_config(arguments.config) if arguments.config else None, overrides)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2

    def analyse(deployment: Deployment) -> None:
        from pipeline.analysis import model_analysis

        getattr(model_analysis, f"analyse_{arguments.analysis}")(config, deployment, arguments.out)

    on_deployment(config, arguments.out, analyse)
    return 0


if __name__ == "__main__":
    sys.exit(main())
