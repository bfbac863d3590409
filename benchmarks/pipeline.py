"""Speed of the pipeline against other ways to compute the same losses, as interleaved ratios.

    torchrun --nproc_per_node=4 -m benchmarks.pipeline --windows 16 --rounds 5 --out ratios.json

* thinwire: this project, one thread a rank on two cores; its journal, checksums and record are in its time;
* pipelining: torch.distributed.pipelining, the same stages on the same ranks in the same order of actions;
* plain: one process, transformers' model, all cores, head on scored positions only;
* hooks: the original benchmark's method: one process, all cores, codecs in forward hooks, head on all positions.

All take the same token windows, and their losses are compared before anything is timed. Then come rounds, each
contender once a round, in turn. The clock runs from a barrier to the last result; start and loading are left out.
A ratio is a contender's time divided by ours in the same round, and the median over rounds is reported, so that a
slow machine slows both sides. Rounds in which other programs took more than a twentieth of the cores are told apart:
one process with several threads suffers from company more than ranks with one thread each. `--patience` lets each
round wait until the cores are idle.

`pipelining` and `plain` know no codecs: with a lossy one, they still compute the uncompressed model, and what differs
between `thinwire` and `hooks` is what a rounding difference in front of a quantiser grows to.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.baselines import BASELINES, Run, serve
from compressors.console import run_command
from pipeline.comm.control import Control
from pipeline.comm.world import World
from pipeline.config.options import OptionParser, add_config_options, path_option, read_config
from pipeline.config.reading import with_overrides
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.evaluation.evaluation import Evaluation
from pipeline.records.environment import software_versions
from pipeline.records.store import read_per_token, read_record
from pipeline.runtime.deployment import Deployment, deploy
from pipeline.runtime.devices import available_cores
from pipeline.runtime.memory import keep_freed_memory, return_freed_memory

OURS = "thinwire"
QUIET = 0.05  # share of all cores that other programs may take in a quiet round
IDLE_S = 6.0  # how long the cores must have been idle before a round that waits for it

# Largest difference from our results without a lossy codec: of one token's loss (nats), and relative, of the total NLL.
MAX_LOSS_DIFFERENCE = 1e-3
MAX_NLL_DIFFERENCE = 1e-5

UNUSED = {
    "compressor_decode": "a benchmark samples nothing; leave it out",
    "dataset.first_k_tokens": "the text is cut to --windows full windows; leave it out",
    "evaluation": "a benchmark scores windows; leave it out",
    "exp_dir": "the records are not kept; rounds go to --out",
    "generation": "a benchmark generates nothing; leave it out",
    "model.weights": "all are compared with weights in model.dtype; leave it out",
    "wandb": "a benchmark logs nothing to Weights & Biases; leave it out",
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    world = World.from_environment()
    with tempfile.TemporaryDirectory(prefix="thinwire_benchmark_") as folder:
        try:
            config = _make_config(arguments, folder)
        except ConfigError as e:
            raise SystemExit(f"error: {e}") from e
        if world.world_size == 1 or world.world_size != config.partition.num_nodes:
            raise SystemExit(f"start it with torchrun --nproc_per_node={config.partition.num_nodes}")
        runtime = config.runtime
        control = Control(
            world, timeout_s=runtime.timeout_s, load_timeout_s=runtime.load_timeout_s, interface=runtime.interface
        )
        try:
            control.form()
            _benchmark(config, control, arguments)
            control.close()
        except (Exception, KeyboardInterrupt) as e:
            control.watchdog.abort(e)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = OptionParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--windows", type=int, default=16, help="full windows that each contender computes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=0, help="seconds that a round may wait for idle cores")
    parser.add_argument("--only", nargs="+", default=list(BASELINES), choices=BASELINES)
    parser.add_argument(
        "--out", type=path_option, help="JSON file; rounds under the same conditions that it has are kept"
    )
    add_config_options(parser)
    return parser


def _make_config(arguments: argparse.Namespace, folder: str) -> RunConfig:
    """The configuration of our runs. The token list is cut so that every window is full."""
    config = read_config(arguments, unused=UNUSED)
    num_tokens = config.dataset.max_length + (arguments.windows - 1) * config.dataset.stride
    own = [("exp_dir", folder), ("dataset.first_k_tokens", num_tokens), ("wandb.enabled", False)]
    own.append(("model.weights", "fp32"))  # as the others have them
    return with_overrides(config, own)


def _benchmark(config: RunConfig, control: Control, arguments: argparse.Namespace) -> None:
    """All rounds, on all ranks; rank 0 prints and writes."""
    with _baseline_process(config, control, arguments.only) as ask:
        return_freed_memory()
        deployment = deploy(config, control)
        if deployment.plan.last_node != 0:
            raise ValueError("the last stage must be on rank 0, which collects the results: leave partition.wrap true")
        keep_freed_memory()
        contenders = {OURS: lambda: (_run_thinwire(config, deployment), 0.0)}
        contenders |= {name: lambda name=name: ask(name) for name in arguments.only}
        on_rank_0 = control.world.rank == 0
        first = {name: _measure(run, control)[0] for name, run in contenders.items()}
        conditions = _conditions(config, deployment)
        if on_rank_0:
            report = _begin_report(arguments.out, conditions, _differences(first, conditions["codecs"]))
        for _ in range(arguments.rounds):
            if on_rank_0:
                _wait_for_idle_cores(arguments.patience)
            control.barrier()
            measured = {name: _measure(run, control)[1] for name, run in contenders.items()}
            if on_rank_0:
                report["rounds"].append(measured)
                if arguments.out:
                    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    if on_rank_0:
        print(_table(report))


@contextlib.contextmanager
def _baseline_process(config: RunConfig, control: Control, names: Sequence[str]):
    """A process beside this rank that computes baselines; gives the function that asks it for one."""
    port = control.gather(_free_port())[0]
    context = multiprocessing.get_context("spawn")
    connection, other_end = context.Pipe()
    process = context.Process(target=serve, args=(other_end, config, port, names), daemon=True)
    process.start()
    other_end.close()

    def ask(name: str) -> tuple[Run | None, float]:
        connection.send(name)
        return connection.recv()

    connection.recv()  # it has loaded
    yield ask
    connection.send(None)
    process.join()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _run_thinwire(config: RunConfig, deployment: Deployment) -> Run | None:
    """What run_pipeline.py does once the model is loaded; its record has the time and the losses."""
    with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
        path = Evaluation(config, deployment).run()
    if path is None:
        return None
    record = read_record(path)
    return Run(record.time_run_s, record.results.total_nll, read_per_token(path)["loss"])


def _measure(
    run: Callable[[], tuple[Run | None, float]], control: Control
) -> tuple[Run | None, dict[str, float] | None]:
    """The run, and on rank 0 its seconds, the CPU seconds of all ranks, and the share of the cores that others took."""
    control.barrier()
    busy_s, start_s, own_s = _busy_s(), time.perf_counter(), time.process_time()
    result, baseline_cpu_s = run()
    cpu_s = sum(control.gather(baseline_cpu_s + time.process_time() - own_s))
    if control.world.rank != 0:
        return None, None
    others_s = max(0.0, _busy_s() - busy_s - cpu_s)
    share = others_s / (time.perf_counter() - start_s) / available_cores()
    return result, {"seconds": result.seconds, "cpu_seconds": cpu_s, "share_of_others": share}


def _wait_for_idle_cores(patience_s: float) -> None:
    idle_s, step_s = 0.0, 2.0
    end_s = time.monotonic() + patience_s
    while idle_s < IDLE_S and time.monotonic() < end_s:
        busy_s = _busy_s()
        time.sleep(step_s)
        idle = _busy_s() - busy_s <= QUIET * step_s * available_cores()
        idle_s = idle_s + step_s if idle else 0.0


def _busy_s() -> float:
    """Seconds that this machine's cores have worked since its start (Linux)."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _differences(runs: Mapping[str, Run], codecs: Sequence[str]) -> dict[str, dict[str, float]]:
    """How far the others' results are from ours. Raises ValueError where without a lossy codec they differ."""
    ours = runs[OURS]
    differences: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        if name == OURS:
            continue
        found = {"total_nll_relative": abs(run.total_nll / ours.total_nll - 1)}
        if run.losses is not None:
            found["largest_of_a_token_nats"] = float(np.abs(run.losses - ours.losses).max())
        differences[name] = found
        if codecs == ["none"] and (
            found["total_nll_relative"] > MAX_NLL_DIFFERENCE
            or found.get("largest_of_a_token_nats", 0.0) > MAX_LOSS_DIFFERENCE
        ):
            raise ValueError(f"{name} and {OURS} compute different losses: {found}")
    return differences


