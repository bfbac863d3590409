"""Which metric each link's codec gets, and from which layers and files it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors import Compressor
from compressors.user_files import user_path
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.data.windows import MicroBatch
from pipeline.importance.files import TokenOwner, file_digest, read_head_relevance, read_token_importance
from pipeline.importance.metrics import METRICS, Metric, MetricSetting
from pipeline.models.loading import check_attention_readable
from pipeline.partition.plan import Plan, StagePlan

__all__ = ["make_metrics"]


def make_metrics(
    config: RunConfig,
    plan: Plan,
    encoders: Mapping[int, Compressor],
    microbatches: Sequence[MicroBatch],
    *,
    model_config: Any,
    owner: TokenOwner,
) -> dict[int, Metric]:
    """What computes the importance for those of `encoders` that need it, by link index as they.

    `owner` is this run. Raises ConfigError or another ValueError for what its model, plan, text or kernel cannot give.
    """
    metrics = {}
    for index, codec in encoders.items():
        if "importance" not in codec.needs:
            continue
        assert codec.importance_metric is not None, f"codec {codec.name} needs importance and names no metric"
        cls, stage, section = METRICS[codec.importance_metric], plan.stages[index], config.importance
        options: dict[str, Any] = {"seed": section.seed, "microbatches": microbatches, "first_layer": stage.start}
        if "layers" in cls.setting_keys:
            check_attention_readable(model_config)
            options["layers"] = _layers_to_read(section.layers, stage, plan.num_layers, cls.name)
        for key in {"head_weights", "oracle"}.intersection(cls.setting_keys):
            if getattr(section, key) is None:
                raise ConfigError(f"metric {cls.name} needs a file: set importance.{key}")
            path = Path(user_path(getattr(section, key)))
            options["file_digest"] = file_digest(path)
            if key == "head_weights":
                options["head_relevance"] = read_head_relevance(
                    path,
                    checkpoint_fingerprint=owner.checkpoint_fingerprint,
                    num_layers=plan.num_layers,
                    num_heads=model_config.num_attention_heads,
                )
            else:
                options["token_importance"] = read_token_importance(path, plan.links[index].name, owner)
        metrics[index] = cls(MetricSetting(**options))
    return metrics


def _layers_to_read(setting: str | Sequence[int], stage: StagePlan, num_layers: int, metric: str) -> list[int]:
    """Of the sending stage's layers, those that `importance.layers` asks for."""
    own = range(stage.start, stage.end)
    if isinstance(setting, str):
        chosen = list(own[-1:] if setting == "last" else own)
    else:
        beyond = [n for n in setting if n >= num_layers]
        if beyond:
            raise ConfigError(f"importance.layers has {beyond[0]}, the model's layers are 0 to {num_layers - 1}")
        chosen = sorted(set(setting) & set(own))
    if not chosen:
        holds = f"layers {stage.start} to {stage.end - 1}" if own else "no layers"
        raise ConfigError(
            f"metric {metric} reads attention, but stage {stage.stage_index} holds {holds}, and importance.layers "
            f"is {setting!r}"
        )
    return chosen
