"""Figures from run records; nothing else is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from pipeline.records.files import write_figure
from pipeline.records.labels import codec_labels, model_label, weights_label
from pipeline.records.run_record import RunRecord

__all__ = ["plot_rate_quality"]


def plot_rate_quality(records: Sequence[RunRecord], path: Path) -> None:
    """Perplexity against payload bytes per token and link, one labelled point per record; written as PNG.

    Both axes are logarithmic. Runs of a codec that differ in neither share a point, whatever network was emulated.
    Where runs held weights differently, their labels say how. Records without a finite perplexity or without links have
    no point. Raises ValueError when none is left.
    """
    held = [weights_label(record) for record in records]
    behind = [f" ({weights})" if len(set(held)) > 1 else "" for weights in held]
    points = dict.fromkeys(
        (r.traffic_totals.bytes_per_token, r.results.avg_ppl, f"{label}{weights}", r.causal)
        for r, label, weights in zip(records, codec_labels(records), behind, strict=True)
        if r.results.avg_ppl is not None and r.traffic_totals.bytes_per_token
    )
    if not points:
        raise ValueError("no record has both a finite perplexity and traffic: nothing to draw")
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for nbytes, ppl, label, causal in points:
        axes.scatter(
            nbytes, ppl, s=45, zorder=3, marker="o" if causal else "x", color="tab:blue" if causal else "tab:red"
        )
        axes.annotate(label, (nbytes, ppl), xytext=(6, 6), textcoords="offset points", parse_math=False)
    baseline = next((ppl for _, ppl, label, _ in points if label == "none"), None)
    if baseline is not None:
        axes.axhline(baseline, color="0.6", linestyle="--", linewidth=1, zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.margins(x=0.15, y=0.15)
    axes.grid(color="0.9", zorder=0)
    axes.set_xlabel("payload bytes per token and link")
    axes.set_ylabel("perplexity")
    first = records[0]
    axes.set_title(
        f"{model_label(first.args.model_name)}{'' if behind[0] else f' {held[0]}'}, {first.dataset.num_tokens} tokens, "
        f"windows {first.protocol.max_length}/{first.protocol.stride}",
        fontsize=10,
        parse_math=False,
    )
    write_figure(path, figure, dpi=144)
    plt.close(figure)
