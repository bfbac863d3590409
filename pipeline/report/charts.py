"""The trade-off chart as SVG text: perplexity against bits per value, with bytes per token on the upper edge.

The two horizontal scales are one quantity: bytes per token and link = bits per value x hidden size / 8. The
vertical scale is asinh of the perplexity's change, which is linear within about 1% of the baseline and
logarithmic beyond, so that one ruinous codec does not press all others flat; what lies beyond tenfold stands
in a band on top. Colours come from the page's style sheet. Knows nothing of records.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["ChartPoint", "pareto_front", "trade_off_svg"]

_LINEAR = 0.01  # the change of perplexity up to which the scale is linear
_CUT = 10.0  # perplexity over baseline beyond which points stand in the band
_TICKS = (-0.5, -0.2, -0.1, -0.03, -0.01, 0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 9.0)
_LABEL_CHARS = 26
_GAPS = (0.0, 12.0, 24.0, 36.0)  # how far from its mark a label may stand, in pixels
_FEW_POINTS = 40  # with more, lines to labels further off would cross the marks
_CHAR_WIDTH, _LINE_HEIGHT, _RADIUS = 6.6, 12.0, 4.5
_LEFT, _RIGHT, _TOP, _BOTTOM, _BAND = 52.0, 44.0, 34.0, 40.0, 54.0

_Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, kw_only=True)
class ChartPoint:
    """`ppl` None or infinite: not finite. `detail` is what a tap or the pointer shows."""

    label: str
    bits_per_value: float
    ppl: float | None
    causal: bool
    detail: str

    @property
    def finite_ppl(self) -> float:
        """Infinity where it is not finite."""
        return self.ppl if self.ppl is not None and math.isfinite(self.ppl) else math.inf


@dataclass(frozen=True)
class _Scale:
    """Figures to pixels."""

    low_bits: float
    high_bits: float
    base_ppl: float
    low_change: float
    high_change: float
    left: float
    right: float
    top: float
    bottom: float

    def x(self, bits: float) -> float:
        return _between(math.log(bits), math.log(self.low_bits), math.log(self.high_bits), self.left, self.right)

    def y(self, change: float) -> float:
        return _between(_bend(change), _bend(self.low_change), _bend(self.high_change), self.bottom, self.top)


def pareto_front(points: Sequence[ChartPoint]) -> list[ChartPoint]:
    """Causal points that no other one beats in both bits and perplexity, fewest bits first."""
    front: list[ChartPoint] = []
    finite = [p for p in points if p.causal and math.isfinite(p.finite_ppl)]
    for point in sorted(finite, key=lambda p: (p.bits_per_value, p.finite_ppl)):
        if not front or point.finite_ppl < front[-1].finite_ppl:
            front.append(point)
    return front


def trade_off_svg(
    points: Sequence[ChartPoint],
    *,
    hidden_size: int,
    base_ppl: float | None,
    width: int,
    height: int,
    title: str,
) -> str:
    """An inline `<svg>` of `width` x `height` pixels, empty where no point has both a finite perplexity and traffic.

    `base_ppl` None: the best perplexity shown.
    """
    shown = [p for p in points if p.bits_per_value > 0]
    finite = [p.finite_ppl for p in shown if math.isfinite(p.finite_ppl)]
    if not finite:
        return ""
    scale = _scale(shown, base_ppl or min(finite), width, height)
    spots = {p: _spot(p, scale) for p in shown}
    front = [p for p in pareto_front(shown) if not _is_off_scale(p, scale)]
    steps = [spots[p] for p in front]
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="group" '
        f'aria-label="{escape(title)}">',
        *_axes(scale, hidden_size, banded=any(_is_off_scale(p, scale) for p in shown)),
        _front_line(steps),
    ]
    lines = [
        box
        for (x, y), (u, v) in zip(steps, steps[1:], strict=False)
        for box in ((x, y - 1, u, y + 1), (u - 1, y, u + 1, v))
    ]
    labels = _place_labels(sorted(shown, key=lambda p: (p not in front, p.finite_ppl)), spots, lines, scale)
    for point in shown:
        parts.append(_marker(point, spots[point], labels.get(point), off_scale=_is_off_scale(point, scale)))
    return "\n".join(parts) + "\n</svg>"


def _scale(points: Sequence[ChartPoint], base_ppl: float, width: int, height: int) -> _Scale:
    bits = [p.bits_per_value for p in points]
    ratios = [p.finite_ppl / base_ppl for p in points]
    changes = [ratio - 1 for ratio in ratios if ratio <= _CUT]
    banded = any(ratio > _CUT for ratio in ratios)
    low, high = min([0.0, *changes]), max([0.0, *changes])
    room = 0.08 * max(_bend(high) - _bend(low), 1.0)
    return _Scale(
        low_bits=min(bits) / 1.25,
        high_bits=max(bits) * 1.25,
        base_ppl=base_ppl,
        low_change=_LINEAR * math.sinh(_bend(low) - room),
        high_change=_LINEAR * math.sinh(_bend(high) + room),
        left=_LEFT,
        right=width - _RIGHT,
        top=_TOP + (_BAND if banded else 0.0),
        bottom=height - _BOTTOM,
    )


def _axes(scale: _Scale, hidden_size: int, *, banded: bool) -> Iterator[str]:
    left, right, bottom = scale.left, scale.right, scale.bottom
    if banded:
        yield f'<rect class="band" x="{left}" y="{_TOP}" width="{right - left:.1f}" height="{_BAND}"/>'
        yield _text(left + 5, _TOP + 12, f"off the scale: over {_CUT:g} times", "tick")
    previous = math.inf
    for change in _TICKS:
        y = scale.y(change)
        if not scale.low_change <= change <= scale.high_change or previous - y < 15:
            continue
        previous = y
        kind = "base" if change == 0 else "grid"
        yield f'<line class="{kind}" x1="{left}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _text(left - 6, y + 4, f"{scale.base_ppl * (1 + change):.3g}", "tick end")
        yield _text(right + 5, y + 4, _change(change), "tick")
    for bits in _ticks(scale.low_bits, scale.high_bits, (right - left) / 34, steps=(1, 1.5)):
        x = scale.x(bits)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        yield _text(x, bottom + 15, f"{bits:g}", "tick middle")
    for nbytes in _ticks(
        scale.low_bits * hidden_size / 8, scale.high_bits * hidden_size / 8, (right - left) / 52, steps=(1,)
    ):
        x = scale.x(8 * nbytes / hidden_size)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 4}" y2="{_TOP}"/>'
        yield _text(x, _TOP - 7, f"{nbytes:,g}", "tick middle")
    yield _text((left + right) / 2, bottom + 32, "bits per value", "axis middle")
    yield _text((left + right) / 2, 11, "payload bytes per token and link", "axis middle")
    yield _text(2, 11, "perplexity", "axis")
    yield _text(right + _RIGHT - 2, 11, "change", "axis end")


def _ticks(low: float, high: float, max_count: float, *, steps: Sequence[float]) -> list[float]:
    """Powers of two times `steps`, or of two or four alone where those are too many."""
    powers = range(math.floor(math.log2(low)) - 1, math.ceil(math.log2(high)) + 1)
    inside: list[float] = []
    for candidates in (
        [2.0**p * s for p in powers for s in steps],
        [2.0**p for p in powers],
        [2.0**p for p in powers if p % 2],
    ):
        inside = [value for value in candidates if low <= value <= high]
        if len(inside) <= max_count:
            break
    return inside


def _front_line(spots: Sequence[tuple[float, float]]) -> str:
    """Steps: from one point to the next, the perplexity of the cheaper one is the best to be had."""
    if len(spots) < 2:
        return ""
    path = f"M{spots[0][0]:.1f} {spots[0][1]:.1f}" + "".join(f"H{x:.1f}V{y:.1f}" for x, y in spots[1:])
    return f'<path class="front" d="{path}"/>'


def _marker(point: ChartPoint, spot: tuple[float, float], label: tuple[float, float] | None, *, off_scale: bool) -> str:
    x, y = spot
    r = _RADIUS
    kind = "point" if point.causal else "point leaky"
    if off_scale:
        shape = f'<path class="mark" d="M{x - r:.1f} {y + r:.1f}h{2 * r}L{x:.1f} {y - r:.1f}z"/>'
    elif point.causal:
        shape = f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    else:
        d = r + 0.8
        shape = f'<path class="mark" d="M{x:.1f} {y - d:.1f}l{d} {d}l{-d} {d}l{-d} {-d}z"/>'
    name = ""
    if label is not None:
        name = _leader(spot, label, point) + _text(*label, _short(point.label), "label")
    return (
        f'<g class="{kind}" tabindex="0" role="img" aria-label="{escape(point.detail)}">'
        f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="11"/>{shape}{name}</g>'
    )


def _leader(spot: tuple[float, float], label: tuple[float, float], point: ChartPoint) -> str:
    """A line from a label that stands apart from its point."""
    left, top, right, bottom = _label_box(label, point)
    x, y = min(max(spot[0], left), right), min(max(spot[1], top), bottom)
    if math.hypot(x - spot[0], y - spot[1]) < 14:
        return ""
    return f'<line class="leader" x1="{spot[0]:.1f}" y1="{spot[1]:.1f}" x2="{x:.1f}" y2="{y:.1f}"/>'


def _place_labels(
    points: Sequence[ChartPoint],
    spots: dict[ChartPoint, tuple[float, float]],
    lines: Sequence[_Box],
    scale: _Scale,
) -> dict[ChartPoint, tuple[float, float]]:
    """Where each label starts, first come first served; `lines` are avoided where that is easy. A label that
    finds no free place is left to the tooltip; among many points, so is one whose place is not right beside its mark.
    """
    r = _RADIUS + 1
    gaps = _GAPS if len(points) <= _FEW_POINTS else _GAPS[:1]
    taken: list[_Box] = [(x - r, y - r, x + r, y + r) for x, y in spots.values()]
    if scale.top > _TOP:
        taken.append((scale.left, _TOP, scale.left + 200, _TOP + 14))  # the band's own words
    placed = {}
    for point in points:
        boxes = {candidate: _label_box(candidate, point) for candidate in _candidates(spots[point], point, gaps)}
        free = [
            candidate
            for candidate, box in boxes.items()
            if box[0] >= scale.left + 2
            and box[2] <= scale.right
            and box[1] >= _TOP
            and box[3] <= scale.bottom
            and not any(_overlap(box, other) for other in taken)
        ]  # fmt: skip
        # Rather off the front's line, but not far away for that.
        clear = [c for c in free[:4] if not any(_overlap(boxes[c], line) for line in lines)]
        if free:
            placed[point] = (clear or free)[0]
            taken.append(boxes[placed[point]])
    return placed


def _candidates(
    spot: tuple[float, float], point: ChartPoint, gaps: Sequence[float]
) -> Iterator[tuple[float, float]]:
    """Places for a label's left end of the base line: beside the point, then further off."""
    x, y = spot
    width = _label_width(point)
    for gap in gaps:
        for dy in (4.0, -7.0 - gap, 15.0 + gap, -18.0 - gap, 26.0 + gap):
            yield x + 8 + gap / 2, y + dy
            yield x - 8 - gap / 2 - width, y + dy
        yield x - width / 2, y - 9 - gap
        yield x - width / 2, y + 17 + gap


