"""Which links and devices a config emulates, in numbers; where that cannot be done, why."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.comm.emulation import Conditions
from pipeline.comm.world import World
from pipeline.config.schema import ConfigError, LinkConfig, RunConfig
from pipeline.config.units import parse_duration, parse_rate
from pipeline.partition.plan import Plan
from pipeline.planner.problem import LinkFigures

__all__ = ["check_emulation", "emulated_links", "planned_link", "receives_ahead_of", "slowdown_of"]


def check_emulation(config: RunConfig, world: World) -> None:
    """Raise ConfigError where what is asked for cannot be emulated."""
    slow = [f"partition.nodes[{i}].slowdown" for i, node in enumerate(config.partition.nodes) if node.slowdown != 1]
    thin = ["links"] if config.links.is_emulated else ["links_per_link"] if config.links_per_link else []
    if (thin or slow) and world.world_size == 1 and config.partition.num_nodes > 1:
        raise ConfigError(
            f"{(thin + slow)[0]} emulates nodes apart, but one process plays all {config.partition.num_nodes}: start "
            f"torchrun with --nproc_per_node={config.partition.num_nodes}"
        )
    if thin and world.local_world_size < world.world_size:
        raise ConfigError(
            f"{thin[0]} emulates a network between ranks of one machine, by its clock; these ranks are on several, "
            "whose links are what they are"
        )
    if thin and config.runtime.backend == "nccl":
        raise ConfigError(f"{thin[0]}: links are emulated over Gloo, not over NCCL; set runtime.backend to gloo")


def emulated_links(config: RunConfig, plan: Plan) -> dict[int, Conditions]:
    """By index in the chain, the link of results included. Raises ConfigError for the name of no link."""
    unknown = sorted(config.links_per_link.keys() - set(plan.chain_names), key=str)
    if unknown:
        raise ConfigError(
            f"links_per_link has {unknown[0]!r}; this plan's links are: {', '.join(plan.chain_names) or 'none'}"
        )
    links = {index: config.link_of(name) for index, name in enumerate(plan.chain_names)}
    return {index: _conditions(link) for index, link in links.items() if link.is_emulated}


def planned_link(conditions: Conditions, bits: float) -> LinkFigures:
    """As the planner takes a link that `bits` cross for each token. Jitter is as often a gain, and left out."""
    s_per_token = 0.0 if conditions.bits_per_s is None else bits / conditions.bits_per_s
    return LinkFigures(s_per_token=s_per_token, delay_s=conditions.delay_s)


def slowdown_of(config: RunConfig, world: World) -> float:
    """How many times as long this rank takes to compute."""
    nodes = config.partition.nodes
    return nodes[world.rank].slowdown if nodes else 1.0


def receives_ahead_of(config: RunConfig, emulated: Mapping[int, Conditions], *, credits: int) -> int:
    """Receives posted per link: where links are emulated, as many as passes, since all may be on their way at once."""
    ahead = config.runtime.receives_ahead
    return max(ahead, credits) if emulated else ahead


def _conditions(link: LinkConfig) -> Conditions:
    return Conditions(
        bits_per_s=None if link.rate is None else parse_rate(link.rate),
        delay_s=parse_duration(link.delay),
        jitter_s=parse_duration(link.jitter),
    )
