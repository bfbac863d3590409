"""The page's section "What would my link do?": predictions for chosen networks, and for the reader's own.

The script of the page (page/report.js) repeats the formulas of `prediction` for the reader's bandwidth and
round trip; its figures are the costs embedded here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape

from pipeline.report.html_parts import all_points, heading, name_cell, sort_heading, sort_value, table
from pipeline.report.point_columns import MISSING, percent, significant
from pipeline.report.prediction import Network, predict_decode, predict_prefill
from pipeline.report.recommendation import Outlook, fastest, within_budget
from pipeline.report.results import MeasuredPoint, Results, Setting

__all__ = ["link_section"]


def link_section(results: Results, outlook: Outlook) -> str:
    points = [(s, p) for s, p in all_points(results) if p.costs]
    if not points:
        return ""
    mbits = outlook.bandwidths_mbits[len(outlook.bandwidths_mbits) // 2]
    rtt_ms = outlook.rtts_ms[0]
    network = Network(bits_per_s=mbits * 1e6, rtt_s=rtt_ms / 1e3)
    own = []
    for index, (setting, point) in enumerate(points):
        ratio = point.quality.ppl_ratio - 1 if point.quality else None
        cells = [
            f'<td data-value="{sort_value(ratio)}">{percent(ratio)}</td>',
            *_prediction_cells(point, network),
        ]
        own.append(f'<tr data-point="{index}">{name_cell(setting, point)}{"".join(cells)}</tr>')
    headings = [("codec", "text"), ("change", "number"), ("prefill tokens/s", "number"), ("bound by", "text")]
    headings += [("decode ms/token", "number"), ("mostly", "text")]
    head = [sort_heading(name, kind) for name, kind in headings]
    costs = json.dumps([point.costs.as_dict() for _, point in points], allow_nan=False)
    return f"""<section id="link">
<h2>What would my link do?</h2>
<p>Predicted from this run's stage times and bytes, with the same bandwidth and round trip on every link.
Decoding is predicted for one sequence, from forwards of one token over a short cache.</p>
<form class="controls" id="network">
<label>bandwidth, Mbit/s<input name="bandwidth" type="number" min="0" step="any" value="{mbits:g}"></label>
<label>round trip, ms<input name="rtt" type="number" min="0" step="any" value="{rtt_ms:g}"></label>
<output name="problem"></output></form>
{table("Prediction for this network", head, own, 'class="sortable" id="own-link"')}
<script type="application/json" id="costs">{_script_safe(costs)}</script>
<h3>Prefill, tokens per second</h3>
{_network_table(results, points, outlook, decode=False)}
<h3>Decode, milliseconds per token</h3>
{_network_table(results, points, outlook, decode=True)}
<p class="small muted">Green: the fastest point within +{100 * outlook.max_ppl_increase:g}% perplexity. Grey:
beyond it, not causal or not compared. Below each figure stands what binds. Stage times differ by some per cent from
run to run, and so do figures bound by a node.</p>
</section>"""


def _prediction_cells(point: MeasuredPoint, network: Network) -> list[str]:
    prefill, decode = predict_prefill(point.costs, network), predict_decode(point.costs, network)
    figures = [
        (prefill.tokens_per_s, prefill.binds),
        (1e3 * decode.total_s, decode.binds) if decode else (None, ""),
    ]
    cells = []
    for value, binds in figures:
        cells.append(f'<td data-value="{sort_value(value)}">{significant(value)}</td>')
        cells.append(f'<td class="text" data-value="{escape(binds)}">{escape(binds)}</td>')
    return cells


def _network_table(
    results: Results, points: Sequence[tuple[Setting, MeasuredPoint]], outlook: Outlook, *, decode: bool
) -> str:
    if decode and not any(point.costs.one_token for _, point in points):
        return '<p class="muted">Not measured: these runs timed no one-token forward.</p>'
    best = [
        {id(fastest(setting.points, network, outlook, decode=decode)) for setting in results.settings}
        for _, network in outlook.networks
    ]
    rows = []
    for setting, point in points:
        cells = []
        for (_, network), winners in zip(outlook.networks, best, strict=True):
            predicted = predict_decode(point.costs, network) if decode else predict_prefill(point.costs, network)
            if predicted is None:
                cells.append(f"<td>{MISSING}</td>")
                continue
            value = 1e3 * predicted.total_s if decode else predicted.tokens_per_s
            mark = ' class="best"' if id(point) in winners else ""
            cells.append(f"<td{mark}>{significant(value)}<small>{escape(_short_link(predicted.binds))}</small></td>")
        outside = "" if within_budget(point, outlook) else ' class="outside"'
        rows.append(f"<tr{outside}>{name_cell(setting, point)}{''.join(cells)}</tr>")
    head = [heading("codec"), *(heading(name.replace(", ", "\n")) for name, _ in outlook.networks)]
    return table("Prediction", head, rows)


def _script_safe(text: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c")


def _short_link(name: str) -> str:
    return name.partition(":node")[0] if name.startswith(("layer:", "embed:")) else name
