"""The page's sections on traffic per link and time per stage."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from pipeline.records.run_record import StageSeconds
from pipeline.report.html_parts import all_points, heading, name_cell, table
from pipeline.report.point_columns import MISSING, significant
from pipeline.report.results import MeasuredPoint, Results, Setting

__all__ = ["times_section", "traffic_section"]

_PHASES = (
    ("compute", "compute_s"),
    ("importance", "importance_s"),
    ("encode", "compress_s"),
    ("decode", "decompress_s"),
    ("wait", "wait_s"),
)


def traffic_section(results: Results) -> str:
    parts = []
    groups: dict[tuple[str, ...], list[tuple[Setting, MeasuredPoint]]] = {}
    for setting, point in all_points(results):
        groups.setdefault(tuple(point.record.traffic_per_link), []).append((setting, point))
    for links, members in groups.items():
        if not links:
            continue
        head = [heading("codec"), *(heading(link.replace(":node", "\nnode")) for link in links)]
        rows = []
        for setting, point in members:
            cells = [_link_cell(point, link) for link in links]
            rows.append(f"<tr>{name_cell(setting, point)}{''.join(cells)}</tr>")
        parts.append(table("Traffic", head, rows))
    return f"""<section id="traffic">
<h2>Per link</h2>
<p class="small muted">Payload bytes per token; below, all bytes sent in this run, headers included, and the
relative squared error of the reconstruction where it was measured.</p>
{"".join(parts) or "<p>No point has links.</p>"}
</section>"""


def _link_cell(point: MeasuredPoint, name: str) -> str:
    link = point.record.traffic_per_link[name]
    sent = link.bytes + link.header_bytes + link.padding_bytes
    measured = (point.record.reconstruction or {}).get(name)
    lines = [f"{significant(sent / 1e6)} MB in {link.tx:,} frames"]
    if measured is not None and measured.relative_squared_error is not None:
        lines.append(f"error {significant(measured.relative_squared_error)}")
    return f"<td>{link.bytes_per_token:,.1f}{''.join(f'<small>{line}</small>' for line in lines)}</td>"


def times_section(results: Results) -> str:
    shown = [(name, key) for name, key in _PHASES if any(_phase(p, key) for p in results.points)]
    legend = "".join(f'<span><i class="{name}"></i>{name}</span>' for name, _ in shown)
    stages = sorted({stage for p in results.points for stage in p.record.stages}, key=int)
    all_times = [times for point in results.points for times in point.record.stages.values()]
    longest = max(sum(getattr(times, key) for _, key in shown) for times in all_times)
    head = [heading("codec"), *(heading(f"stage {stage}", "text") for stage in stages)]
    rows, figures = [], []
    for setting, point in all_points(results):
        cells = []
        for stage in stages:
            times = point.record.stages.get(stage)
            cells.append(_time_bar(times, shown, longest) if times else f"<td>{MISSING}</td>")
            if times:
                numbers = "".join(f"<td>{significant(getattr(times, key))}</td>" for _, key in shown)
                figures.append(f"<tr>{name_cell(setting, point)}<td>{escape(stage)}</td>{numbers}</tr>")
        rows.append(f"<tr>{name_cell(setting, point)}{''.join(cells)}</tr>")
    figure_head = [heading(name) for name in ("codec", "stage", *(name for name, _ in shown))]
    return f"""<section id="times">
<h2>Time per stage</h2>
<p class="small muted">Seconds of the run, all bars on one scale. Stages of one node take turns; waiting is
for frames.</p>
<div class="legend">{legend}</div>
{table("Time per stage", head, rows)}
<details><summary>The seconds</summary>{table("Seconds", figure_head, figures)}</details>
</section>"""


def _phase(point: MeasuredPoint, key: str) -> float:
    return sum(getattr(stage, key) for stage in point.record.stages.values())


def _time_bar(times: StageSeconds, shown: Iterable[tuple[str, str]], longest: float) -> str:
    values = [(name, getattr(times, key)) for name, key in shown]
    bars = "".join(
        f'<i class="{name}" style="width:{100 * value / (longest or 1):.2f}%"></i>' for name, value in values
    )
    title = ", ".join(f"{name} {significant(value)} s" for name, value in values)
    return f'<td><span class="bar" role="img" aria-label="{title}" title="{title}">{bars}</span></td>'
