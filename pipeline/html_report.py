"""The report page: one HTML file with its style, script and charts inside; nothing is loaded from elsewhere.

Takes `Results` and lays them out. All text passes `_escape`, since codec names, paths and messages are the user's. Without
JavaScript the page shows everything but sorting, tooltips and the reader's own bandwidth.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape as _escape
from pathlib import Path

from pipeline import prediction
from pipeline.charts import ChartPoint, trade_off_svg
from pipeline.columns import MISSING, SHOWN_COLUMNS, percent, significant
from pipeline.outlook import Outlook, fastest, recommendation_text, within_budget
from pipeline.prediction import Network, predict_decode, predict_prefill
from pipeline.published import read_published
from pipeline.results import MeasuredPoint, Results, Setting

__all__ = ["html_page"]

_ASSETS = Path(__file__).parent / "page"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_PHASES = (
    ("compute", "compute_s"),
    ("importance", "importance_s"),
    ("encode", "compress_s"),
    ("decode", "decompress_s"),
    ("wait", "wait_s"),
)
_CHART_SIZES = (("wide", 556, 400), ("narrow", 350, 380))


def html_page(results: Results, outlook: Outlook) -> str:
    """The whole page."""
    sections = [_header(results), _problems(results)]
    if results.settings:
        sections += [
            *(_answer(setting, outlook) for setting in results.settings),
            _trade_off(results),
            _points_table(results),
            _link_section(results, outlook),
            _traffic(results),
            _times(results),
            _provenance(results),
        ]
    sections.append(_method(outlook))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Thinwire report</title>\n'
        f"<style>\n{_asset('report.css')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + f'\n</main>\n<div id="tip" role="status" hidden></div>\n<script>\n{_asset("report.js")}</script>\n</body>\n</html>\n'
    )


def _header(results: Results) -> str:
    lines = [f'<p class="muted">{_setting_prefix(s)}{_escape(s.title)}</p>' for s in results.settings]
    count = len(results.points)
    return f"<h1>Bytes per link against quality</h1>\n<p>{count} point{'s' * (count != 1)}, measured.</p>\n" + "\n".join(lines)


def _problems(results: Results) -> str:
    items = [f"<li><b>failed</b>: {_escape(f.label)}: {_escape(f.error)}</li>" for f in results.failed]
    items += [f"<li><b>skipped</b>: {_escape(text)}</li>" for text in results.skipped]
    return f'<div class="warning" id="problems"><ul>{"".join(items)}</ul></div>' if items else ""


def _answer(setting: Setting, outlook: Outlook) -> str:
    return f'<p class="answer">{_setting_prefix(setting)}{_escape(recommendation_text(setting, outlook))}</p>'


def _trade_off(results: Results) -> str:
    panels = [_measured_panel(setting) for setting in results.settings]
    return f"""<section id="trade-off">
