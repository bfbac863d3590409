"""Which layers and how many processes a config asks for."""

from __future__ import annotations

from pipeline.comm.world import World
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.partition.plan import Plan, default_plan, explicit_plan

__all__ = ["check_world_size", "make_plan"]


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
