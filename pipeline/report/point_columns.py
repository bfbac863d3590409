"""The columns of a table of points, once for page, Markdown and CSV: heading, meaning, raw value, text.

A missing figure is None as a value and a dash as text; one that is not finite says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.report.results import MeasuredPoint

__all__ = ["COLUMNS", "SHOWN_COLUMNS", "Column", "percent", "significant"]

MISSING = "–"
NOT_FINITE = "not finite"
Value = str | float | int | None


@dataclass(frozen=True, kw_only=True)
class Column:
    """`key` heads the CSV column, `heading` the shown one (empty: CSV only); `meaning` explains it with its
    unit.

    `text` of a point is `form` of its value, unless `show` makes it from the point.
    """

    key: str
    heading: str
    meaning: str
    value: Callable[[MeasuredPoint], Value]
    form: Callable[[Value], str] = str
    show: Callable[[MeasuredPoint], str] | None = None

    def text(self, point: MeasuredPoint) -> str:
        return self.show(point) if self.show else self.form(self.value(point))


def significant(value: float | None, digits: int = 3) -> str:
    """`1230`, `12.3`, `0.0123` for three digits: thousands with commas, an exponent only below 0.0001."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return NOT_FINITE
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:.10g}"


def percent(value: float | None) -> str:
    """A change: `+1.23%`, or a factor from twofold on."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return NOT_FINITE
    return f"{value:+.2%}" if value < 1 else f"× {significant(value + 1)}"


def _number(form: str) -> Callable[[Value], str]:
    """A formatter for `form`, e.g. ".2f"."""

    def text(value: Value) -> str:
        if value is None:
            return MISSING
        return format(value, form) if math.isfinite(value) else NOT_FINITE

    return text


def _ppl_text(value: float | None) -> str:
    if value is None:
        return NOT_FINITE
    return f"{value:.4f}" if value < 1e3 else f"{value:,.0f}"


def _quality(name: str) -> Callable[[MeasuredPoint], Value]:
    return lambda point: getattr(point.quality, name) if point.quality else None


def _change_of_interval(end: int) -> Callable[[MeasuredPoint], Value]:
    def value(point: MeasuredPoint) -> Value:
        interval = point.quality.ppl_interval if point.quality else None
        return interval[end] - 1 if interval else None

    return value


def _interval_text(point: MeasuredPoint) -> str:
    interval = point.quality.ppl_interval if point.quality else None
    return f"{percent(interval[0] - 1)} to {percent(interval[1] - 1)}" if interval else MISSING


def _ppl_change(point: MeasuredPoint) -> Value:
    return point.quality.ppl_ratio - 1 if point.quality else None


def _us_per_token(*phases: str) -> Callable[[MeasuredPoint], Value]:
    def value(point: MeasuredPoint) -> Value:
        crossings = (point.record.timed_tokens or 0) * len(point.record.traffic_per_link)
        seconds = sum(getattr(stage, phase) for stage in point.record.stages.values() for phase in phases)
        return 1e6 * seconds / crossings if crossings else None

    return value


def _worst_error(point: MeasuredPoint) -> Value:
    errors = [link.relative_squared_error for link in (point.record.reconstruction or {}).values()]
    known = [error for error in errors if error is not None]
    return max(known) if known else None


def _note(point: MeasuredPoint) -> Value:
    notes = [
        "" if point.record.causal else "not causal",
        "per-token data cannot be used" if point.unread else "",
        "ran on something else" if point.elsewhere else "",
    ]
    return ", ".join(filter(None, notes))


COLUMNS = (
    Column(key="codec", heading="codec", meaning="what was on the links", value=lambda p: p.label),
    Column(
        key="perplexity",
        heading="perplexity",
        meaning="exp of the mean loss of all scored tokens",
        value=lambda p: p.ppl,
        form=_ppl_text,
    ),
    Column(
        key="ppl_change",
        heading="change",
        meaning="perplexity over that of the uncompressed point, less 1",
        value=_ppl_change,
        form=percent,
    ),
    Column(
        key="ppl_change_low",
        heading="95% interval",
        meaning="of the change: paired bootstrap over windows, where there are enough",
        value=_change_of_interval(0),
        show=_interval_text,
    ),
    Column(key="ppl_change_high", heading="", meaning="", value=_change_of_interval(1)),
    Column(
        key="mean_loss_change_nats",
        heading="loss change, mean",
        meaning="mean change of a token's loss, in nats",
        value=_quality("mean_loss_change"),
        form=_number("+.4f"),
    ),
    Column(
        key="p99_loss_change_nats",
        heading="loss change, 99%",
        meaning="99th percentile of the change of a token's loss, in nats",
        value=_quality("p99_loss_change"),
        form=_number("+.3f"),
    ),
    Column(
        key="top1_agreement",
        heading="same top-1",
        meaning="share of scored tokens whose most likely token is the uncompressed model's",
        value=_quality("top1_agreement"),
        form=_number(".2%"),
    ),
    Column(
        key="worst_link_relative_squared_error",
        heading="worst link’s error",
        meaning="largest of the links' relative squared errors of the reconstruction",
        value=_worst_error,
        form=significant,
    ),
    Column(
        key="bytes_per_token_per_link",
        heading="bytes/token per link",
        meaning="payload bytes per token that crosses a link, mean over links",
        value=lambda p: p.bytes_per_token,
        form=_number(",.1f"),
    ),
    Column(
        key="bits_per_value",
        heading="bits/value",
        meaning="payload bits per value of the hidden states",
        value=lambda p: p.bits_per_value,
        form=_number(".3f"),
    ),
    Column(
        key="encode_us_per_token",
        heading="encode, µs/token",
        meaning="microseconds to encode a token, importance included, mean over links",
        value=_us_per_token("compress_s", "importance_s"),
        form=significant,
    ),
    Column(
        key="decode_us_per_token",
        heading="decode, µs/token",
        meaning="microseconds to decode a token, mean over links",
        value=_us_per_token("decompress_s"),
        form=significant,
    ),
    Column(
        key="tokens_per_s",
        heading="tokens/s",
        meaning="tokens processed per second in this run, on its machines, measuring of errors included",
        value=lambda p: p.record.tokens_per_s,
        form=significant,
    ),
    Column(key="note", heading="note", meaning="what a reader must know", value=_note),
)

SHOWN_COLUMNS = tuple(column for column in COLUMNS if column.heading)
