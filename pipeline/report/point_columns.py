"""The columns of a table of points."""

from __future__ import annotations

from collections.abc import Callable

from pipeline.report.columns import (
    EMULATION_COLUMNS,
    MISSING,
    Column,
    Value,
    number,
    percent,
    perplexity,
    significant,
)
from pipeline.report.measured_point import MeasuredPoint

__all__ = ["COLUMNS", "CONSOLE_COLUMNS", "SHOWN_COLUMNS"]


def _quality(name: str) -> Callable[[MeasuredPoint], Value]:
    return lambda point: getattr(point.quality, name) if point.quality else None


def _interval(point: MeasuredPoint) -> tuple[float, float] | None:
    """The ends of the change of perplexity."""
    ends = point.quality.ppl_interval if point.quality else None
    return (ends[0] - 1, ends[1] - 1) if ends else None


def _interval_end(index: int) -> Callable[[MeasuredPoint], Value]:
    def value(point: MeasuredPoint) -> Value:
        ends = _interval(point)
        return ends[index] if ends else None

    return value


def _interval_text(point: MeasuredPoint) -> str:
    ends = _interval(point)
    return f"{percent(ends[0])} to {percent(ends[1])}" if ends else MISSING


def _note(point: MeasuredPoint) -> str:
    notes = [
        "" if point.causal else "not causal",
        "per-token data cannot be used" if point.unread else "",
        "ran on something else" if point.elsewhere else "",
    ]
    return ", ".join(filter(None, notes))


COLUMNS: tuple[Column[MeasuredPoint], ...] = (
    Column(
        key="codec",
        heading="codec",
        meaning="what was on the links",
        value=lambda p: p.label,
        is_text=True,
        on_console=True,
    ),
    Column(
        key="perplexity",
        heading="perplexity",
        meaning="exp of the mean loss of all scored tokens",
        value=lambda p: p.ppl,
        form=perplexity,
        on_console=True,
    ),
    Column(
        key="ppl_change",
        heading="change",
        meaning="perplexity over that of the uncompressed point, less 1",
        value=lambda p: p.ppl_change,
        form=percent,
        on_console=True,
    ),
    Column(
        key="ppl_change_low",
        heading="95% interval",
        meaning="of the change: paired bootstrap over windows, where there are enough",
        value=_interval_end(0),
        show=_interval_text,
    ),
    Column(key="ppl_change_high", heading="", meaning="", value=_interval_end(1)),
    Column(
        key="mean_loss_change_nats",
        heading="loss change, mean",
        meaning="mean change of a token's loss, in nats",
        value=_quality("mean_loss_change"),
        form=number("+.4f"),
    ),
    Column(
        key="p99_loss_change_nats",
        heading="loss change, 99%",
        meaning="99th percentile of the change of a token's loss, in nats",
        value=_quality("p99_loss_change"),
        form=number("+.3f"),
    ),
    Column(
        key="top1_agreement",
        heading="same top-1",
        meaning="share of scored tokens whose most likely token is the uncompressed model's",
        value=_quality("top1_agreement"),
        form=number(".2%"),
    ),
    Column(
        key="worst_link_relative_squared_error",
        heading="worst link’s error",
        meaning="largest of the links' relative squared errors of the reconstruction",
        value=lambda p: p.worst_error,
        form=significant,
    ),
    Column(
        key="bytes_per_token_per_link",
        heading="bytes/token per link",
        meaning="payload bytes per token that crosses a link, mean over links",
        value=lambda p: p.bytes_per_token,
        form=number(",.1f"),
        on_console=True,
    ),
    Column(
        key="bits_per_value",
        heading="bits/value",
        meaning="payload bits per value of the hidden states",
        value=lambda p: p.bits_per_value,
        form=number(".3f"),
        on_console=True,
    ),
    Column(
        key="encode_us_per_token",
        heading="encode, µs/token",
        meaning="microseconds to encode a token, importance included, mean over links",
        value=lambda p: p.encode_us_per_token,
        form=significant,
        on_console=True,
    ),
    Column(
        key="decode_us_per_token",
        heading="decode, µs/token",
        meaning="microseconds to decode a token, mean over links",
        value=lambda p: p.decode_us_per_token,
        form=significant,
        on_console=True,
    ),
    Column(
        key="tokens_per_s",
        heading="tokens/s",
        meaning="tokens processed per second in this run, on its machines, measuring of errors included",
        value=lambda p: p.record.tokens_per_s,
        form=significant,
        on_console=True,
    ),
    Column(
        key="predicted_tokens_per_s",
        heading="predicted tokens/s",
        meaning="the same of the whole run, filling and draining included, by the formula for the emulated network",
        value=lambda p: p.predicted_tokens_per_s,
        form=significant,
        on_console=True,
        if_any=True,
    ),
    Column(
        key="predicted_over_measured",
        heading="predicted/measured",
        meaning="predicted tokens/s over measured",
        value=lambda p: p.predicted_over_measured,
        form=number(".3f"),
        on_console=True,
        if_any=True,
    ),
    *EMULATION_COLUMNS,
    Column(
        key="note", heading="note", meaning="what a reader must know", value=_note, is_text=True, on_console=True
    ),
    Column(key="run_id", heading="", meaning="", value=lambda p: p.record.run_id, is_text=True),
    Column(key="digest", heading="", meaning="", value=lambda p: p.record.digest, is_text=True),
)

SHOWN_COLUMNS = tuple(column for column in COLUMNS if column.heading)
CONSOLE_COLUMNS = tuple(column for column in SHOWN_COLUMNS if column.on_console)
