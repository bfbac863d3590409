"""Is the slowest node of a balanced plan as much faster as the planner says? Busy seconds of every node, both plans.

    python -m benchmarks.balanced_plan
    python -m benchmarks.balanced_plan --config my.yaml --set runtime.threads=1

Without a config it makes a random Llama of twelve layers whose head has 0.38 times the weights of its layers, as that
of Qwen2-0.5B has, and scores every token. The first run measures the nodes (`partition.plan=balanced`) and keeps their
costs. Then the default plan and the balanced one are run in turn, with codec none and one pass in flight, so that ranks
which share cores do not slow each other down: a node's busy seconds are those that it would take on a machine of its
own. Losses of the two plans must agree before any time is shown. With a config that has slowdowns, they are in both.

    python -m benchmarks.balanced_plan --repeats 5 --out results/balanced
"""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.synthetic import save_random_llama
from compressors.console import run_command
from pipeline.config.options import OptionParser, add_config_options, path_option, read_config
from pipeline.config.reading import with_overrides
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.config.writing import config_yaml
from pipeline.models.model_config import load_model_config
from pipeline.models.source import resolve_model
from pipeline.partition.plan import Plan, default_plan, explicit_plan
from pipeline.planner.forecast import cuts_of, forecast
from pipeline.records.run_record import RunRecord
from pipeline.records.store import read_per_token, read_record
from pipeline.runtime.balance import planner_problem
from pipeline.runtime.measured_nodes import kept_nodes
from pipeline.runtime.placement import config_with_plan

__all__ = ["busy_s", "main"]

ROOT = Path(__file__).resolve().parent.parent
LOSS_TOLERANCE = 1e-3  # nats a token; layers are computed alike, but sums of a head may be cut into other chunks


def random_model(folder: Path) -> RunConfig:
    """A run of a model whose head weighs 0.38 times as much as its layers."""
    save_random_llama(
        folder / "model", hidden_size=256, num_layers=12, vocab_size=13_312, dtype=torch.float32, num_shards=1
    )
    text = folder / "text"
    text.write_text("the layers go where they take the least time. " * 200, encoding="ascii")
    overrides = {
        "model.name": str(folder / "model"),
        "dataset.name": "text",
        "dataset.path": str(text),
        "dataset.first_k_tokens": 6000,
        "dataset.max_length": 512,
        "dataset.stride": 512,
        "runtime.threads": 1,
    }
    return with_overrides(RunConfig(), list(overrides.items()))


def run(config: RunConfig, folder: Path) -> tuple[RunRecord, np.ndarray]:
    """Record and losses of a run on one rank per node."""
    folder.mkdir(parents=True)
    config = with_overrides(config, [("exp_dir", str(folder))])
    (folder / "config.yaml").write_text(config_yaml(config), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={config.partition.num_nodes}", "run_pipeline.py", "--config"]
    finished = subprocess.run(
        [*command, str(folder / "config.yaml")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if finished.returncode:
        raise SystemExit(f"the run in {folder} failed:\n{finished.stderr}")
    (path,) = folder.glob("*.json")
    return read_record(path), read_per_token(path)["loss"]


def busy_s(record: RunRecord) -> list[float]:
    """Seconds of each node: computing, encoding and decoding of all its stages."""
    busy = [0.0] * (1 + max(stage.node for stage in record.plan))
    for stage in record.plan:
        times = record.stages[str(stage.stage)]
        busy[stage.node] += times.compute_s + times.compress_s + times.decompress_s + times.importance_s
    return busy


def plan_of(record: RunRecord, num_nodes: int) -> Plan:
    ranges = [[stage.layers for stage in record.plan if stage.node == node] for node in range(num_nodes)]
    return explicit_plan(record.model.num_hidden_layers, ranges)


def measure(config: RunConfig, folder: Path, repeats: int) -> None:
    num_nodes = config.partition.num_nodes
    balanced = with_overrides(config, [("partition.plan", "balanced"), ("compressor", "none")])
    record, _ = run(balanced, folder / "measure")
    plans = {
        "default": default_plan(record.model.num_hidden_layers, num_nodes, wrap=config.partition.wrap),
        "balanced": plan_of(record, num_nodes),
    }
    single = with_overrides(config, [("compressor", "none"), ("compressor_per_link", {}), ("runtime.in_flight", 1)])
    busy: dict[str, list[list[float]]] = {name: [] for name in plans}
    losses: dict[str, np.ndarray] = {}
    for repeat in range(repeats):
        for name, plan in plans.items():
            made, losses[name] = run(config_with_plan(single, plan), folder / f"{name}-{repeat}")
            busy[name].append(busy_s(made))
        difference = float(np.abs(losses["default"] - losses["balanced"]).max())
        if not difference <= LOSS_TOLERANCE:
            raise SystemExit(f"losses of the two plans differ by {difference:g}: no time means anything")
    _show(balanced, folder / "measure", plans, busy, difference, record)


def _show(
    balanced: RunConfig,
    measured_in: Path,
    plans: dict[str, Plan],
    busy: dict[str, list[list[float]]],
    difference: float,
    record: RunRecord,
) -> None:
    model_dir = resolve_model(
        balanced.model.name, cache_dir=balanced.model.dir, stage_to=None, revision=None, show_progress=False
    )
    model_config = load_model_config(model_dir, balanced.model.architecture)
    measured = kept_nodes(with_overrides(balanced, [("exp_dir", str(measured_in))]), model_config)
    problem = planner_problem(balanced, model_config, measured)
    repeats, tokens, model = len(busy["default"]), record.timed_tokens or 1, record.model
    print(
        f"{model.model_type}, {model.num_hidden_layers} layers, hidden size {model.hidden_size}, {record.args.dtype}; "
        f"{tokens} tokens in windows of {balanced.dataset.max_length}, codec none\n"
        f"{len(problem.nodes)} ranks of {record.ranks[0].threads} threads on {os.cpu_count()} cores "
        f"({platform.machine()}), one pass in flight, least of {repeats} runs; load average {os.getloadavg()[0]:.1f}\n"
        f"largest difference of a token's loss between the plans: {difference:.2g}"
    )
    predicted, measured_s, shares = {}, {}, {}
    for name, plan in plans.items():
        made = forecast(problem, cuts_of(problem, plan))
        least = [min(column) for column in zip(*busy[name], strict=True)]
        predicted[name], measured_s[name] = max(made.node_s), max(least)
        shares[name] = statistics.median(max(one) / sum(one) for one in busy[name])
        print(f"\n{name}: node, layers, predicted and measured busy seconds")
        for node, (planned, seconds) in enumerate(zip(made.node_s, least, strict=True)):
            ranges = " ".join(f"[{stage.start}, {stage.end})" for stage in plan.stages_of_node(node))
            print(f"  {node}  {ranges:<20}  {planned * tokens:8.3f}  {seconds:8.3f}")
    ratios = [one["default"] / one["balanced"] for one in (predicted, measured_s, shares)]
    print(f"\nslowest node, default over balanced: predicted {ratios[0]:.2f}, measured {ratios[1]:.2f}")
    print(f"by its share of all busy seconds of a run (median), which a steady load leaves alone: {ratios[2]:.2f}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0])
    add_config_options(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=path_option, help="keep the runs in this new folder")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="balanced_plan_") as temporary:
        folder = arguments.out or Path(temporary)
        try:
            if arguments.config is None and not arguments.overrides:
                config = random_model(Path(temporary))
            else:
                config = read_config(arguments)
            measure(config, folder, max(1, arguments.repeats))
        except ConfigError as e:
            print(f"error: {e}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    run_command(main)