<h2>Trade-off</h2>
<p>Further down and further left is better. Tap or point at a mark for its figures.</p>
<div class="legend"><span><i class="dot"></i>causal</span><span><i class="diamond"></i>not causal: later tokens leak into
the perplexity</span><span><i class="triangle"></i>off the scale</span><span><i class="step"></i>Pareto front of causal
points</span></div>
<div class="charts">
{"".join(panels)}
{_published_panel()}
</div>
</section>"""


def _measured_panel(setting: Setting) -> str:
    points = [
        ChartPoint(
            label=p.label,
            bits_per_value=p.bits_per_value,
            ppl=p.ppl,
            causal=p.record["causal"],
            detail="\n".join(f"{c.heading}: {c.text(p)}" for c in SHOWN_COLUMNS if c.value(p) not in (None, "")),
        )
        for p in setting.points
        if p.bits_per_value is not None
    ]
    base = setting.baseline.ppl if setting.baseline else None
    title = f"{_setting_prefix(setting)}{_escape(setting.title)}"
    return _panel("Measured", title, points, setting.hidden_size, base)


def _published_panel() -> str:
    figures = read_published()
    tokens = 10_000  # the text on which all methods were run
    points = [
        ChartPoint(
            label=_short_method(p.method),
            bits_per_value=p.bits_per_value,
            ppl=p.ppl,
            causal=p.causal,
            detail=f"{p.method} ({p.dtype})\nperplexity: {significant(p.ppl, 4)}\nbits/value: {p.bits_per_value:.3f}\n"
            f"bytes/token/link: {p.bytes_per_token:,.1f}",
        )
        for p in figures.points
        if p.first_k_tokens == tokens
    ]
    base = next(p.ppl for p in figures.points if p.first_k_tokens == tokens and p.method == "none_bf16")
    caption = (
        f"{_escape(figures.model)}, 8-bit weights, first {tokens:,} tokens of WikiText-2, windows {figures.max_length}/"
        f"{figures.stride}, {_escape(figures.hardware)}. The original benchmark's figures, sizes computed and not sent. Source: "
        f"{_escape(figures.source)}."
    )
    return _panel("Published for Qwen3-32B", caption, points, figures.hidden_size, base)


def _panel(heading: str, caption: str, points: Sequence[ChartPoint], hidden_size: int, base_ppl: float | None) -> str:
    charts = "".join(
        f'<div class="{name}">'
        + trade_off_svg(points, hidden_size=hidden_size, base_ppl=base_ppl, width=width, height=height, title=heading)
        + "</div>"
        for name, width, height in _CHART_SIZES
    )
    return f"<figure><figcaption><b>{heading}</b>{caption}</figcaption>{charts}</figure>\n"


def _points_table(results: Results) -> str:
    columns = [c for c in SHOWN_COLUMNS if any(c.value(point) not in (None, "") for point in results.points)]
    head = "".join(
        f'<th scope="col" data-kind="{"text" if c.key in ("codec", "note") else "number"}" title="{_escape(c.meaning)}">'
        f'<button type="button">{_escape(c.heading)}</button></th>'
        for c in columns
    )
    rows = []
    for setting, point in _numbered(results):
        cells = [_name_cell(setting, point)]
        for column in columns[1:]:
            value = column.value(point)
            cells.append(f'<td data-value="{_raw(value)}"{_text_class(value)}>{_escape(column.text(point))}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    missing = sorted({f"{p.label}: {p.quality_note}" for p in results.points if p.quality_note})
    notes = "".join(f"<li>{_escape(note)}</li>" for note in missing)
    return f"""<section id="points">