def _conditions(config: RunConfig, deployment: Deployment) -> dict[str, Any]:
    evaluation = Evaluation(config, deployment)
    return {
        "model": Path(config.model.name).name,
        "dtype": config.model.dtype,
        **({} if (types := deployment.model.block_types) is None else {"blocks": types}),
        "dataset": deployment.text.description,
        "windows": len(evaluation.windows),
        "max_length": config.dataset.max_length,
        "stride": config.dataset.stride,
        "batch_size": config.batch_size,
        "codecs": sorted({facts.name for facts in evaluation.codecs.facts}),
        "plan": [f"[{stage.start}, {stage.end}) on {stage.node}" for stage in deployment.plan.stages],
        "in_flight": evaluation.passes_in_flight(),
        "ranks": deployment.control.world.world_size,
        "threads_per_rank": deployment.threads,
        "cores": available_cores(),
        "versions": software_versions(),
    }


def _begin_report(out: Path | None, conditions: Mapping[str, Any], differences: Mapping[str, Any]) -> dict[str, Any]:
    """A report without rounds, or with those of `out`. Raises ValueError when they ran under other conditions."""
    report = {"conditions": conditions, "differences": differences, "rounds": []}
    if out and out.exists():
        earlier = json.loads(out.read_text())
        if earlier["conditions"] != conditions:
            raise ValueError(f"{out} has rounds under other conditions; name another file")
        report["rounds"] = earlier["rounds"]
    return report


