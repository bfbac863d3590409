"""A column of a table, and how its figures read: once for console, Markdown, CSV and page.

The lists of columns are in `point_columns` and `generation_columns`; what both have is here. A missing figure
is None as a value and a dash as text; one that is not finite says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

__all__ = [
    "EMULATION_COLUMNS",
    "MISSING",
    "Column",
    "Row",
    "Value",
    "dash_if_empty",
    "number",
    "percent",
    "perplexity",
    "shown",
    "significant",
]

MISSING = "–"
NOT_FINITE = "not finite"
Value = str | float | int | None
Row = TypeVar("Row", contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Column(Generic[Row]):
    """`key` heads the CSV column, `heading` the shown one (empty: CSV only); `meaning` explains it with its unit.

    `text` of a row is `form` of its value, unless `show` makes it from the row. `is_text`: its values are words.
    `on_console`: it belongs to the narrower set that a console shows. `if_any`: shown where a row has a value only.
    """

    key: str
    heading: str
    meaning: str
    value: Callable[[Row], Value]
    form: Callable[[Any], str] = str
    show: Callable[[Row], str] | None = None
    is_text: bool = False
    on_console: bool = False
    if_any: bool = False

    def text(self, row: Row) -> str:
        return self.show(row) if self.show else self.form(self.value(row))

    def has_value(self, row: Row) -> bool:
        return self.value(row) not in (None, "")


def shown(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> list[Column[Row]]:
    """Those that a table of these rows has."""
    return [column for column in columns if not column.if_any or any(map(column.has_value, rows))]


def significant(value: float | None, digits: int = 3) -> str:
    """`1,230`, `12.3`, `0.0123` for three digits: thousands with commas, an exponent (`1.23e-05`, `1.23e+15`) below
    0.0001 and from 10^15 on.
    """
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return NOT_FINITE
    rounded = float(f"{value:.{digits}g}")
    if rounded and not 1e-4 <= abs(rounded) < 1e15:
        return f"{rounded:.{digits - 1}e}"
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:.10g}"


def percent(value: float | None) -> str:
    """A change: `+1.23%`, or a factor from twofold on."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{value:+.2%}" if value < 1 else f"× {significant(value + 1)}"


def number(form: str) -> Callable[[float | None], str]:
    """A formatter for `form`, e.g. ".2f"."""

    def text(value: float | None) -> str:
        if value is None:
            return MISSING
        return format(value, form) if math.isfinite(value) else NOT_FINITE

    return text


def dash_if_empty(value: str) -> str:
    return value or MISSING


def perplexity(value: float | None) -> str:
    """Of a record, where null stands for one that is not finite."""
    if value is None:
        return NOT_FINITE
    if value < 1e3:
        return f"{value:.4f}"
    return f"{value:,.0f}" if value < 1e9 else significant(value)


class _Emulated(Protocol):
    """What ran on a network and on nodes that may have been emulated: in words, empty where they were not."""

    @property
    def network(self) -> str: ...

    @property
    def slowdown(self) -> str: ...


EMULATION_COLUMNS: tuple[Column[_Emulated], ...] = (
    Column(
        key="emulated_network",
        heading="emulated network",
        meaning="rate and delay of each way of a link, from one end to the other, on one machine",
        value=lambda row: row.network,
        form=dash_if_empty,
        is_text=True,
        if_any=True,
    ),
    Column(
        key="emulated_slowdown",
        heading="emulated slowdown",
        meaning="how many times as long each node was made to take",
        value=lambda row: row.slowdown,
        form=dash_if_empty,
        is_text=True,
        if_any=True,
    ),
)
