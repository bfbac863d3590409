"""A config and a model as the planner takes them: costs of layers, figures of nodes and links.

Costs come from the model's shape, two operations for every weight that a token is multiplied with, or from what nodes
were measured to take (`measured_nodes`). Which placement is best is the planner's matter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.config.units import parse_size
from pipeline.models.cache import cache_bytes_per_token
from pipeline.models.loading import TORCH_DTYPES, WeightFormat
from pipeline.models.sizes import StageWeights, embedding_bytes, layer_kinds, stage_weights
from pipeline.partition.plan import Plan, StagePlan, default_plan, explicit_plan
from pipeline.partition.schedule import passes_in_flight
from pipeline.planner.forecast import layers_of_node
from pipeline.planner.problem import LayerCosts, LinkFigures, NodeFigures, Problem
from pipeline.planner.search import best_cuts
from pipeline.records.node_costs import NodeCosts

__all__ = [
    "ASSUMED_BYTES_PER_S",
    "ASSUMED_FLOPS",
    "balanced_plan",
    "head_node",
    "is_measured",
    "layer_weights",
    "planner_problem",
    "scored_per_window",
]

# Of a node of speed 1, where nothing was measured. Which layers go where does not depend on them unless links bind.
ASSUMED_FLOPS = 1e11
ASSUMED_BYTES_PER_S = 2e10


def is_measured(config: RunConfig) -> bool:
    """Whether a run measures its nodes at the start."""
    partition = config.partition
    return partition.plan == "balanced" and all(node.speed is None for node in partition.nodes)


def head_node(config: RunConfig) -> int:
    return 0 if config.partition.wrap else config.partition.num_nodes - 1


def scored_per_window(config: RunConfig) -> int:
    """Positions of a window that pass the head."""
    dataset = config.dataset
    return min(dataset.stride, dataset.max_length - 1)


def balanced_plan(problem: Problem) -> Plan:
    """Raises MemoryLimitError where the nodes' memory does not hold the model."""
    return explicit_plan(problem.num_layers, layers_of_node(problem, best_cuts(problem)))


def planner_problem(
    config: RunConfig,
    model_config: Any,
    measured: NodeCosts | None = None,
    *,
    links: Sequence[LinkFigures] | None = None,
) -> Problem:
    """What the planner is asked. Without `links`, they cost nothing.

    `links` are those of the chain in its order and, where the head is not on node 0, the one that losses return over.
    """
    partition, objective = config.partition, config.partition.objective
    plan = default_plan(model_config.num_hidden_layers, partition.num_nodes, wrap=partition.wrap)
    if links is None:
        links = (LinkFigures(),) * len(plan.chain_names)
    num_links = len(plan.links)
    costs, speeds = _sizes(config, model_config, objective), [1.0] * partition.num_nodes
    if measured is not None:
        costs, speeds = _with_measured(costs, measured, layer_kinds(model_config), head_node(config), objective)
    return Problem(
        costs=costs,
        nodes=_nodes(config, speeds),
        links=tuple(links[:num_links]),
        wrap=partition.wrap,
        objective=objective,
        microbatch_tokens=config.batch_size * config.dataset.max_length,
        in_flight=passes_in_flight(
            plan, config.runtime.in_flight, receives_ahead=config.runtime.receives_ahead, world_size=1
        ),
        return_delay_s=sum(link.delay_s for link in links[num_links:]),
    )


def _nodes(config: RunConfig, measured_speeds: Sequence[float]) -> tuple[NodeFigures, ...]:
    """Speeds of the config come in place of measured ones, for all nodes if for one."""
    given = config.partition.nodes
    if not given:
        return tuple(NodeFigures(speed=speed) for speed in measured_speeds)
    has_speeds = any(node.speed is not None for node in given)
    figures = []
    for node, measured in zip(given, measured_speeds, strict=True):
        speed = (1.0 if has_speeds else measured) / node.slowdown if node.speed is None else node.speed
        memory = None if node.memory is None else parse_size(node.memory)
        figures.append(NodeFigures(speed=speed, memory_bytes=memory))
    return tuple(figures)


def layer_weights(config: RunConfig, model_config: Any, layer: int) -> StageWeights:
    """Of one decoder layer."""
    return _weights(config, model_config, layer, layer + 1)


def _weights(
    config: RunConfig, model_config: Any, start: int, end: int, *, is_first: bool = False, is_last: bool = False
) -> StageWeights:
    stage = StagePlan(stage_index=0, node=0, start=start, end=end, is_first=is_first, is_last=is_last)
    return stage_weights(model_config, stage, WeightFormat.from_config(config.model))


def _sizes(config: RunConfig, model_config: Any, objective: str) -> LayerCosts:
    """From shapes alone: operations for a long text, bytes that are read for one token."""
    dtype, end = TORCH_DTYPES[config.model.dtype], model_config.num_hidden_layers
    cache = 0
    if objective == "decode":
        generation = config.generation
        length = generation.slot_length(getattr(model_config, "max_position_embeddings", None))
        cache = generation.max_slots * length * cache_bytes_per_token(model_config, 1, dtype)

    def seconds(part: StageWeights, share: float = 1.0) -> float:
        if objective == "decode":
            return part.active_bytes / ASSUMED_BYTES_PER_S
        return share * 2 * part.active / ASSUMED_FLOPS

    kinds = layer_kinds(model_config)
    by_kind = {kind: layer_weights(config, model_config, kind) for kind in set(kinds)}
    embedding = _weights(config, model_config, 0, 0, is_first=True)
    head = _weights(config, model_config, end, end, is_last=True)
    return LayerCosts(
        layer_s=tuple(seconds(by_kind[kind]) for kind in kinds),
        embedding_s=seconds(embedding),
        head_s=seconds(head, scored_per_window(config) / config.dataset.max_length),
        layer_bytes=tuple(by_kind[kind].nbytes + cache for kind in kinds),
        embedding_bytes=embedding.nbytes,
        head_bytes=head.nbytes,
        tied_bytes=embedding_bytes(model_config, dtype) if model_config.tie_word_embeddings else 0,
    )


def _with_measured(
    sizes: LayerCosts, measured: NodeCosts, kinds: Sequence[int], head_at: int, objective: str
) -> tuple[LayerCosts, list[float]]:
    """Measured costs, on a node of node 0's speed, and the speeds. An embedding is looked up: it costs nothing."""
    is_prefill = objective == "prefill"
    tokens = measured.microbatch_tokens if is_prefill else 1
    places = {kind: place for place, kind in enumerate(sorted(set(kinds)))}
    by_node = []
    for node in measured.nodes:
        of_kinds = node.layer_s if is_prefill else node.one_token_layer_s
        by_node.append([of_kinds[places[kind]] / tokens for kind in kinds])
    speeds = [sum(by_node[0]) / sum(own) for own in by_node]
    holder = measured.nodes[head_at]
    head_s = holder.head_s if is_prefill else holder.one_token_head_s
    assert head_s is not None
    costs = dataclasses.replace(
        sizes, layer_s=tuple(by_node[0]), embedding_s=0.0, head_s=head_s / tokens * speeds[head_at]
    )
    return costs, speeds
