"""What a placement comes to: seconds at each node and link, bytes at each node, and what binds.

The formulas are those of `report.prediction`, on planned seconds in place of measured ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.partition.plan import Plan
from pipeline.planner.problem import PlannerError, Problem

__all__ = ["Forecast", "cuts_of", "forecast", "layers_of_node"]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Of one placement. `s_per_token` is what the objective minimises; `binds` names its largest term.

    `node_s` and `link_s` are seconds per token, in the order of nodes and links, `lap_s` those of a lap over what is
    in flight (`prefill`) or of the delays that one token meets (`decode`).
    """

    node_s: tuple[float, ...]
    link_s: tuple[float, ...]
    lap_s: float
    node_bytes: tuple[int, ...]
    s_per_token: float
    binds: str

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.s_per_token if self.s_per_token else math.inf


def forecast(problem: Problem, cuts: Sequence[int]) -> Forecast:
    """Of the placement whose stage i has layers [cuts[i], cuts[i + 1])."""
    costs = problem.costs
    weights, nbytes = [0.0] * len(problem.nodes), [0] * len(problem.nodes)
    for index, node in enumerate(problem.stage_nodes):
        weights[node] += sum(costs.layer_s[cuts[index] : cuts[index + 1]])
        nbytes[node] += sum(costs.layer_bytes[cuts[index] : cuts[index + 1]])
    node_s = tuple(
        (weights[i] + problem.end_s(i)) / node.speed + node.fixed_s for i, node in enumerate(problem.nodes)
    )
    link_s = tuple(link.s_per_token for link in problem.links)
    terms = {f"node {node}": seconds for node, seconds in enumerate(node_s)}
    terms |= {f"link {index}": seconds for index, seconds in enumerate(link_s)}
    if problem.objective == "prefill":
        lap_s = (sum(node_s) + sum(link_s)) / problem.in_flight
        lap_s += problem.delays_s / problem.microbatch_tokens / problem.in_flight
        terms["in flight"] = lap_s
        s_per_token = max(terms.values())
    else:
        lap_s = terms["delays"] = problem.delays_s
        s_per_token = sum(terms.values())
    return Forecast(
        node_s=node_s,
        link_s=link_s,
        lap_s=lap_s,
        node_bytes=tuple(own + problem.end_bytes(node) for node, own in enumerate(nbytes)),
        s_per_token=s_per_token,
        binds=max(terms, key=lambda name: terms[name]),
    )


def cuts_of(problem: Problem, plan: Plan) -> tuple[int, ...]:
    """Of a plan whose stages are those of the problem. Raises PlannerError for another one."""
    nodes = tuple(stage.node for stage in plan.stages)
    if nodes != problem.stage_nodes or plan.num_layers != problem.num_layers:
        raise PlannerError(f"the plan's stages are on nodes {nodes}, the problem's on {problem.stage_nodes}")
    return (0, *(stage.end for stage in plan.stages))


def layers_of_node(problem: Problem, cuts: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Half-open ranges by node, as `partition.explicit_plan` takes them."""
    ranges: list[list[tuple[int, int]]] = [[] for _ in problem.nodes]
    for index, node in enumerate(problem.stage_nodes):
        ranges[node].append((cuts[index], cuts[index + 1]))
    return ranges
