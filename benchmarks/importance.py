"""What each importance metric adds to a stage: time and memory, as ratios to the stage's forward pass without one.

    python -m benchmarks.importance --tokens 1024 2048 --out importance.json

A middle stage of the demo model (SmolLM2-135M cut for four nodes, node 2's layers) takes one window in float32 on
one thread. First every metric's run is compared with the plain one: the hidden states must be equal bit for bit. Then
come rounds in which each contender runs once, in turn; time is the process's CPU time, a ratio is to a plain pass right
before, and the median over rounds is reported, so that other work on the machine favours no side. Peak memory is the
growth of the resident set during one pass, weights and input not counted.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence

import torch

from benchmarks.codecs import cpu_seconds, median_ratio, peak_growth_mib
from compressors.console import run_command
from pipeline.config.options import OptionParser, add_config_options, path_option, read_config
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.data.windows import make_microbatches, make_windows
from pipeline.importance.metrics import METRICS, AttentionMetric, Metric, MetricSetting
from pipeline.models.loading import WeightFormat, load_stage
from pipeline.models.model_config import load_model_config
from pipeline.models.source import resolve_model
from pipeline.models.stage import Stage
from pipeline.records.environment import software_versions
from pipeline.runtime.memory import return_freed_memory
from pipeline.runtime.placement import make_plan

__all__ = ["measure"]

PLAIN = "no metric"
CPU = torch.device("cpu")
_WEIGHT_FORMATS = ("model.dtype", "model.weights", "model.load_in_8bit", "model.load_in_4bit")
_OF_RUNS = ("dataset", "compressor", "compressor_per_link", "importance", "batch_size", "measure_error")
_OF_RUNS += ("compressor_decode", "evaluation", "exp_dir", "generation", "runtime", "wandb")
UNUSED = {
    **{key: "this benchmark runs in float32; leave it out" for key in _WEIGHT_FORMATS},
    **{key: "this benchmark takes a model and a partition; leave it out" for key in _OF_RUNS},
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=path_option, help="JSON file; lengths that it has already are kept")
    add_config_options(parser)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        stage, model_config = _load_middle_stage(read_config(arguments, unused=UNUSED))
    except ValueError as e:
        raise SystemExit(f"error: {e}") from e
    report = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    report |= {"layers": [stage.plan.start, stage.plan.end], "versions": software_versions()}
    for num_tokens in arguments.tokens:
        figures = measure(stage, model_config, num_tokens, arguments.rounds)
        report[f"T={num_tokens}"] = figures
        print(f"T = {num_tokens}, {stage.plan.num_layers} layers, {arguments.rounds} rounds")
        print(f"{'metric':34}{'time, times plain':>20}{'peak memory, times plain':>28}")
        for name, figure in figures.items():
            print(f"{name:34}{figure['time_ratio']:20.3f}{figure['memory_ratio']:28.3f}")
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


@torch.inference_mode()
def measure(stage: Stage, model_config, num_tokens: int, rounds: int) -> dict[str, dict[str, float]]:
    """Ratios and medians by contender. Raises SystemExit where a metric changes a hidden state."""
    x = 0.1 * torch.randn(1, num_tokens, model_config.hidden_size, generator=torch.Generator().manual_seed(0))
    contenders = {PLAIN: lambda: (stage.forward(x), None)}
    for name, metric in _metrics(stage, model_config, num_tokens).items():
        contenders[name] = _with_metric(stage, metric, x)
    expected = contenders[PLAIN]()[0]
    for name, run in contenders.items():
        if not torch.equal(run()[0], expected):
            raise SystemExit(f"{name} changes the hidden states")
    return_freed_memory()
    peaks = {name: peak_growth_mib(run) for name, run in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    plain: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            plain[name].append(cpu_seconds(contenders[PLAIN]))
            seconds[name].append(cpu_seconds(run))
    return {
        name: {
            "time_ratio": median_ratio(seconds[name], plain[name]),
            "cpu_s": statistics.median(seconds[name]),
            "memory_ratio": peaks[name] / peaks[PLAIN],
            "peak_mib": peaks[name],
        }
        for name in contenders
    }


def _load_middle_stage(config: RunConfig) -> tuple[Stage, object]:
    """Of the stages that hold neither embedding nor head, the one in the middle."""
    model = config.model
    model_dir = resolve_model(
        model.name, cache_dir=model.dir, stage_to=model.stage_to, revision=model.revision, show_progress=False
    )
    model_config = load_model_config(model_dir, model.architecture, trust_remote_code=model.trust_remote_code)
    stages = make_plan(config, model_config).stages[1:-1]
    if not stages:
        raise ConfigError(f"partition.num_nodes is {config.partition.num_nodes}: no stage is in the middle; use 4")
    plan = stages[len(stages) // 2]
    loaded = load_stage(model_dir, model_config, plan, WeightFormat(dtype=torch.float32), device=CPU)
    return Stage(plan, loaded, CPU, model_config.vocab_size), model_config


def _metrics(stage: Stage, model_config, num_tokens: int) -> dict[str, Metric]:
    """Every metric, those of attention on the stage's last layer and on all."""
    own = range(stage.plan.start, stage.plan.end)
    common = {
        "first_layer": stage.plan.start,
        "microbatches": make_microbatches(make_windows(num_tokens, num_tokens, num_tokens), 1),
        "head_relevance": torch.ones(model_config.num_hidden_layers, model_config.num_attention_heads),
        "token_importance": torch.rand(num_tokens),
    }
    metrics = {}
    for name, cls in METRICS.items():
        if not issubclass(cls, AttentionMetric):
            metrics[name] = cls(MetricSetting(**common))
            continue
        metrics[f"{name}, last layer"] = cls(MetricSetting(**common, layers=own[-1:]))
        if name in ("column", "last_row"):
            metrics[f"{name}, all layers"] = cls(MetricSetting(**common, layers=own))
    return metrics


def _with_metric(stage: Stage, metric: Metric, x: torch.Tensor) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    reader = metric.read if isinstance(metric, AttentionMetric) else None

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        output = stage.forward(x, reader)
        return output, metric.importance(output, 0)

    return run


if __name__ == "__main__":
    run_command(main)
