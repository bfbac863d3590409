"""The report page: one HTML file with its style, script and charts inside; nothing is loaded from elsewhere.

Takes `Results` and lays them out. All text passes `escape`, since codec names, paths and messages are the
user's. Without JavaScript the page shows everything but sorting, tooltips and the reader's own bandwidth.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pipeline.report import prediction
from pipeline.report.charts import ChartPoint, trade_off_svg
from pipeline.report.html_costs import times_section, traffic_section
from pipeline.report.generation import HEADINGS
from pipeline.report.html_parts import (
    all_points,
    heading,
    name_cell,
    setting_prefix,
    sort_heading,
    sort_value,
    table,
)
from pipeline.report.html_prediction import link_section
from pipeline.report.point_columns import SHOWN_COLUMNS, significant
from pipeline.report.published import read_published
from pipeline.report.recommendation import Outlook, recommendation_text
from pipeline.report.results import Results, Setting

__all__ = ["html_page"]

_ASSETS = Path(__file__).parent / "page"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_CHART_SIZES = (("wide", 556, 400), ("narrow", 350, 380))


def html_page(results: Results, outlook: Outlook) -> str:
    """The whole page."""
    sections = [_header(results), _problems(results)]
    if results.settings:
        sections += [
            *(_answer(setting, outlook) for setting in results.settings),
            _trade_off(results),
            _points_table(results),
            link_section(results, outlook),
            traffic_section(results),
            times_section(results),
            _provenance(results),
        ]
    if results.generated:
        sections.append(_generation(results))
    sections.append(_method(outlook))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<title>Thinwire report</title>\n"
        f"<style>\n{_asset('report.css')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + '\n</main>\n<div id="tip" role="status" hidden></div>\n'
        + f"<script>\n{_asset('report.js')}</script>\n</body>\n</html>\n"
    )


def _header(results: Results) -> str:
    count = len(results.points)
    lines = [
        "<h1>Bytes per link against quality</h1>",
        f"<p>{count} point{'s' * (count != 1)}, measured.</p>",
    ]
    lines += [f'<p class="muted">{setting_prefix(s)}{escape(s.title)}</p>' for s in results.settings]
    return "\n".join(lines)


def _problems(results: Results) -> str:
    items = [f"<li><b>failed</b>: {escape(f.label)}: {escape(f.error)}</li>" for f in results.failed]
    items += [
        f"<li>{escape(p.label)} ran on something else than the uncompressed point, which may change its losses: "
        f"{escape(p.elsewhere)}</li>"
        for p in results.points
        if p.elsewhere
    ]
    items += [f"<li><b>skipped</b>: {escape(text)}</li>" for text in results.skipped]
    return f'<div class="warning" id="problems"><ul>{"".join(items)}</ul></div>' if items else ""


def _answer(setting: Setting, outlook: Outlook) -> str:
    return f'<p class="answer">{setting_prefix(setting)}{escape(recommendation_text(setting, outlook))}</p>'


def _trade_off(results: Results) -> str:
    panels = "".join(_measured_panel(setting) for setting in results.settings)
    return f"""<section id="trade-off">
<h2>Trade-off</h2>
<p>Further down and further left is better. Tap or point at a mark for its figures.</p>
<div class="legend"><span><i class="dot"></i>causal</span>
<span><i class="diamond"></i>not causal: later tokens leak into the perplexity</span>
<span><i class="triangle"></i>off the scale</span>
<span><i class="step"></i>Pareto front of causal points</span></div>
<div class="charts">
{panels}{_published_panel()}</div>
</section>"""


def _measured_panel(setting: Setting) -> str:
    points = [
        ChartPoint(
            label=p.label,
            bits_per_value=p.bits_per_value,
            ppl=p.ppl,
            causal=p.record.causal,
            detail="\n".join(f"{c.heading}: {c.text(p)}" for c in SHOWN_COLUMNS if c.value(p) not in (None, "")),
        )
        for p in setting.points
        if p.bits_per_value is not None
    ]
    base = setting.baseline.ppl if setting.baseline else None
    title = f"{setting_prefix(setting)}{escape(setting.title)}"
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
            detail=f"{p.method} ({p.dtype})\nperplexity: {significant(p.ppl, 4)}\n"
            f"bytes/token per link: {p.bytes_per_token:,.1f}\nbits/value: {p.bits_per_value:.3f}",
        )
        for p in figures.points
        if p.first_k_tokens == tokens
    ]
    base = next(p.ppl for p in figures.points if p.first_k_tokens == tokens and p.method == "none_bf16")
    caption = (
        f"{figures.model}, 8-bit weights, first {tokens:,} tokens of WikiText-2, windows "
        f"{figures.max_length}/{figures.stride}, {figures.hardware}. The original benchmark's figures; "
        f"its sizes were computed, nothing was sent. Source: {figures.source}."
    )
    return _panel("Published for Qwen3-32B", escape(caption), points, figures.hidden_size, base)


def _panel(name: str, caption: str, points: Sequence[ChartPoint], hidden_size: int, base_ppl: float | None) -> str:
    """The same chart twice, for wide and for narrow screens: its text has one size on both."""
    charts = []
    for size, width, height in _CHART_SIZES:
        chart = trade_off_svg(
            points, hidden_size=hidden_size, base_ppl=base_ppl, width=width, height=height, title=name
        )
        charts.append(f'<div class="{size}">{chart}</div>')
    return f"<figure><figcaption><b>{name}</b>{caption}</figcaption>{''.join(charts)}</figure>\n"


def _points_table(results: Results) -> str:
    columns = [c for c in SHOWN_COLUMNS if any(c.value(point) not in (None, "") for point in results.points)]
    head = [sort_heading(c.heading, "text" if c.key in ("codec", "note") else "number", c.meaning) for c in columns]
    rows = []
    for setting, point in all_points(results):
        cells = [name_cell(setting, point)]
        for column in columns[1:]:
            value = column.value(point)
            align = ' class="text"' if isinstance(value, str) else ""
            cells.append(f'<td data-value="{sort_value(value)}"{align}>{escape(column.text(point))}</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    missing = sorted({f"{p.label}: {p.quality_note}" for p in results.points if p.quality_note})
    notes = "".join(f"<li>{escape(note)}</li>" for note in missing)
    if notes:
        notes = f'<p class="small">Without quality figures:</p><ul class="small">{notes}</ul>'
    return f"""<section id="points">
