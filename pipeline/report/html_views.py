"""What the page's templates show and do not work out themselves: charts, predictions, times, facts.

Between results, predictions and charts on one side and `page/*.html.jinja` on the other, which call these functions by
their names. Values only; how they look is said there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from markupsafe import Markup

from pipeline.records.labels import weights_label
from pipeline.report.charts import ChartPoint, trade_off_svg
from pipeline.report.columns import Column, shown, significant
from pipeline.report.generation import drafter_table
from pipeline.report.tasks import TasksTable, tasks_tables
from pipeline.report.measured_point import PHASES, MeasuredPoint
from pipeline.report.point_columns import SHOWN_COLUMNS
from pipeline.report.prediction import Network, emulated_network
from pipeline.report.published import read_published
from pipeline.report.recommendation import Outlook, fastest, predict, predicted_figure, within_budget
from pipeline.report.results import Results, Setting

__all__ = [
    "Bars",
    "EmulatedNetwork",
    "NetworkCell",
    "NetworkRow",
    "Panel",
    "bar_title",
    "columns_with_values",
    "drafters",
    "emulated_networks",
    "facts",
    "generation_notes",
    "link_groups",
    "measured_panel",
    "middle_network",
    "network_rows",
    "own_link",
    "published_panel",
    "short_link",
    "shown",
    "tasks",
    "terms",
    "time_bars",
    "without_quality",
]

_CHART_SIZES = (("wide", 556, 400), ("narrow", 350, 380))
_PUBLISHED_TOKENS = 10_000  # the text on which all methods were run


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart for wide and one for narrow screens, since text has one size on both; none where nothing can be drawn.

    `charts` are pairs of the screen's class and the SVG.
    """

    name: str
    caption: str
    charts: list[tuple[str, Markup]]


def measured_panel(setting: Setting) -> Panel:
    """A mark per point, but one for all that differ in what was emulated alone, on which neither bytes nor quality
    depend: their marks would hide each other and pass for other codecs.
    """
    alike: dict[tuple[Any, ...], list[MeasuredPoint]] = {}
    repeats: Counter[tuple[Any, ...]] = Counter()
    for point in setting.points:
        key = (point.codecs, point.bits_per_value, point.ppl, point.causal)
        alike.setdefault((*key, repeats[*key, point.emulated]), []).append(point)
        repeats[*key, point.emulated] += 1
    points = [
        ChartPoint(
            label=members[0].label if len(members) == 1 else f"{members[0].codecs} ({len(members)} runs)",
            bits_per_value=members[0].bits_per_value,
            ppl=members[0].ppl,
            causal=members[0].causal,
            detail="\n\n".join(map(_detail, members)),
        )
        for members in alike.values()
        if members[0].bits_per_value is not None
    ]
    base = setting.baseline.ppl if setting.baseline else None
    return _panel("Measured", setting.prefix + setting.title, points, setting.hidden_size, base)


def _detail(point: MeasuredPoint) -> str:
    return "\n".join(f"{c.heading}: {c.text(point)}" for c in SHOWN_COLUMNS if c.has_value(point))


def published_panel() -> Panel:
    figures = read_published()
    published = [point for point in figures.points if point.first_k_tokens == _PUBLISHED_TOKENS]
    points = [
        ChartPoint(
            label=_short_method(point.method),
            bits_per_value=point.bits_per_value,
            ppl=point.ppl,
            causal=point.causal,
            detail=f"{point.method} ({point.dtype})\nperplexity: {significant(point.ppl, 4)}\n"
            f"bytes/token per link: {point.bytes_per_token:,.1f}\nbits/value: {point.bits_per_value:.3f}",
        )
        for point in published
    ]
    caption = (
        f"{figures.model}, 8-bit weights, first {_PUBLISHED_TOKENS:,} tokens of WikiText-2, windows "
        f"{figures.max_length}/{figures.stride}, {figures.hardware}. The original benchmark's figures; "
        f"its sizes were computed, nothing was sent. Source: {figures.source}."
    )
    base = next(point.ppl for point in published if point.method == "none_bf16")
    return _panel("Published for Qwen3-32B", caption, points, figures.hidden_size, base)


