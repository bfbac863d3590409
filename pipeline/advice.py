"""`--plan` with figures of links: a config to run, its layers placed and, from a sweep's records, codecs for links.

Above `report`, which reads records, and `runtime`, which plans. What the records measured, codecs' bytes and seconds
and the perplexities that they cost, holds for one codec on all links; a mixture is put together from them and says that
it was not measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.comm.emulation import Conditions
from pipeline.config.reading import with_overrides
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.config.writing import config_yaml
from pipeline.partition.plan import Plan
from pipeline.planner.forecast import Forecast, cuts_of, forecast
from pipeline.planner.problem import LayerCosts, Problem
from pipeline.records.identity import digest_of
from pipeline.records.labels import blocks_text
from pipeline.records.run_record import RunRecord
from pipeline.report.columns import percent
from pipeline.report.measured_point import MeasuredPoint
from pipeline.report.results import Setting, read_results
from pipeline.report.recommendation import Outlook, within_budget
from pipeline.runtime.balance import balanced_plan, planner_problem
from pipeline.runtime.emulation import planned_link
from pipeline.runtime.placement import config_with_plan
from pipeline.runtime.plan_comparison import layers_in_words, rate_in_words
from pipeline.runtime.plan_report import PlannedRun, plan_text
from pipeline.runtime.record_parts import weight_blocks

__all__ = ["Advice", "advise", "advise_with_records", "plan_with_advice"]

_MAX_PPL_INCREASE = 0.01

# Of a token's time with one codec on all links: what a milder one on a link may add to it (objective decode).
_DECODE_SLACK = 0.01


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What to do in words, and a config that does it."""

    lines: tuple[str, ...]
    config: RunConfig

    @property
    def text(self) -> str:
        return "\n".join([*self.lines, "", "# the config, for --config", config_yaml(self.config)])


@dataclass(frozen=True, kw_only=True)
class _Codec:
    """What a record measured of one codec on `links`, as a mean over them: bits and seconds at both ends, per token."""

    spec: str | Mapping[str, Any]
    label: str
    links: tuple[str, ...]
    ppl_ratio: float
    bits: float
    encode_s: float
    decode_s: float


def plan_with_advice(
    run: PlannedRun,
    network: Sequence[Conditions],
    *,
    records: Path | None,
    max_ppl_increase: float | None,
    is_asked_for: bool,
) -> Iterator[str]:
    """`--plan`'s text and a config; only the text where links do not allow a config, and nobody asked for one.

    Raises ValueError, where it is asked for, for what allows none.
    """
    figures = None
    try:
        figures = run.link_figures(network)
        if records is None:
            advice = advise(run, network)
        else:
            increase = _MAX_PPL_INCREASE if max_ppl_increase is None else max_ppl_increase
            advice = advise_with_records(run, network, records, increase)
    except ValueError as e:
        if is_asked_for:
            raise
        yield plan_text(run, figures)
        yield f"note: no config for these links: {e}"
        return
    yield plan_text(run, figures)
    if run.network not in (None, network):
        yield "note: reckoned with --link_rate; the config below still has links of its own, and runs under those"
    yield advice.text


def advise(run: PlannedRun, network: Sequence[Conditions]) -> Advice:
    """The balanced plan for these links of the chain, that of results included, with the config's codecs.

    Raises PlannerError where the nodes' memory holds no plan, ConfigError for another order of nodes.
    """
    problem = planner_problem(run.config, run.model_config, run.measured, links=run.link_figures(network))
    plan = balanced_plan(problem)
    codecs = _renamed(run.config.compressor_per_link, run.plan, plan)
    return Advice(lines=(), config=_with_plan(run, plan, [("compressor_per_link", codecs)]))


