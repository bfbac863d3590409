"""What each node takes for a layer and for the head, measured at the start of a run with a balanced plan.

Each rank times layers with random weights, one rank after the other, so that ranks on one machine do not slow each
other down. Rank 0 keeps the figures beside the run's records: a resumed run, and every point of a sweep, has the plan
that was made of them, which would be another run otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pipeline.comm.control import Control
from pipeline.comm.watchdog import tell
from pipeline.config.schema import RunConfig
from pipeline.models.loading import WeightFormat, random_stage
from pipeline.models.matrix_types import matrix_types, types_label
from pipeline.models.sizes import layer_kinds
from pipeline.models.stage import Stage
from pipeline.partition.plan import StagePlan
from pipeline.records.base import now
from pipeline.records.identity import digest_of
from pipeline.records.node_costs import MeasuredNode, NodeCosts, costs_path, read_node_costs, write_node_costs
from pipeline.runtime.balance import head_node, layer_weights, scored_per_window
from pipeline.runtime.devices import choose_device
from pipeline.runtime.timing import time_microbatch, time_one_token

__all__ = ["kept_nodes", "measured_nodes"]


def kept_nodes(config: RunConfig, model_config: Any) -> NodeCosts | None:
    """The costs that an earlier run has left in the folder of the records. Raises RecordError for a damaged file."""
    return read_node_costs(
        _path(config, model_config),
        num_nodes=config.partition.num_nodes,
        num_kinds=len(set(layer_kinds(model_config))),
        head_node=head_node(config),
    )


def measured_nodes(config: RunConfig, model_config: Any, control: Control) -> NodeCosts:
    """The costs of all nodes, read where the folder of the records has them; every rank calls it and gets the same.

    Raises RecordError for a file of costs that is damaged, or a folder that does not take one.
    """
    kinds = sorted(set(layer_kinds(model_config)))
    path = _path(config, model_config)

    def known() -> tuple[None, Any]:
        if control.world.rank != 0:
            return None, None
        costs = kept_nodes(config, model_config)
        return None, None if costs is None else costs.model_dump(mode="json")

    told = control.together(known)[1][0]
    if told is not None:
        costs = NodeCosts.from_plain(told)
        if control.world.rank == 0:
            tell(f"balanced plan: node costs from {path}, measured at {costs.measured_at}; delete it to measure anew\n")
        return costs
    control.report("measuring the node")
    own = control.in_turn(lambda: _measure(config, model_config, control, kinds).model_dump(mode="json"))
    ranks = control.gather({"node": own, "at": now()})
    costs = NodeCosts.from_plain(
        {
            "measured_at": ranks[0]["at"],
            "microbatch_tokens": config.batch_size * config.dataset.max_length,
            "nodes": [ranks[control.world.rank_of(node)]["node"] for node in range(config.partition.num_nodes)],
        }
    )

    def keep() -> tuple[None, None]:
        if control.world.rank == 0:
            write_node_costs(path, costs)
            tell(f"balanced plan: node costs were measured and are kept in {path}\n")
        return None, None

    control.together(keep)
    return costs


def _path(config: RunConfig, model_config: Any) -> Path:
    return costs_path(Path(config.exp_dir), _digest(config, model_config))


def _digest(config: RunConfig, model_config: Any) -> str:
    """Of what the figures depend on, as far as the config says. Not of who measures: runs may be resumed elsewhere."""
    model, partition = config.model, config.partition
    kinds = layer_kinds(model_config)
    shape = (model_config.model_type, model_config.hidden_size, model_config.vocab_size, model_config.num_hidden_layers)
    return digest_of(
        {
            "model": [shape, kinds, [layer_weights(config, model_config, kind).active for kind in sorted(set(kinds))]],
            "precision": [model.dtype, model.load_in_8bit, model.load_in_8bit_threshold, model.load_in_4bit],
            **({} if types_label(model_config) is None else {"blocks": matrix_types(model_config)}),
            "ring": [partition.num_nodes, partition.wrap],
            "devices": [config.runtime.device, *(node.device for node in partition.nodes)],
            "microbatch": [config.batch_size, config.dataset.max_length, scored_per_window(config)],
        }
    )


def _measure(config: RunConfig, model_config: Any, control: Control, kinds: list[int]) -> MeasuredNode:
    """This rank's figures; a rank that plays all nodes has them for all."""
    world, partition = control.world, config.partition
    own = partition.nodes[world.rank].device if partition.nodes and world.world_size > 1 else None
    device = choose_device(own or config.runtime.device, world)
    layers = [_times(config, model_config, device, kind, kind + 1) for kind in kinds]
    end = model_config.num_hidden_layers
    has_head = world.rank_of(head_node(config)) == world.rank
    head_s, one_token_head_s = _times(config, model_config, device, end, end) if has_head else (None, None)
    return MeasuredNode(
        host=control.host,
        layer_s=tuple(seconds for seconds, _ in layers),
        head_s=head_s,
        one_token_layer_s=tuple(seconds for _, seconds in layers),
        one_token_head_s=one_token_head_s,
    )


def _times(config: RunConfig, model_config: Any, device: torch.device, start: int, end: int) -> tuple[float, float]:
    """Seconds for a micro-batch, and for one token, of layers [start, end), or of the head where there are none."""
    weights = WeightFormat.from_config(config.model)
    plan = StagePlan(stage_index=1, node=0, start=start, end=end, is_first=False, is_last=start == end)
    loaded = random_stage(model_config, plan, weights, device=device)
    stage = Stage(plan, loaded, device, model_config.vocab_size)
    shape = (config.batch_size, config.dataset.max_length)
    hidden_size = model_config.hidden_size
    return (
        time_microbatch(stage, shape, hidden_size, weights.dtype, scored=scored_per_window(config)),
        time_one_token(stage, hidden_size, weights.dtype, least=True),
    )
