"""Parts that the records of evaluations and of generation have in common, from a deployment and its ranks' reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.comm.emulation import Conditions
from pipeline.config.schema import ModelConfig, RunConfig
from pipeline.models.matrix_types import MADE_AT_LOAD, types_label
from pipeline.partition.plan import Plan
from pipeline.records.run_record import (
    CodecConfig,
    EmulatedLink,
    Emulation,
    Model,
    PlannedStage,
    StageSeconds,
    WeightBlocks,
)
from pipeline.runtime.codecs import LinkCodecs
from pipeline.runtime.deployment import Deployment

__all__ = ["codec_configs", "emulation", "planned_stages", "recorded_model", "stage_seconds", "weight_blocks"]


def codec_configs(plan: Plan, codecs: LinkCodecs) -> dict[str, CodecConfig]:
    """By link."""
    facts = zip(plan.links, codecs.facts, strict=True)
    return {link.name: CodecConfig.from_plain(codec.config) for link, codec in facts}


def emulation(config: RunConfig, plan: Plan, links: Mapping[int, Conditions]) -> Emulation | None:
    """Of a run with these emulated links, by index in the chain."""
    slowdown = tuple(node.slowdown for node in config.partition.nodes)
    if not links and all(times == 1 for times in slowdown):
        return None
    return Emulation(
        links={plan.chain_names[i]: EmulatedLink(**dataclasses.asdict(links[i])) for i in sorted(links)},
        slowdown=slowdown,
    )


def planned_stages(plan: Plan) -> tuple[PlannedStage, ...]:
    return tuple(PlannedStage(stage=s.stage_index, node=s.node, layers=(s.start, s.end)) for s in plan.stages)


def recorded_model(config: RunConfig, deployment: Deployment) -> Model:
    model = deployment.model
    return Model(
        model_type=model.config.model_type,
        hidden_size=model.config.hidden_size,
        num_hidden_layers=deployment.plan.num_layers,
        checkpoint_fingerprint=model.checkpoint_digest,
        blocks=weight_blocks(config.model, model.config),
    )


def weight_blocks(model: ModelConfig, model_config: Any) -> WeightBlocks | None:
    """What matrices are held as where `model_config` has been given its types (`models.matrix_types`)."""
    label = types_label(model_config)
    made_at_load = model.weights in MADE_AT_LOAD
    return None if label is None else WeightBlocks(types=tuple(label.split(", ")), made_at_load=made_at_load)


def stage_seconds(reports: Sequence[Mapping[str, Any]]) -> dict[str, StageSeconds]:
    """By stage, from all ranks (`rank_report`)."""
    return {
        index: StageSeconds(**times) for report in reports for index, times in sorted(report["stages"].items())
    }
