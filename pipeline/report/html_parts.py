"""Pieces that the sections of the page share. Every text of the user's passes `escape`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from pipeline.report.results import MeasuredPoint, Results, Setting

__all__ = ["all_points", "heading", "name_cell", "setting_prefix", "sort_heading", "sort_value", "table"]


def all_points(results: Results) -> list[tuple[Setting, MeasuredPoint]]:
    return [(setting, point) for setting in results.settings for point in setting.points]


def setting_prefix(setting: Setting) -> str:
    """What tells points of several settings apart."""
    return f"[{setting.name}] " if setting.name else ""


def table(label: str, head: Sequence[str], rows: Iterable[str], attributes: str = "") -> str:
    """Heading cells and whole rows in a box that scrolls by itself where the page is narrow."""
    return (
        f'<div class="scroller" tabindex="0" role="region" aria-label="{label}"><table {attributes}>'
        f"<thead><tr>{''.join(head)}</tr></thead>\n<tbody>{''.join(rows)}</tbody></table></div>"
    )


def heading(text: str, align: str = "") -> str:
    """`align` is empty for numbers, "text" for words. A line break in `text` is kept."""
    return f'<th scope="col" class="{align}">{escape(text).replace(chr(10), "<br>")}</th>'


def sort_heading(text: str, kind: str, meaning: str = "") -> str:
    """A heading that sorts; `kind` is "number" or "text"."""
    return (
        f'<th scope="col" class="{kind}" data-kind="{kind}" title="{escape(meaning)}">'
        f'<button type="button">{escape(text)}</button></th>'
    )


def name_cell(setting: Setting, point: MeasuredPoint) -> str:
    """A row's heading; a star marks codecs that are not causal."""
    name = escape(setting_prefix(setting) + point.label)
    mark = "" if point.record.causal else " *"
    return f'<th scope="row" data-value="{name}"><span class="name" title="{name}">{name}{mark}</span></th>'


def sort_value(value: str | float | None) -> str:
    """The value that sorting uses: empty where it is missing or not a number."""
    if value is None or value != value:
        return ""
    return escape(value) if isinstance(value, str) else repr(float(value)).replace("inf", "Infinity")