def _panel(name: str, caption: str, points: Sequence[ChartPoint], hidden_size: int, base_ppl: float | None) -> Panel:
    charts = []
    for size, width, height in _CHART_SIZES:
        svg = trade_off_svg(points, hidden_size=hidden_size, base_ppl=base_ppl, width=width, height=height, title=name)
        if svg:
            charts.append((size, Markup(svg)))
    return Panel(name=name, caption=caption, charts=charts)


def _short_method(name: str) -> str:
    """A published method's name without its library's, for a label in the chart."""
    for prefix in ("TorchAO_", "torchao_", "bnb_", "BlockRowCol"):
        name = name.removeprefix(prefix)
    return name


def columns_with_values(results: Results) -> list[Column[MeasuredPoint]]:
    """Of the points' table, those that say something of any point."""
    return [column for column in SHOWN_COLUMNS if any(map(column.has_value, results.points))]


def without_quality(results: Results) -> list[str]:
    """Which points have no figures of quality, and why."""
    return sorted({f"{point.label}: {point.quality_note}" for point in results.points if point.quality_note})


def drafters(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings and rows (`drafter_table`)."""
    return drafter_table(results.generated)


def generation_notes(results: Results) -> list[str]:
    return sorted({note for run in results.generated for note in run.notes})


def tasks(results: Results) -> list[TasksTable]:
    """Scores by setting (`tasks_tables`)."""
    return tasks_tables(results.tasks)


@dataclass(frozen=True, kw_only=True)
class NetworkCell:
    """What a point would do on a network; `is_best` of its setting's points within the budget."""

    figure: float | None
    binds: str
    is_best: bool = False


@dataclass(frozen=True, kw_only=True)
class NetworkRow:
    setting: Setting
    point: MeasuredPoint
    is_within_budget: bool
    cells: list[NetworkCell]


def middle_network(outlook: Outlook) -> tuple[float, float]:
    """Mbit/s and ms that the reader's own network begins with."""
    return outlook.bandwidths_mbits[len(outlook.bandwidths_mbits) // 2], outlook.rtts_ms[0]


def own_link(results: Results, outlook: Outlook) -> list[NetworkRow]:
    """Per point: prefill and decoding on the network in the middle."""
    mbits, rtt_ms = middle_network(outlook)
    network = Network(bits_per_s=mbits * 1e6, rtt_s=rtt_ms / 1e3)
    return [
        NetworkRow(
            setting=setting,
            point=point,
            is_within_budget=within_budget(point, outlook),
            cells=[_cell(point, network, decode=decode) for decode in (False, True)],
        )
        for setting, point in _with_costs(results)
    ]


def network_rows(results: Results, outlook: Outlook, *, decode: bool) -> list[NetworkRow]:
    """Per point: what it would do on each of the report's networks. None where no run measured what that takes."""
    best = [
        {id(fastest(setting.points, network, outlook, decode=decode)) for setting in results.settings}
        for _, network in outlook.networks
    ]
    rows = []
    for setting, point in _with_costs(results):
        cells = [
            _cell(point, network, decode=decode, is_best=id(point) in winners)
            for (_, network), winners in zip(outlook.networks, best, strict=True)
        ]
        row = NetworkRow(setting=setting, point=point, is_within_budget=within_budget(point, outlook), cells=cells)
        rows.append(row)
    return rows if any(cell.binds for row in rows for cell in row.cells) else []


def _cell(point: MeasuredPoint, network: Network, *, decode: bool, is_best: bool = False) -> NetworkCell:
    prediction = predict(point, network, decode=decode)
    return NetworkCell(
        figure=predicted_figure(prediction, decode=decode),
        binds=prediction.binds if prediction else "",
        is_best=is_best,
    )


@dataclass(frozen=True, kw_only=True)
class EmulatedNetwork:
    """A network that points were under; `links` are all of a lap, by name: bits per second, or None for as fast as the
    machine, and seconds from one end to the other.
    """

    name: str
    links: dict[str, tuple[float | None, float]]


def emulated_networks(results: Results) -> list[EmulatedNetwork]:
    """What the reader may choose beside a network of their own."""
    networks: list[EmulatedNetwork] = []
    for _, point in _with_costs(results):
        emulation = point.record.emulation
        if emulation is None or not emulation.links or point.costs is None:
            continue
        network = emulated_network(emulation)
        ways = {name: network.way(name) for name in point.costs.hops}
        links = {
            name: (way.bits_per_s if math.isfinite(way.bits_per_s) else None, way.delay_s) for name, way in ways.items()
        }
        if all(known.links != links for known in networks):
            networks.append(EmulatedNetwork(name=point.network, links=links))
    return networks


def terms(results: Results) -> list[dict[str, Any]]:
    """What the page's script evaluates, in the order of `own_link`."""
    return [
        {
            "prefill": [asdict(term) for term in point.costs.prefill_terms],
            "decode": [asdict(term) for term in point.costs.decode_terms],
        }
        for _, point in _with_costs(results)
        if point.costs
    ]


def _with_costs(results: Results) -> list[tuple[Setting, MeasuredPoint]]:
    return [(setting, point) for setting, point in results.members if point.costs]


def short_link(name: str) -> str:
    """A link without its nodes; another name as it is."""
    return name.partition(":node")[0] if name.startswith(("layer:", "embed:")) else name


def link_groups(results: Results) -> list[tuple[tuple[str, ...], list[tuple[Setting, MeasuredPoint]]]]:
    """Points that have the same links, with these; points without links are left out."""
    groups: dict[tuple[str, ...], list[tuple[Setting, MeasuredPoint]]] = {}
    for setting, point in results.members:
        groups.setdefault(tuple(point.links), []).append((setting, point))
    return [(links, members) for links, members in groups.items() if links]


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Time per stage: the phases that took any, all stages, and the seconds of the longest bar."""

    phases: list[str]
    stages: list[int]
    longest_s: float


def time_bars(results: Results) -> Bars:
    times = [seconds for point in results.points for seconds in point.stage_seconds.values()]
    return Bars(
        phases=[phase for phase in PHASES if any(seconds[phase] for seconds in times)],
        stages=sorted({stage for point in results.points for stage in point.stage_seconds}),
        longest_s=max(sum(seconds.values()) for seconds in times) or 1.0,
    )


def bar_title(seconds: Mapping[str, float], bars: Bars) -> str:
    return ", ".join(f"{phase} {significant(seconds[phase])} s" for phase in bars.phases)


def facts(setting: Setting) -> list[tuple[str, str]]:
    """Names and values: what the setting's points were run on."""
    records = [point.record for point in setting.points]
    first, dataset = records[0], records[0].dataset
    hosts = sorted({(rank.host, rank.threads) for record in records for rank in record.ranks})
    versions = sorted({", ".join(f"{k} {v}" for k, v in sorted(record.versions.items())) for record in records})
    layers = ", ".join(f"node {stage.node}: {stage.layers[0]}-{stage.layers[1] - 1}" for stage in first.plan)
    protocol = {key: value for key, value in first.protocol.model_dump().items() if value is not None}
    return [
        ("model", first.args.model_name),
        ("checkpoint", first.model.checkpoint_fingerprint),
        ("weights", weights_label(first)),
        ("text", f"{dataset.description}, {dataset.num_tokens:,} tokens"),
        ("text, SHA-256", dataset.text_sha256),
        ("token ids, SHA-256", dataset.ids_sha256),
        ("protocol", ", ".join(f"{key} {value}" for key, value in protocol.items())),
        ("layers, first point", layers),
        ("backend", ", ".join(sorted({record.backend for record in records}))),
        ("ranks per point", ", ".join(sorted({str(len(record.ranks)) for record in records}))),
        ("hosts", ", ".join(f"{host} ({threads} threads a rank)" for host, threads in hosts)),
        *(("versions", text) for text in versions),
    ]
