"""Figures of the analyses of layers and heads, from the JSON that `analyse.py` writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pipeline.records.files import write_figure

__all__ = ["plot_heads", "plot_layers"]

_TITLES = {
    "spearman": "Spearman correlation",
    "kendall": "Kendall's tau",
    "top_k_overlap": "overlap of the top {top:.0%}",
    "jensen_shannon": "Jensen-Shannon distance",
    "wasserstein": "Wasserstein distance (share of the window)",
}
_CORRELATIONS = ("spearman", "kendall")
_SHARES = ("top_k_overlap", "jensen_shannon")


def plot_layers(analysis: Mapping[str, Any], metric: str, path: Path) -> None:
    """One heatmap per measure of one metric, and each layer's likeness to the last one and to position, as PNG."""
    measures = {name: np.array(matrix, dtype=float) for name, matrix in analysis["metrics"][metric]["pairs"].items()}
    titles = {name: title.format(top=analysis["top_fraction"]) for name, title in _TITLES.items()}
    figure = _figure(13.5, 8.2)
    *maps, last = figure.subplots(2, 3).ravel()
    for axis, (name, matrix) in zip(maps, measures.items(), strict=True):
        limits = {"vmin": -1, "vmax": 1, "cmap": "RdBu"} if name in _CORRELATIONS else {"vmin": 0, "cmap": "viridis"}
        if name in _SHARES:
            limits["vmax"] = 1
        figure.colorbar(axis.imshow(matrix, origin="lower", **limits), ax=axis, shrink=0.85)
        axis.set(title=titles[name], xlabel="layer", ylabel="layer")
    for name in (*_CORRELATIONS, "top_k_overlap"):
        last.plot(measures[name][:-1, -1], marker=".", label=titles[name])
    last.plot(
        analysis["metrics"][metric]["spearman_with_position"],
        color="0.5",
        linestyle=":",
        label="Spearman with position",
    )
    last.axhline(0, color="0.8", linewidth=1, zorder=0)
    last.set(title="each layer against the last one, and position", xlabel="layer", ylim=(-1.02, 1.02))
    last.grid(alpha=0.3)
    last.legend()
    figure.suptitle(
        f"Which tokens are important? Layers of {analysis['model']['label']} compared "
        f"(metric: {metric}, {analysis['num_windows']} windows of up to {analysis['protocol']['max_length']} tokens)"
    )
    write_figure(path, figure, dpi=110)


def plot_heads(analysis: Mapping[str, Any], path: Path) -> None:
    """Each head's share of its layer's relevance as a heatmap, and the layers' sums, as PNG."""
    weights = np.array(analysis["weights"])
    sums = np.abs(np.array(analysis["relevance"])).sum(1)
    num_layers, num_heads = weights.shape
    figure = _figure(9.5, 2.5 + 0.17 * num_layers)
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    image = heat.imshow(weights, origin="lower", aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=heat, label="share of the layer's relevance")
    heat.set(xlabel="head", ylabel="layer", title=f"equal heads would have {1 / num_heads:.1%} each")
    bars.barh(range(num_layers), sums / sums.sum())
    bars.xaxis.set_major_formatter(PercentFormatter(1))
    bars.set(xlabel="share of all heads' relevance", title="layers")
    bars.grid(axis="x", alpha=0.3)
    figure.suptitle(f"Relevance of attention heads by AttnLRP, {analysis['model']['label']}")
    write_figure(path, figure, dpi=110)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
