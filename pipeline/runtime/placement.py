"""Which layers, how many processes and how many passes at once a config asks for."""

from __future__ import annotations

from pipeline.comm.world import World
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.partition.plan import Plan, default_plan, explicit_plan
from pipeline.partition.schedule import passes_in_flight

__all__ = ["check_world_size", "credits_of", "make_plan"]


def make_plan(config: RunConfig, num_layers: int) -> Plan:
    """The plan that `partition` asks for."""
    partition = config.partition
    layers = [node.layers for node in partition.nodes if node.layers is not None]
    if layers:
        return explicit_plan(num_layers, layers)
    return default_plan(num_layers, partition.num_nodes, wrap=partition.wrap)


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