def _label_box(label: tuple[float, float], point: ChartPoint) -> _Box:
    x, y = label
    return x, y - _LINE_HEIGHT + 2, x + _label_width(point), y + 3


def _label_width(point: ChartPoint) -> float:
    return _CHAR_WIDTH * len(_short(point.label)) + 2


def _overlap(a: _Box, b: _Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _spot(point: ChartPoint, scale: _Scale) -> tuple[float, float]:
    y = _TOP + _BAND - 12 if _is_off_scale(point, scale) else scale.y(point.finite_ppl / scale.base_ppl - 1)
    return scale.x(point.bits_per_value), y


def _is_off_scale(point: ChartPoint, scale: _Scale) -> bool:
    return point.finite_ppl / scale.base_ppl > _CUT


def _bend(change: float) -> float:
    return math.asinh(change / _LINEAR)


def _between(value: float, low: float, high: float, start: float, end: float) -> float:
    return start + (end - start) * (value - low) / (high - low)


def _change(change: float) -> str:
    return f"×{1 + change:g}" if change >= 1 else f"{change:+.0%}" if change else "0"


def _short(label: str) -> str:
    return label if len(label) <= _LABEL_CHARS else label[: _LABEL_CHARS - 1] + "…"


def _text(x: float, y: float, content: str, classes: str) -> str:
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'