<h2>Points</h2>
<p class="small muted">Change, losses and top-1 are against the uncompressed point, token by token. Click a heading to sort.</p>
{_scroller("Points", f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>')}
{f'<p class="small">Without quality figures:</p><ul class="small">{notes}</ul>' if notes else ""}
</section>"""


def _link_section(results: Results, outlook: Outlook) -> str:
    points = [(s, p) for s, p in _numbered(results) if p.costs]
    if not points:
        return ""
    mbits = outlook.bandwidths_mbits[len(outlook.bandwidths_mbits) // 2]
    network = Network(bits_per_s=mbits * 1e6, rtt_s=outlook.rtts_ms[0] / 1e3)
    own = []
    for index, (setting, point) in enumerate(points):
        ratio = point.quality.ppl_ratio - 1 if point.quality else None
        cells = [f'<td data-value="{_raw(ratio)}">{percent(ratio)}</td>', *_prediction_cells(point, network)]
        own.append(f'<tr data-point="{index}">{_name_cell(setting, point)}{"".join(cells)}</tr>')
    headings = [("codec", "text"), ("change", "number"), ("prefill tokens/s", "number"), ("bound by", "text")]
    headings += [("decode ms/token", "number"), ("mostly", "text")]
    head = "".join(
        f'<th scope="col" class="{kind}" data-kind="{kind}"><button type="button">{name}</button></th>' for name, kind in headings
    )
    costs = json.dumps([point.costs.as_dict() for _, point in points], allow_nan=False).replace("<", "\\u003c")
    table = f'<table class="sortable" id="own-link"><thead><tr>{head}</tr></thead><tbody>{"".join(own)}</tbody></table>'
    return f"""<section id="link">
<h2>What would my link do?</h2>
<p>Predicted from this run's stage times and bytes, with the same bandwidth and round trip on every link. Decoding is an
estimate without a KV cache, shown where the run timed a one-token forward.</p>
<form class="controls" id="network"><label>bandwidth, Mbit/s<input name="bandwidth" type="number" min="0" step="any"
value="{mbits:g}" inputmode="decimal"></label><label>round trip, ms<input name="rtt" type="number" min="0" step="any"
value="{outlook.rtts_ms[0]:g}" inputmode="decimal"></label><output name="problem"></output></form>
{_scroller("Prediction", table)}
<script type="application/json" id="costs">{costs}</script>
<h3>Prefill, tokens per second</h3>
{_network_table(points, outlook, decode=False)}
<h3>Decode, milliseconds per token</h3>
{_network_table(points, outlook, decode=True)}
<p class="small muted">Green: the fastest point within +{100 * outlook.max_ppl_increase:g}% perplexity. Grey: beyond it, or
not causal. Below each figure stands what binds.</p>
</section>"""


def _prediction_cells(point: MeasuredPoint, network: Network) -> list[str]:
    prefill, decode = predict_prefill(point.costs, network), predict_decode(point.costs, network)
    figures = [(prefill.tokens_per_s, prefill.binds), (1e3 * decode.total_s, decode.binds) if decode else (None, "")]
    return [
        f'<td data-value="{_raw(value)}">{significant(value)}</td><td class="text" data-value="{_escape(binds)}">{_escape(binds)}</td>'
        for value, binds in figures
    ]


def _network_table(points: Sequence[tuple[Setting, MeasuredPoint]], outlook: Outlook, *, decode: bool) -> str:
    if decode and not any(point.costs.one_token for _, point in points):
        return '<p class="muted">Not measured: these runs timed no one-token forward.</p>'
    best = [
        {id(fastest(s.points, network, outlook, decode=decode)) for s in {s.title: s for s, _ in points}.values()}
        for _, network in outlook.networks
    ]
    rows = []
    for setting, point in points:
        cells = []
        for (_, network), winners in zip(outlook.networks, best):
            predicted = predict_decode(point.costs, network) if decode else predict_prefill(point.costs, network)
            if predicted is None:
                cells.append(f"<td>{MISSING}</td>")
                continue
            value = 1e3 * predicted.total_s if decode else predicted.tokens_per_s
            mark = ' class="best"' if id(point) in winners else ""
            cells.append(f"<td{mark}>{significant(value)}<small>{_escape(_short_link(predicted.binds))}</small></td>")
        outside = "" if within_budget(point, outlook) else ' class="outside"'
        rows.append(f"<tr{outside}>{_name_cell(setting, point)}{''.join(cells)}</tr>")
    head = _heading("codec") + "".join(_heading(name.replace(", ", "\n")) for name, _ in outlook.networks)
    return _scroller("Prediction", f'<table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>')


def _traffic(results: Results) -> str:
    parts = []
    groups: dict[tuple[str, ...], list[tuple[Setting, MeasuredPoint]]] = {}
    for setting, point in _numbered(results):
        groups.setdefault(tuple(point.record["traffic_per_link"]), []).append((setting, point))
    for links, members in groups.items():
        if not links:
            continue
        head = _heading("codec") + "".join(_heading(link.replace(":node", "\nnode")) for link in links)
        rows = []
        for setting, point in members:
            cells = [_link_cell(point, link) for link in links]
            rows.append(f"<tr>{_name_cell(setting, point)}{''.join(cells)}</tr>")
        parts.append(_scroller("Traffic", f'<table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'))
    return f"""<section id="traffic">
<h2>Per link</h2>
<p class="small muted">Payload bytes per token; below, all bytes sent in this run, headers included, and the relative squared
error of the reconstruction where it was measured.</p>
{"".join(parts) or "<p>No point has links.</p>"}
</section>"""


def _link_cell(point: MeasuredPoint, name: str) -> str:
    link = point.record["traffic_per_link"][name]
    sent = link["bytes"] + link["header_bytes"] + link["padding_bytes"]
    error = point.record.get("reconstruction", {}).get(name, {}).get("relative_squared_error")
    lines = [f"{significant(sent / 1e6)} MB in {link['tx']:,} frames"]
    if error is not None:
        lines.append(f"error {significant(error)}")
    return f"<td>{link['bytes_per_token']:,.1f}{''.join(f'<small>{line}</small>' for line in lines)}</td>"


def _times(results: Results) -> str:
    shown = [(name, key) for name, key in _PHASES if any(_phase(p, key) for p in results.points)]
    legend = "".join(f'<span><i class="{name}"></i>{name}</span>' for name, _ in shown)
    stages = sorted({stage for p in results.points for stage in p.record["stages"]}, key=int)
    longest = max(
        (sum(times.get(key, 0.0) for _, key in shown) for p in results.points for times in p.record["stages"].values()),
        default=0.0,
    )
    head = _heading("codec") + "".join(_heading(f"stage {stage}", "text") for stage in stages)
    rows, figures = [], []
    for setting, point in _numbered(results):
        cells = []
        for stage in stages:
            times = point.record["stages"].get(stage)
            cells.append(_time_bar(times, shown, longest) if times else f"<td>{MISSING}</td>")
            if times:
                numbers = "".join(f"<td>{significant(times.get(key))}</td>" for _, key in shown)
                figures.append(f'<tr>{_name_cell(setting, point)}<td>{_escape(stage)}</td>{numbers}</tr>')
        rows.append(f"<tr>{_name_cell(setting, point)}{''.join(cells)}</tr>")
    figure_head = "".join(_heading(name) for name in ("codec", "stage", *(name for name, _ in shown)))
    details = f"<table><thead><tr>{figure_head}</tr></thead><tbody>{''.join(figures)}</tbody></table>"
    return f"""<section id="times">
<h2>Time per stage</h2>
<p class="small muted">Seconds of the run, all bars on one scale. Stages of one node take turns; waiting is for frames.</p>
<div class="legend">{legend}</div>
{_scroller("Time per stage", f'<table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>')}
<details><summary>The seconds</summary>{_scroller("Seconds", details)}</details>
</section>"""


def _phase(point: MeasuredPoint, key: str) -> float:
    return sum(stage.get(key, 0.0) for stage in point.record["stages"].values())


def _time_bar(times: dict[str, float], shown: Iterable[tuple[str, str]], longest: float) -> str:
    values = [(name, times.get(key, 0.0)) for name, key in shown]
    bars = "".join(f'<i class="{name}" style="width:{100 * value / (longest or 1):.2f}%"></i>' for name, value in values)
    title = ", ".join(f"{name} {significant(value)} s" for name, value in values)
    return f'<td><span class="bar" role="img" aria-label="{title}" title="{title}">{bars}</span></td>'


def _provenance(results: Results) -> str:
    parts = []
    for setting in results.settings:
        first = setting.points[0].record
        hosts = sorted({(rank["host"], rank["threads"]) for p in setting.points for rank in p.record["ranks"]})
        versions = sorted({json.dumps(p.record["versions"], sort_keys=True) for p in setting.points})
        layers = ", ".join(f"node {s['node']}: {s['layers'][0]}-{s['layers'][1] - 1}" for s in first["plan"])
        facts = [
            ("model", first["args"]["model_name"]),
            ("checkpoint", first["model"]["checkpoint_fingerprint"]),
            ("text", f"{first['dataset']['description']}, {first['dataset']['num_tokens']:,} tokens"),
            ("text, SHA-256", first["dataset"]["text_sha256"]),
            ("token ids, SHA-256", first["dataset"]["ids_sha256"]),
            ("protocol", ", ".join(f"{key} {value}" for key, value in first["protocol"].items())),
            ("layers, first point", layers),
            ("backend", ", ".join(sorted({p.record["backend"] for p in setting.points}))),
            ("ranks per point", ", ".join(sorted({str(len(p.record["ranks"])) for p in setting.points}))),
            ("hosts", ", ".join(f"{host} ({threads} threads a rank)" for host, threads in hosts)),
            *(("versions", ", ".join(f"{k} {v}" for k, v in json.loads(text).items())) for text in versions),
        ]
        listed = "".join(f"<dt>{_escape(name)}</dt><dd>{_escape(str(value))}</dd>" for name, value in facts)
        runs = "".join(
            f"<tr>{_name_cell(setting, p)}<td class='text'>{_escape(p.record['run_id'])}</td>"
            f"<td class='text'>{_escape(p.record['digest'][:16])}</td><td class='text'>{_escape(p.record['finished_at'][:19])}</td>"
            f"<td class='text'>{_escape('; '.join(p.record['notes']))}</td></tr>"
            for p in setting.points
        )
        head = "".join(_heading(name, "text") for name in ("codec", "run", "digest", "finished, UTC", "notes"))
        table = _scroller("Runs", f"<table><thead><tr>{head}</tr></thead><tbody>{runs}</tbody></table>")
        parts.append(
            f"<h3>{_setting_prefix(setting)}{_escape(setting.title)}</h3><dl>{listed}</dl>"
            f"<details><summary>Runs</summary>{table}</details>"
        )
    return f'<section id="provenance">\n<h2>What was run on what</h2>\n{"".join(parts)}\n</section>'


def _method(outlook: Outlook) -> str:
    formula = prediction.__doc__.partition("\n\n")[2].strip()
    meanings = "".join(f"<dt>{_escape(c.heading)}</dt><dd>{_escape(c.meaning)}</dd>" for c in SHOWN_COLUMNS)
    return f"""<section id="method">
<h2>How to read this</h2>
<dl>{meanings}</dl>
<h3>The prediction's formula</h3>
<pre>{_escape(formula)}</pre>
<p class="small muted">Recommended is what sends the fewest bytes within +{100 * outlook.max_ppl_increase:g}% perplexity among
causal points.</p>
</section>"""


def _numbered(results: Results) -> list[tuple[Setting, MeasuredPoint]]:
    return [(setting, point) for setting in results.settings for point in setting.points]


def _setting_prefix(setting: Setting) -> str:
    return f"[{setting.name}] " if setting.name else ""


def _name_cell(setting: Setting, point: MeasuredPoint) -> str:
    name = _escape(_setting_prefix(setting) + point.label)
    mark = "" if point.record["causal"] else " *"
    return f'<th scope="row" data-value="{name}"><span class="name" title="{name}">{name}{mark}</span></th>'


def _heading(text: str, align: str = "") -> str:
    return f'<th scope="col" class="{align}">{_escape(text).replace(chr(10), "<br>")}</th>'


def _short_method(name: str) -> str:
    """A published method's name without its library's, for a label in the chart."""
    return name.removeprefix("TorchAO_").removeprefix("torchao_").removeprefix("bnb_").removeprefix("BlockRowCol")


def _short_link(name: str) -> str:
    return name.partition(":node")[0] if name.startswith(("layer:", "embed:")) else name


def _scroller(label: str, table: str) -> str:
    return f'<div class="scroller" tabindex="0" role="region" aria-label="{label}">{table}</div>'


def _raw(value: object) -> str:
    """The value that sorting uses: empty where it is missing or no number."""
    if value is None or value != value:
        return ""
    return _escape(repr(float(value)).replace("inf", "Infinity") if isinstance(value, (int, float)) else str(value))


def _text_class(value: object) -> str:
    return ' class="text"' if isinstance(value, str) else ""


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
