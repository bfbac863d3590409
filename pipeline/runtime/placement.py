"""Which layers, how many processes and how many passes at once a config asks for."""

from __future__ import annotations

import dataclasses
from typing import Any

from pipeline.comm.world import World
from pipeline.config.reading import with_overrides
from pipeline.config.schema import ConfigError, NodeConfig, PartitionConfig, RunConfig
from pipeline.partition.plan import Plan, default_plan, explicit_plan
from pipeline.partition.schedule import passes_in_flight
from pipeline.records.node_costs import NodeCosts
from pipeline.runtime.balance import balanced_plan, planner_problem

__all__ = ["balanced_layers", "check_world_size", "config_with_plan", "credits_of", "make_plan"]


def make_plan(config: RunConfig, model_config: Any, measured: NodeCosts | None = None) -> Plan:
    """The plan that `partition` asks for, a balanced one from what nodes were measured to take, or from sizes alone.

    Raises PlanError for bad ranges, PlannerError where no placement fits.
    """
    partition, num_layers = config.partition, model_config.num_hidden_layers
    layers = [node.layers for node in partition.nodes if node.layers is not None]
    if layers:
        return explicit_plan(num_layers, layers)
    if partition.plan == "balanced":
        return balanced_plan(planner_problem(config, model_config, measured))
    return default_plan(num_layers, partition.num_nodes, wrap=partition.wrap)


def balanced_layers(config: RunConfig, plan: Plan) -> list[list[tuple[int, int]]] | None:
    """The ranges by node that a balanced plan has come to, for `RunConfig.numerics`; None where the config has them."""
    if config.partition.plan != "balanced":
        return None
    return [[(stage.start, stage.end) for stage in plan.stages_of_node(node)] for node in range(plan.num_nodes)]


def config_with_plan(config: RunConfig, plan: Plan) -> RunConfig:
    """The config with a plan's ranges in it, in place of what it says of how to find one. Raises ConfigError."""
    nodes = []
    for index, node in enumerate(config.partition.nodes or (NodeConfig(),) * plan.num_nodes):
        ranges = [[stage.start, stage.end] for stage in plan.stages_of_node(index)]
        nodes.append({**dataclasses.asdict(node), "layers": ranges, "speed": None, "memory": None})
    section = {"plan": PartitionConfig.plan, "objective": PartitionConfig.objective, "nodes": nodes}
    return with_overrides(config, [("partition", section)])


def check_world_size(config: RunConfig, world: World) -> None:
    """Raise ConfigError unless there is one process per node, or one for all."""
    num_nodes = config.partition.num_nodes
    if world.world_size not in (1, num_nodes):
        raise ConfigError(
            f"partition.num_nodes is {num_nodes}, but torchrun started {world.world_size} processes: use "
            f"--nproc_per_node={num_nodes} (one process per node, counted over all machines), "
            f"--nproc_per_node=1, or --set partition.num_nodes={world.world_size}"
        )


def credits_of(config: RunConfig, plan: Plan, world: World) -> int:
    """Passes that the engine may have in flight. One process takes each to its end: more would only lie about.

    Raises ScheduleError for a setting that would deadlock.
    """
    if world.world_size == 1:
        return 1
    runtime = config.runtime
    return passes_in_flight(
        plan, runtime.in_flight, receives_ahead=runtime.receives_ahead, world_size=world.world_size
    )