def advise_with_records(
    run: PlannedRun, network: Sequence[Conditions], folder: Path, max_ppl_increase: float
) -> Advice:
    """Of the codecs that a sweep's records in `folder` measured within the budget, the fastest on all links, and then
    on every link the mildest that makes nothing slower or, for `decode`, a token by 1% at most.

    Raises ConfigError where the records are of another model, none is within the budget, or for another order of nodes
    than the planner's.
    """
    run.check_order()
    outlook = Outlook(max_ppl_increase=max_ppl_increase)
    setting = _setting(run, folder)
    usable = [point for point in setting.points if _is_usable(point.record, run.config)]
    points = [point for point in usable if within_budget(point, outlook)]
    objective = run.config.partition.objective
    codecs = [codec for point in points if (codec := _measured_codec(point, objective)) is not None]
    budget = f"within +{100 * max_ppl_increase:g}% perplexity"
    if not codecs:
        where = "on all links alike, without slowdown and, where it needs importance, with this config's importance"
        raise ConfigError(f"{folder}: no codec of {setting.title} was measured {budget}, {where}")
    base = planner_problem(run.config, run.model_config, run.measured)
    origin = "node costs as measured before"
    if run.measured is None:
        base = dataclasses.replace(base, costs=_costs_of(base.costs, _costs_record(usable), objective))
        origin = f"node costs of speed 1 as in {folder}"
    tried = [(codec, _best(base, codec, network)) for codec in codecs]
    codec, (plan, made) = min(tried, key=lambda one: (one[1][1].s_per_token, one[0].ppl_ratio))
    chosen = _milder(base, plan, [codec] * len(plan.links), codecs, network)
    problem = _problem(base, chosen, network)
    lines = [
        "",
        f"codecs {budget}, from {setting.title} ({origin}):",
        f"fastest on all links: {codec.label}, perplexity {percent(codec.ppl_ratio - 1)}: {rate_in_words(base, made)}",
        f"layers: {'; '.join(f'node {n} {layers_in_words(plan, n)}' for n in range(plan.num_nodes))}",
    ]
    per_link = {link.name: own.spec for link, own in zip(plan.links, chosen, strict=True) if own is not codec}
    price = "no token takes longer" if objective == "prefill" else f"costs at most {100 * _DECODE_SLACK:g}% of a token"
    for link, own in zip(plan.links, chosen, strict=True):
        lines.append(f"{link.name:<25}  {own.label}{'' if own is codec else f', milder: {price}'}")
    if per_link:
        mixed = forecast(problem, cuts_of(problem, plan))
        lines.append(f"so mixed: {rate_in_words(base, mixed)}")
        lines.append("This mixture was not measured, nor was its perplexity: run it before you rely on it.")
    if any(own.links != tuple(link.name for link in plan.links) for own in chosen):
        lines.append("Perplexities were measured with links behind other layers: run it before you rely on them.")
    codecs_set = [("compressor", codec.spec), ("compressor_per_link", per_link), ("compressor_decode", None)]
    return Advice(lines=tuple(lines), config=_with_plan(run, plan, codecs_set))


def _setting(run: PlannedRun, folder: Path) -> Setting:
    """The records' setting that is of this model."""
    config, model_config = run.config, run.model_config
    results = read_results([folder])
    shape = (model_config.model_type, model_config.hidden_size, model_config.num_hidden_layers)
    of_model = [
        setting
        for setting in results.settings
        for model in [setting.points[0].record.model]
        if (model.model_type, model.hidden_size, model.num_hidden_layers) == shape
    ]
    model = config.model
    held = (model.dtype, model.load_in_8bit, model.load_in_4bit, weight_blocks(model, model_config))
    alike = [
        setting
        for setting in of_model
        for record in [setting.points[0].record]
        if (record.args.dtype, record.args.load_in_8bit, record.args.load_in_4bit, record.model.blocks) == held
        and record.protocol.mode == "window"  # whose seconds are those of a long text
    ]
    if not alike:
        raise ConfigError(
            f"{folder} has no records of this model ({shape[0]}, {shape[2]} layers, hidden size {shape[1]}, "
            f"{model.dtype}{blocks_text(held[-1])}); run a sweep of codecs first, with --sweep"
        )
    if len(alike) > 1:
        titles = "; ".join(setting.title for setting in alike)
        raise ConfigError(f"{folder} has records of several settings, name a folder of one: {titles}")
    return alike[0]


def _is_usable(record: RunRecord, own: RunConfig) -> bool:
    """Whether one codec was on all links, with the importance that it would have in the own config, if it needs any,
    and seconds are the nodes' own, not those of an emulated `slowdown`.
    """
    config, emulation = record.args.config, record.emulation
    if record.importance and digest_of(config.importance.model_dump()) != digest_of(dataclasses.asdict(own.importance)):
        return False
    is_slowed = emulation is not None and any(times != 1 for times in emulation.slowdown)
    return not config.compressor_per_link and config.compressor_decode is None and not is_slowed


def _measured_codec(point: MeasuredPoint, objective: str) -> _Codec | None:
    """None where the run measured no link, or no single token for `decode`."""
    record, costs = point.record, point.costs
    if costs is None or point.quality is None:
        return None
    num_links, nbytes = len(record.traffic_per_link), sum(costs.link_bytes.values())
    if objective == "prefill":
        tokens = record.timed_tokens or 1
        times = list(record.stages.values())
        encode_s = sum(stage.compress_s + stage.importance_s for stage in times) / tokens
        decode_s = sum(stage.decompress_s for stage in times) / tokens
    elif record.one_token is not None and costs.one_token is not None:
        nbytes = sum(costs.one_token.link_bytes.values())
        encode_s = sum(stage.compress_s for stage in record.one_token.stages.values())
        decode_s = sum(stage.decompress_s for stage in record.one_token.stages.values())
    else:
        return None
    return _Codec(
        spec=record.args.config.compressor,
        label=point.codecs,
        links=tuple(record.traffic_per_link),
        ppl_ratio=point.quality.ppl_ratio,
        bits=8 * nbytes / num_links,
        encode_s=encode_s / num_links,
        decode_s=decode_s / num_links,
    )


