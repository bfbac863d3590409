"""The original benchmark's table of methods, rerun with really packed bytes on a model of choice.

    torchrun --nproc_per_node=4 -m benchmarks.published_table --config smollm2_135m.yaml \
        --set dataset.path=wiki.test.raw --set dataset.first_k_tokens=10000 --set exp_dir=results/published

One process group and one model load serve all methods. Each leaves a record; one that has its record already is
skipped, so an interrupted table continues. The table is printed with `python -m pipeline.report`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import find_config, load_config, parse_override
from pipeline.deployment import deploy
from pipeline.distributed import Control, World
from pipeline.evaluation import Evaluation
from pipeline.record import check_writable
from pipeline.report import load_records, print_summary

BLOCKS = ((2, 2), (4, 4), (6, 6), (2, 8), (2, 16), (8, 2), (16, 2))
METHODS = [
    "none",
    "bf16",
    "fp8_e4m3",
    *(f"int{nbits}" for nbits in range(8, 1, -1)),
    "nf4",
    "fp4",
    *(f"hqq{nbits}" for nbits in (4, 3, 2, 1)),
    *(f"block_rowcol_mean(block_tokens={t}, block_channels={f})" for t, f in BLOCKS),
]
# What a practitioner would try next.
OTHERS = [
    "fp8_e5m2",
    "mxfp4",
    "zstd(int8)",
    "hadamard(int4)",
    "hadamard(int3)",
    "outlier(channels=8, inner=int4)",
    "topk(density=0.1)",
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args(argv)
    config = load_config(find_config(arguments.config), [*map(parse_override, arguments.overrides)])
    folder = Path(config.exp_dir)
    check_writable(folder)
    control = Control(
        World.from_environment(),
        timeout_s=config.runtime.timeout_s,
        load_timeout_s=config.runtime.load_timeout_s,
        interface=config.runtime.interface,
    )
    deployment = deploy(config, control)
    finished = control.gather([record["digest"] for record in load_records([folder])])[0]
    for method in [*METHODS, *OTHERS]:
        evaluation = Evaluation(dataclasses.replace(config, compressor=method), deployment)
        if evaluation.digest not in finished:
            evaluation.run(resume=True)
    control.close()
    if control.world.rank == 0:
        print_summary([folder])
    return 0


if __name__ == "__main__":
    sys.exit(main())