def _table(report: Mapping[str, Any]) -> str:
    """Medians of the seconds and of the ratios to ours, with quartiles, over quiet and over all rounds."""
    lines = [f"{key}: {_plain(value)}" for key, value in report["conditions"].items()]
    everywhere = report["rounds"]
    quiet = [r for r in everywhere if all(m["share_of_others"] <= QUIET for m in r.values())]
    for title, rounds in (("quiet rounds", quiet), ("all rounds", everywhere)):
        lines.append(f"\n{title}: {len(rounds)}")
        if not rounds:
            continue
        lines.append(f"{'':12}{'seconds':>9}{'CPU s':>9}{'time/ours':>11}{'quartiles':>15}{'NLL difference':>16}")
        for name in rounds[0]:
            seconds, cpu_s = (np.median([r[name][key] for r in rounds]) for key in ("seconds", "cpu_seconds"))
            line = f"{name:12}{seconds:9.2f}{cpu_s:9.2f}"
            if name != OURS:
                ratios = [r[name]["seconds"] / r[OURS]["seconds"] for r in rounds]
                lower, median, upper = np.percentile(ratios, [25, 50, 75])
                difference = report["differences"][name]["total_nll_relative"]
                line += f"{median:11.3f}{f'{lower:.3f}-{upper:.3f}':>15}{difference:16.1e}"
            lines.append(line)
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == "__main__":
    run_command(main)