def _costs_record(points: Sequence[MeasuredPoint]) -> RunRecord:
    """Of the uncompressed point, whose stages are disturbed least."""
    return next(
        (p.record for p in points if p.uncompressed and p.costs is not None),
        next(p.record for p in points if p.costs is not None),
    )


def _costs_of(costs: LayerCosts, record: RunRecord, objective: str) -> LayerCosts:
    """Seconds as a record's stages took them, on nodes that were alike: layers from the stages without head, by their
    reckoned costs, and what the last stage took beyond its layers for the head.
    """
    if objective == "prefill":
        tokens = record.timed_tokens or 1
        own = {name: stage.compute_s / tokens for name, stage in record.stages.items()}
    elif record.one_token is not None:
        own = {name: stage.compute_s for name, stage in record.one_token.stages.items()}
    else:
        return costs
    *before, last = [
        (own[str(stage.stage)], sum(costs.layer_s[stage.layers[0] : stage.layers[1]])) for stage in record.plan
    ]
    reckoned = sum(layers for _, layers in before)
    if not reckoned:
        scale = sum(own.values()) / (sum(costs.layer_s) + costs.head_s)
        head_s = costs.head_s * scale
    else:
        scale = sum(seconds for seconds, _ in before) / reckoned
        head_s = max(0.0, last[0] - scale * last[1])
    return dataclasses.replace(
        costs, layer_s=tuple(scale * seconds for seconds in costs.layer_s), embedding_s=0.0, head_s=head_s
    )


def _problem(base: Problem, codecs: Sequence[_Codec], network: Sequence[Conditions]) -> Problem:
    """With these codecs on the links, and their work at the nodes."""
    fixed = [0.0] * len(base.nodes)
    for index, codec in enumerate(codecs):
        source, target = base.stage_nodes[index : index + 2]
        fixed[source] += codec.encode_s / base.nodes[source].speed
        fixed[target] += codec.decode_s / base.nodes[target].speed
    return dataclasses.replace(
        base,
        nodes=tuple(dataclasses.replace(n, fixed_s=s) for n, s in zip(base.nodes, fixed, strict=True)),
        links=tuple(planned_link(link, codec.bits) for link, codec in zip(network[: len(codecs)], codecs, strict=True)),
        return_delay_s=sum(link.delay_s for link in network[len(codecs) :]),
    )


def _best(base: Problem, codec: _Codec, network: Sequence[Conditions]) -> tuple[Plan, Forecast]:
    problem = _problem(base, [codec] * len(base.links), network)
    plan = balanced_plan(problem)
    return plan, forecast(problem, cuts_of(problem, plan))


def _milder(
    base: Problem, plan: Plan, chosen: list[_Codec], codecs: Sequence[_Codec], network: Sequence[Conditions]
) -> list[_Codec]:
    """Link by link the codec with the least perplexity that is free: with which no token takes longer or, for
    `decode`, where every second counts, longer by `_DECODE_SLACK` at most.
    """
    chosen = list(chosen)

    def s_per_token(mixture: Sequence[_Codec]) -> float:
        problem = _problem(base, mixture, network)
        return forecast(problem, cuts_of(problem, plan)).s_per_token

    slack_s = s_per_token(chosen) * (_DECODE_SLACK if base.objective == "decode" else 1e-9)
    for index, current in enumerate(chosen):
        allowed_s = s_per_token(chosen) + slack_s
        for codec in sorted(codecs, key=lambda c: c.ppl_ratio):
            if codec.ppl_ratio >= current.ppl_ratio:
                break
            mixture = [*chosen[:index], codec, *chosen[index + 1 :]]
            if s_per_token(mixture) <= allowed_s:
                chosen = mixture
                break
    return chosen


def _with_plan(run: PlannedRun, plan: Plan, codecs: Sequence[tuple[str, Any]]) -> RunConfig:
    """The run's config with a plan's layers and these keys of codecs; what it says of links stays with their places."""
    links = _renamed(run.config.links_per_link, run.plan, plan)
    return with_overrides(config_with_plan(run.config, plan), [("links_per_link", links), *codecs])


def _renamed(per_link: Mapping[str, Any], before: Plan, after: Plan) -> dict[str, Any]:
    """By the names that the links have in another plan, place by place in the chain."""
    names = dict(zip(before.chain_names, after.chain_names, strict=True)) if per_link else {}
    return {names[name]: own for name, own in per_link.items()}
