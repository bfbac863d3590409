"""The default plan beside the balanced one: layers, seconds and bytes at every node, what binds. Part of `--plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import RunConfig
from pipeline.partition.plan import Plan, PlanError, default_plan
from pipeline.planner.forecast import Forecast, cuts_of, forecast
from pipeline.planner.problem import LinkFigures, PlannerError, Problem
from pipeline.records.node_costs import NodeCosts
from pipeline.runtime.balance import ASSUMED_BYTES_PER_S, ASSUMED_FLOPS, balanced_plan, planner_problem

__all__ = ["comparison_lines", "gib", "layers_in_words", "rate_in_words"]


@dataclass(frozen=True, kw_only=True)
class _Column:
    name: str
    plan: Plan
    forecast: Forecast


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"


def layers_in_words(plan: Plan, node: int) -> str:
    """`0-2, 27-29`."""
    stages = [stage for stage in plan.stages_of_node(node) if stage.num_layers]
    return ", ".join(
        f"{s.start}-{s.end - 1}" if s.num_layers > 1 else f"{s.start}" for s in stages
    ) or "none"


def rate_in_words(problem: Problem, made: Forecast) -> str:
    """Tokens per second of a long text, or the milliseconds of one token, and what binds."""
    if problem.objective == "prefill":
        return f"{made.tokens_per_s:,.4g} tokens/s, {made.binds} binds"
    return f"{1e3 * made.s_per_token:.4g} ms a token, most of it {made.binds}"


def comparison_lines(
    config: RunConfig,
    model_config: Any,
    plan: Plan,
    measured: NodeCosts | None,
    links: Sequence[LinkFigures] | None,
) -> list[str]:
    """Of the default plan, the balanced one and, where it is neither, the config's `plan`; none for a single node."""
    if config.partition.num_nodes == 1:
        return []
    problem = planner_problem(config, model_config, measured, links=links)
    columns, problems = _columns(config, problem, plan)
    lines = ["", f"where the layers go ({problem.objective}; {_origin(problem, measured)}):"]
    lines += [_row("node", [f"{c.name:<16}  ms/token  weights " for c in columns])]
    for node, figures in enumerate(problem.nodes):
        cells = [
            f"{layers_in_words(c.plan, node):<16}  {1e3 * c.forecast.node_s[node]:<8.4g}  "
            f"{gib(c.forecast.node_bytes[node])}"
            for c in columns
        ]
        speed = "" if figures.speed == 1 else f" (speed {figures.speed:.3g})"
        lines.append(_row(f"{node}{speed}", cells))
    if links is not None:
        for index, seconds in enumerate(columns[0].forecast.link_s):
            lines.append(_row(f"link {index}", [f"{'':<16}  {1e3 * seconds:<8.4g}"] * len(columns)))
    what = "in flight" if problem.objective == "prefill" else "delays"
    lines.append(_row(what, [f"{'':<16}  {1e3 * c.forecast.lap_s:<8.4g}" for c in columns]))
    lines += [f"{c.name}: {rate_in_words(problem, c.forecast)}" for c in columns]
    if links is None:
        lines.append("links were taken as free; `links` of a config or --link_rate and --link_delay say what they cost")
    return lines + problems


def _columns(config: RunConfig, problem: Problem, plan: Plan) -> tuple[list[_Column], list[str]]:
    """Plans to compare, and what there is to say of those that cannot be."""
    default = default_plan(problem.num_layers, len(problem.nodes), wrap=problem.wrap)
    plans, problems = {"default": default}, []
    try:
        plans["balanced"] = balanced_plan(problem)
    except PlannerError as e:
        problems.append(f"no balanced plan: {e}")
    if plan not in plans.values():
        plans["this config"] = plan
    columns = []
    for name, one in plans.items():
        try:
            columns.append(_Column(name=name, plan=one, forecast=forecast(problem, cuts_of(problem, one))))
        except (PlanError, PlannerError):
            problems.append(f"{name}: its order of nodes is not that of the ring, so it is not compared")
    return columns, problems


def _origin(problem: Problem, measured: NodeCosts | None) -> str:
    if measured is not None:
        return f"node costs as measured at {measured.measured_at}"
    if problem.objective == "prefill":
        return f"reckoned from the model's shape, {ASSUMED_FLOPS / 1e9:g} GFLOP/s at speed 1"
    return f"reckoned from the model's shape, {ASSUMED_BYTES_PER_S / 1e9:g} GB/s of weights at speed 1"


def _row(head: str, cells: Sequence[str]) -> str:
    return "  ".join([f"{head:<18}", *(f"{cell:<37}" for cell in cells)]).rstrip()
