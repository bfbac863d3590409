"""Which layers run in which stage, and which node holds the stage. Integers and names only.

A plan is a chain of stages; each stage is a half-open range [start, end) of decoder layers on one node, the
first with the embedding, the last with final norm and head. Wherever the node changes there is a link. That
node 0 may own both ends of the chain (the wrap-around plan) is a property of the plan; the runner only follows
stages and links.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["LinkPlan", "PlanError", "Plan", "StagePlan", "default_plan", "explicit_plan"]


class PlanError(ValueError):
    """Layer ranges that do not form a pipeline."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Decoder layers [start, end) on `node`; `is_first` has the embedding, `is_last` final norm and head."""

    stage_index: int
    node: int
    start: int
    end: int
    is_first: bool
    is_last: bool

    @property
    def num_layers(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, kw_only=True)
class LinkPlan:
    """The hop from stage `index` to stage `index + 1`."""

    index: int
    name: str
    src_node: int
    dst_node: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Stages in the order in which hidden states pass them."""

    num_layers: int
    num_nodes: int
    stages: tuple[StagePlan, ...]

    @property
    def links(self) -> tuple[LinkPlan, ...]:
        links = []
        for stage, following in itertools.pairwise(self.stages):
            boundary = f"layer:{stage.end - 1}" if stage.end > 0 else "embed"
            links.append(
                LinkPlan(
                    index=stage.stage_index,
                    name=f"{boundary}:node{stage.node}->node{following.node}",
                    src_node=stage.node,
                    dst_node=following.node,
                )
            )
        return tuple(links)

    @property
    def chain_names(self) -> tuple[str, ...]:
        """Of all links, in the order in which a pass takes them, that of results included where there is one."""
        names = tuple(link.name for link in self.links)
        return names if self.last_node == 0 else (*names, f"result:node{self.last_node}->node0")

    @property
    def last_node(self) -> int:
        """The node with the head. Losses return from there to node 0."""
        return self.stages[-1].node

    def stages_of_node(self, node: int) -> tuple[StagePlan, ...]:
        return tuple(s for s in self.stages if s.node == node)


def default_plan(num_layers: int, num_nodes: int, *, wrap: bool = True) -> Plan:
    """The original benchmark's plan.

    Each node gets `num_layers // num_nodes` layers, the remainder goes one each to nodes 1, 2, ... With `wrap`,
    node 0's share is cut into `share // 2` first layers and the rest last layers; without, node i holds the
    i-th block and the last node the head.
    """
    base, remainder = divmod(num_layers, num_nodes)
    shares = [base + (1 if 1 <= node <= remainder else 0) for node in range(num_nodes)]
    if wrap and num_nodes > 1:
        first = shares[0] // 2
        shares_in_order = [(0, first), *enumerate(shares[1:], 1), (0, shares[0] - first)]
    else:
        shares_in_order = list(enumerate(shares))
    ranges, start = [], 0
    for node, share in shares_in_order:
        ranges.append((node, start, start + share))
        start += share
    return _chain(num_layers, num_nodes, ranges)


def explicit_plan(num_layers: int, layers_of_node: Sequence[Sequence[tuple[int, int]]]) -> Plan:
    """A plan from half-open layer ranges per node, in any order.

    Raises PlanError unless the ranges cover [0, num_layers) once and node 0 holds the first one (it embeds;
    an empty range [0, 0) is allowed).
    """
    ranges = sorted(
        ((node, start, end) for node, own in enumerate(layers_of_node) for start, end in own),
        # Behind the last layer node 0 comes last, as it has the head where it holds both ends.
        key=lambda r: (r[1], r[2], r[0] == 0 and r[1] == num_layers),
    )
    for node, own in enumerate(layers_of_node):
        if not own:
            raise PlanError(
                f"partition.nodes[{node}].layers is empty; for no layers give [k, k], k being the first layer behind it"
            )
    position = 0
    for node, start, end in ranges:
        if end < start:
            raise PlanError(f"partition.nodes[{node}]: range [{start}, {end}) ends before it starts")
        if start != position:
            what = "twice" if start < position else "nowhere"
            at = min(start, position)
            raise PlanError(
                f"partition.nodes[{node}]: range [{start}, {end}) should start at layer {position}; "
                f"layer {at} is held {what}. The ranges must cover [0, {num_layers}) once"
            )
        position = end
    if position != num_layers:
        raise PlanError(f"partition.nodes cover layers [0, {position}), the model has {num_layers}")
    if ranges[0][0] != 0:
        raise PlanError(f"the first layers are on node {ranges[0][0]}; node 0 embeds, so it must hold them")
    return _chain(num_layers, len(layers_of_node), ranges)


def _chain(num_layers: int, num_nodes: int, ranges: Sequence[tuple[int, int, int]]) -> Plan:
    """Stages from (node, start, end) in order; neighbours on one node merge."""
    merged: list[tuple[int, int, int]] = []
    for node, start, end in ranges:
        if merged and merged[-1][0] == node:
            merged[-1] = (node, merged[-1][1], end)
        else:
            merged.append((node, start, end))
    stages = tuple(
        StagePlan(stage_index=i, node=node, start=start, end=end, is_first=i == 0, is_last=i == len(merged) - 1)
        for i, (node, start, end) in enumerate(merged)
    )
    return Plan(num_layers=num_layers, num_nodes=num_nodes, stages=stages)
