"""What a report says about the reader's link: the recommendation in words, the fastest point on a network.

Between `results` and `prediction`, which compute, and the pages, which lay out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.columns import percent
from pipeline.report.measured_point import MeasuredPoint
from pipeline.report.prediction import Network, Prediction, predict_decode, predict_prefill
from pipeline.report.quality import MIN_WINDOWS
from pipeline.report.results import Results, Setting, recommend

__all__ = ["Outlook", "fastest", "predict", "predicted_figure", "recommendation_text", "verdict_text", "within_budget"]


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Which networks to predict for, and how much perplexity may rise (0.01: by 1%)."""

    bandwidths_mbits: tuple[float, ...] = (10.0, 100.0, 1000.0)
    rtts_ms: tuple[float, ...] = (1.0, 40.0)
    max_ppl_increase: float = 0.01

    @property
    def networks(self) -> list[tuple[str, Network]]:
        """(name, network), the bandwidth changing fastest."""
        return [
            (f"{mbits:g} Mbit/s, {rtt:g} ms", Network(bits_per_s=mbits * 1e6, rtt_s=rtt / 1e3))
            for rtt in self.rtts_ms
            for mbits in self.bandwidths_mbits
        ]


def within_budget(point: MeasuredPoint, outlook: Outlook) -> bool:
    """Whether the point's perplexity is within the budget and can be believed (a codec that is not causal
    cannot).
    """
    quality = point.quality
    return bool(quality and point.causal and quality.ppl_ratio <= 1 + outlook.max_ppl_increase)


def fastest(
    points: Sequence[MeasuredPoint], network: Network, outlook: Outlook, *, decode: bool
) -> MeasuredPoint | None:
    """Of the points within the budget, the one whose prefill or decoding takes least, the first of equals."""
    fit = [point for point in points if within_budget(point, outlook)]
    predicted = [(point, predict(point, network, decode=decode)) for point in fit]
    known = [(prediction.s_per_token, point) for point, prediction in predicted if prediction]
    return min(known, key=lambda item: item[0])[1] if known else None


def predict(point: MeasuredPoint, network: Network, *, decode: bool) -> Prediction | None:
    """Of decoding, or of prefill; None where the run did not measure what it takes."""
    if point.costs is None:
        return None
    return predict_decode(point.costs, network) if decode else predict_prefill(point.costs, network)


def predicted_figure(prediction: Prediction | None, *, decode: bool) -> float | None:
    """As all tables show it: milliseconds per token of decoding, tokens per second of prefill."""
    if prediction is None:
        return None
    return 1e3 * prediction.s_per_token if decode else prediction.tokens_per_s


def verdict_text(results: Results, setting: Setting, outlook: Outlook) -> str:
    """`recommendation_text`, and that it has been given without files that are no records, where there are any."""
    text, names = recommendation_text(setting, outlook), results.skipped_names
    if not names:
        return text
    if len(names) == 1:
        return text + f" Not counted: 1 file that is no record, {names[0]}."
    return text + f" Not counted: {len(names)} files that are no records, {names[0]} first."


def recommendation_text(setting: Setting, outlook: Outlook) -> str:
    """The cheapest point within the budget, and how sure that is."""
    budget = f"{100 * outlook.max_ppl_increase:g}%"
    if setting.baseline is None:
        return f"No recommendation within +{budget} perplexity: there is no uncompressed point to compare with."
    if setting.baseline.unread:
        why = setting.baseline.quality_note
        return f"No recommendation within +{budget} perplexity: per-token data cannot be used, {why}."
    compressed = [p for p in setting.points if p.causal and not p.uncompressed]
    unread = [p.label for p in compressed if p.unread or p.bytes_per_token is None]
    if unread and len(unread) == len(compressed):
        return f"No recommendation within +{budget} perplexity: {_unread_in_words(unread)}."
    caveat = f" Left out: {_unread_in_words(unread)}." if unread else ""
    return _verdict(setting, outlook, budget) + caveat


def _unread_in_words(labels: Sequence[str]) -> str:
    return f"the per-token data of {', '.join(labels)} cannot be used"


def _verdict(setting: Setting, outlook: Outlook, budget: str) -> str:
    """Of the points that could be compared."""
    best = recommend(setting, outlook.max_ppl_increase)
    if best.cheapest is None or best.cheapest.uncompressed:
        compared = " that could be compared" if any(p.unread for p in setting.points) else ""
        return f"No compressed causal point{compared} stays within +{budget} perplexity."
    text = f"Within +{budget} perplexity the cheapest is {_describe(best.cheapest, setting)}."
    if best.cheapest.quality is None or best.cheapest.quality.ppl_interval is None:
        return text + f" How sure that is cannot be told from fewer than {MIN_WINDOWS} windows."
    if best.certain is best.cheapest:
        return text + " Its whole 95% interval is within."
    if best.certain is None or best.certain.uncompressed:
        return text + " Its 95% interval is not within, nor is that of another compressed point."
    certain = _describe(best.certain, setting)
    return text + f" Its 95% interval is not within; the cheapest whose interval is: {certain}."


def _describe(point: MeasuredPoint, setting: Setting) -> str:
    """Of a recommended point, which has been compared with the baseline."""
    quality, baseline = point.quality, setting.baseline
    assert quality is not None and baseline is not None
    interval = ""
    if quality.ppl_interval:
        low, high = (percent(end - 1) for end in quality.ppl_interval)
        interval = f", 95% interval {low} to {high}"
    saving = ""
    nbytes = point.bytes_per_token
    if baseline.bytes_per_token and nbytes:
        saving = f", {baseline.bytes_per_token / nbytes:.2g} times fewer than uncompressed"
    return (
        f"{point.codecs}: {nbytes:,.1f} bytes per token and link{saving}; "
        f"perplexity {percent(quality.ppl_ratio - 1)}{interval}"
    )