<h2>Points</h2>
<p class="small muted">Change, losses and top-1 are against the uncompressed point, token by token. Click a
heading to sort.</p>
{table("Points", head, rows, 'class="sortable"')}
{notes}
</section>"""


def _generation(results: Results) -> str:
    head = [heading(name, "text" if name in ("codec", "model") else "") for name in HEADINGS]
    rows = []
    for run in results.generated:
        name = f'<th scope="row"><span class="name" title="{escape(run.cells[0])}">{escape(run.cells[0])}</span></th>'
        model = f'<td class="text">{escape(run.cells[1])}</td>'
        rows.append(f"<tr>{name}{model}{''.join(f'<td>{escape(cell)}</td>' for cell in run.cells[2:])}</tr>")
    told = sorted({note for run in results.generated for note in run.notes})
    notes = "".join(f"<li>{escape(note)}</li>" for note in told)
    return f"""<section id="generation">
<h2>Generation</h2>
<p class="small muted">Measured with a cache: prompts in, tokens out. TTFT is from having a slot to the first token,
ms/token between tokens of one answer. Bytes are those of the senders, prompts included; headers stand apart.</p>
{table("Generation", head, rows)}
{f'<ul class="small">{notes}</ul>' if notes else ""}
</section>"""


def _provenance(results: Results) -> str:
    parts = []
    for setting in results.settings:
        first = setting.points[0].record
        ranks = [rank for p in setting.points for rank in p.record.ranks]
        hosts = sorted({(rank.host, rank.threads) for rank in ranks})
        versions = sorted({json.dumps(p.record.versions, sort_keys=True) for p in setting.points})
        layers = ", ".join(f"node {s.node}: {s.layers[0]}-{s.layers[1] - 1}" for s in first.plan)
        protocol = first.protocol.model_dump(exclude_none=True)
        facts = [
            ("model", first.args.model_name),
            ("checkpoint", first.model.checkpoint_fingerprint),
            ("text", f"{first.dataset.description}, {first.dataset.num_tokens:,} tokens"),
            ("text, SHA-256", first.dataset.text_sha256),
            ("token ids, SHA-256", first.dataset.ids_sha256),
            ("protocol", ", ".join(f"{key} {value}" for key, value in protocol.items())),
            ("layers, first point", layers),
            ("backend", ", ".join(sorted({p.record.backend for p in setting.points}))),
            ("ranks per point", ", ".join(sorted({str(len(p.record.ranks)) for p in setting.points}))),
            ("hosts", ", ".join(f"{host} ({threads} threads a rank)" for host, threads in hosts)),
            *(("versions", ", ".join(f"{k} {v}" for k, v in json.loads(text).items())) for text in versions),
        ]
        listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts)
        rows = []
        for point in setting.points:
            record = point.record
            texts = (
                record.run_id,
                record.digest[:16],
                (record.finished_at or "")[:19],
                "; ".join(record.notes),
            )
            cells = "".join(f'<td class="text">{escape(text)}</td>' for text in texts)
            rows.append(f"<tr>{name_cell(setting, point)}{cells}</tr>")
        head = [heading(name, "text") for name in ("codec", "run", "digest", "finished, UTC", "notes")]
        parts.append(
            f"<h3>{setting_prefix(setting)}{escape(setting.title)}</h3><dl>{listed}</dl>"
            f"<details><summary>Runs</summary>{table('Runs', head, rows)}</details>"
        )
    return f'<section id="provenance">\n<h2>What was run on what</h2>\n{"".join(parts)}\n</section>'


def _method(outlook: Outlook) -> str:
    formula = (prediction.__doc__ or "").partition("\n\n")[2].strip()
    meanings = "".join(f"<dt>{escape(c.heading)}</dt><dd>{escape(c.meaning)}</dd>" for c in SHOWN_COLUMNS)
    return f"""<section id="method">
<h2>How to read this</h2>
<dl>{meanings}</dl>
<h3>The prediction's formula</h3>
<pre>{escape(formula)}</pre>
<p class="small muted">Recommended is what sends the fewest bytes within +{100 * outlook.max_ppl_increase:g}%
perplexity among causal points.</p>
</section>"""


def _short_method(name: str) -> str:
    """A published method's name without its library's, for a label in the chart."""
    for prefix in ("TorchAO_", "torchao_", "bnb_", "BlockRowCol"):
        name = name.removeprefix(prefix)
    return name


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")
