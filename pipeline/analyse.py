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

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compressors.console import run_command
from pipeline.config.options import OptionParser, add_config_options, path_option, read_config
from pipeline.config.reading import NO_EMULATION
from pipeline.config.schema import ConfigError
from pipeline.runtime.launch import on_deployment

if TYPE_CHECKING:
    from pipeline.partition.plan import Plan
    from pipeline.runtime.deployment import Deployment

UNUSED = {
    "compressor": "an analysis looks at the uncompressed model; leave it out",
    "compressor_per_link": "an analysis looks at the uncompressed model; leave it out",
    "compressor_decode": "an analysis looks at the uncompressed model; leave it out",
    "evaluation": "an analysis scores no text; leave it out",
    "exp_dir": "an analysis writes to --out; leave it out",
    "generation": "an analysis generates nothing; leave it out",
    "links": "an analysis emulates no network; leave it out",
    "links_per_link": "an analysis emulates no network; leave it out",
    "measure_error": "an analysis compresses nothing; leave it out",
    "wandb": "an analysis logs nothing to Weights & Biases; leave it out",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0])
    parser.add_argument("analysis", choices=("layers", "heads", "oracle"))
    parser.add_argument("--out", type=path_option, required=True, metavar="DIR", help="folder of the results")
    add_config_options(parser)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        config = read_config(arguments, own=NO_EMULATION, unused=UNUSED)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2

    def analyse(deployment: Deployment) -> None:
        from pipeline.analysis import model_analysis

        getattr(model_analysis, f"analyse_{arguments.analysis}")(config, deployment, arguments.out)

    def check(plan: Plan, model_config: Any) -> None:
        from pipeline.analysis import model_analysis

        getattr(model_analysis, f"check_{arguments.analysis}")(config, plan, model_config)

    on_deployment(config, arguments.out, analyse, check)
    return 0


if __name__ == "__main__":
    run_command(main)
