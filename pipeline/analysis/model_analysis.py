"""What a model says about its tokens, heads and layers: analyses over the ranks.

Each is a function of a deployment that all ranks call; rank 0 writes the results. `analyse.py` starts them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipeline.analysis.layer_statistics import compare_layers, early_and_late, position_correlation
from pipeline.analysis.plots import plot_heads, plot_layers
from pipeline.analysis.relevance import attnlrp, check_rules
from pipeline.comm.control import Control
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.data.windows import MicroBatch, make_microbatches
from pipeline.importance.files import TokenOwner, write_head_relevance, write_token_importance
from pipeline.importance.metrics import METRICS, AttentionMetric, MetricSetting
from pipeline.models.attention import Attention, AttentionReader
from pipeline.models.loading import TORCH_DTYPES, check_attention_readable
from pipeline.models.stage import Objective
from pipeline.partition.plan import Plan, StagePlan
from pipeline.records.environment import software_versions
from pipeline.records.files import write_json
from pipeline.records.labels import model_label
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.gradients import GradientPass, Observers
from pipeline.runtime.text import make_run_windows

__all__ = [
    "LAYER_METRICS",
    "analyse_heads",
    "analyse_layers",
    "analyse_oracle",
    "check_heads",
    "check_layers",
    "check_oracle",
]

LAYER_METRICS = ("column", "column_causal", "last_row")
TOP_FRACTION = 0.1
SCHEMA_VERSION = 1


def check_layers(config: RunConfig, plan: Plan, model_config: Any) -> None:
    """Raise ValueError where attention cannot be read."""
    check_attention_readable(model_config)


def check_heads(config: RunConfig, plan: Plan, model_config: Any) -> None:
    """Raise ValueError for a model type without rules of relevance."""
    check_rules(model_config)


def check_oracle(config: RunConfig, plan: Plan, model_config: Any) -> None:
    """Raise ConfigError where there is nothing between stages."""
    if not plan.links:
        raise ConfigError(f"partition.num_nodes is {config.partition.num_nodes}: there is no link to rate tokens at")


def analyse_layers(config: RunConfig, deployment: Deployment, out: Path) -> None:
    """Compare all pairs of layers by each of `LAYER_METRICS`."""
    plan, control = deployment.plan, deployment.control
    microbatches = _microbatches(config, deployment)
    metrics = [_attention_metric(name) for name in LAYER_METRICS]
    taken: dict[int, list[list[torch.Tensor]]] = {}  # layer -> one entry per micro-batch: [B, T] of each metric

    def reader_of(stage: StagePlan) -> AttentionReader:
        def read(stage_layer: int, attention: Attention) -> None:
            layer = stage.start + stage_layer
            taken.setdefault(layer, []).append([metric.reduce(attention, layer).cpu() for metric in metrics])

        return read

    with _progress(control, "importance by layer", len(microbatches)) as advance:
        GradientPass(
            deployment,
            microbatches,
            dtype=TORCH_DTYPES[config.model.dtype],
            objective=None,
            seen=Observers(
                on_finished=advance, attention_readers={i: reader_of(plan.stages[i]) for i in deployment.stages}
            ),
        ).run()
    windows: list[np.ndarray] = []  # [metrics, layers, T] each
    for microbatch in microbatches:
        batch = torch.zeros(len(metrics), plan.num_layers, *microbatch.shape)
        for layer, by_microbatch in taken.items():
            batch[:, layer] = torch.stack(by_microbatch[microbatch.index])
        windows.extend(control.sum_over_ranks(batch).permute(2, 0, 1, 3).double().numpy())
    if control.world.rank != 0:
        return
    analysis = _origin(config, deployment, "layer analysis") | {"top_fraction": TOP_FRACTION, "metrics": {}}
    for number, name in enumerate(LAYER_METRICS):
        own = [window[number] for window in windows if window.shape[-1] > 1]
        pairs = compare_layers(own, TOP_FRACTION)
        summary = early_and_late(pairs)
        analysis["metrics"][name] = {
            "summary": summary,
            "spearman_with_position": position_correlation(own).tolist(),
            "pairs": {measure: matrix.tolist() for measure, matrix in pairs.items()},
        }
        plot_layers(analysis, name, out / f"layers_{name}.png")
        spearman = summary["spearman"]
        print(
            f"{name}: Spearman correlation of layers {spearman['early_against_late_third']:.2f} between the first and "
            f"the last third, {spearman['first_against_last']:.2f} first against last, "
            f"{spearman['neighbours']:.2f} between neighbours"
        )
    write_json(out / "layers.json", analysis)
    print(f"written: {out}/layers.json and a figure per metric")


def analyse_heads(config: RunConfig, deployment: Deployment, out: Path) -> None:
    """Relevance of every head for the logit of the true next token, summed over the scored positions of the text.

    A head's weight is the magnitude of its relevance: heads that speak against the right token matter as well.
    """
    plan, control = deployment.plan, deployment.control
    microbatches = _microbatches(config, deployment)
    with ExitStack() as stack:
        stages = {i: stack.enter_context(attnlrp(stage.decoder)) for i, stage in deployment.stages.items()}
        with _progress(control, "relevance of heads", len(microbatches)) as advance:
            gradients = GradientPass(
                deployment,
                microbatches,
                dtype=TORCH_DTYPES[config.model.dtype],
                objective=Objective.TARGET_LOGIT,
                seen=Observers(on_finished=advance),
            )
            logits = gradients.run()
    heads = torch.zeros(plan.num_layers, deployment.model.config.num_attention_heads, dtype=torch.float64)
    absorbed = torch.zeros(3, dtype=torch.float64)  # by biases, by softmaxes, and all there was
    for index, relevance in stages.items():
        stage = plan.stages[index]
        heads[stage.start : stage.end] = relevance.heads.cpu()
        absorbed[0] += relevance.biases.sum().cpu()
        absorbed[1] += relevance.softmax.sum().cpu()
        if stage.is_last:
            absorbed[2] += relevance.output.cpu()
    heads, absorbed = control.sum_over_ranks(heads), control.sum_over_ranks(absorbed)
    if control.world.rank != 0:
        return
    write_head_relevance(
        out / "head_relevance.safetensors",
        heads.abs().float(),
        checkpoint_fingerprint=deployment.model.checkpoint_digest,
        notes={"text_sha256": deployment.text.text_sha256, "objective": Objective.TARGET_LOGIT.value},
    )
    biases, softmax, total = absorbed.tolist()
    analysis = _origin(config, deployment, "head relevance") | {
        "objective": Objective.TARGET_LOGIT.value,
        "objective_sum": logits,
        "relevance_at_output": total,
        "share_absorbed_by_biases": biases / total,
        "share_absorbed_by_softmax": softmax / total,
        "relevance": heads.tolist(),
        "weights": (heads.abs() / heads.abs().sum(1, keepdim=True)).tolist(),
    }
    write_json(out / "relevance.json", analysis)
    plot_heads(analysis, out / "relevance.png")
    shares = np.sort(np.array(analysis["weights"]), axis=1)[:, ::-1]
    print(
        f"head relevance of {analysis['model']['label']}: the most relevant head of a layer has on average "
        f"{shares[:, 0].mean():.1%} of its layer's relevance (equal heads: {1 / heads.shape[1]:.1%}); "
        f"biases absorbed {biases / total:+.1%}, softmaxes {softmax / total:+.1%}"
    )
    print(f"written: {out}/head_relevance.safetensors, relevance.json, relevance.png")


def analyse_oracle(config: RunConfig, deployment: Deployment, out: Path) -> None:
    """I_j = ||g_j|| ||x_j|| at every link, x_j the token's hidden state and g_j the loss gradient there.

    To first order an error e_j changes the loss by <g_j, e_j>; where errors are proportional to the token's length and
    of no preferred direction, the product is how large that change is.
    """
    plan, control = deployment.plan, deployment.control
    microbatches = _microbatches(config, deployment)
    starts = [0]
    for microbatch in microbatches:
        starts.append(starts[-1] + microbatch.num_tokens)
    importance = torch.zeros(len(plan.links), starts[-1])

    def take(link: int, m: int, hidden_states: torch.Tensor, gradient: torch.Tensor) -> None:
        product = gradient.norm(dim=-1) * hidden_states.float().norm(dim=-1)
        importance[link, starts[m] : starts[m + 1]] = product.reshape(-1).cpu()

    with _progress(control, "loss gradients", len(microbatches)) as advance:
        gradients = GradientPass(
            deployment,
            microbatches,
            dtype=TORCH_DTYPES[config.model.dtype],
            seen=Observers(on_gradient=take, on_finished=advance),
        )
        gradients.run()
    importance = control.sum_over_ranks(importance)
    if control.world.rank == 0:
        write_token_importance(
            out / "token_importance.safetensors",
            {link.name: importance[link.index] for link in plan.links},
            TokenOwner.of(config.dataset, deployment.model.checkpoint_digest, deployment.text.ids_sha256),
        )
        print(f"written: {out}/token_importance.safetensors")


def _attention_metric(name: str) -> AttentionMetric:
    metric = METRICS[name](MetricSetting())
    assert isinstance(metric, AttentionMetric)
    return metric


def _microbatches(config: RunConfig, deployment: Deployment) -> list[MicroBatch]:
    text = deployment.text
    return make_microbatches(make_run_windows(config, text.ids, text.bos_id), config.batch_size)


@contextmanager
def _progress(control: Control, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on rank 0; yields what is told the index of each micro-batch that is done."""
    with tqdm(total=total, desc=what, unit="batch", disable=control.world.rank != 0, dynamic_ncols=True) as bar:
        yield lambda _: bar.update()


def _origin(config: RunConfig, deployment: Deployment, kind: str) -> dict[str, Any]:
    """What every analysis says of its origin."""
    dataset = config.dataset
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": f"thinwire {kind}",
        "model": {
            "label": model_label(config.model.name),
            "model_type": deployment.model.config.model_type,
            "checkpoint_fingerprint": deployment.model.checkpoint_digest,
            "dtype": config.model.dtype,
            "blocks": deployment.model.block_types,
        },
        "dataset": {
            "description": deployment.text.description,
            "num_tokens": deployment.text.ids.numel(),
            "ids_sha256": deployment.text.ids_sha256,
        },
        "protocol": {"max_length": dataset.max_length, "stride": dataset.stride, "bos": dataset.bos},
        "num_windows": sum(len(m.windows) for m in _microbatches(config, deployment)),
        "versions": software_versions(),
    }
