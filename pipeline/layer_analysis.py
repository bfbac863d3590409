"""How alike are layers in which tokens they find important? Statistics and a figure; plain NumPy and SciPy.

Takes the importance of tokens by layer, as `analyse.py` collects it, and compares every pair of layers, window by
window, in five ways; each result is the mean over windows:

    spearman         rank correlation of the tokens' importance
    kendall          the same by pairs of tokens: tau-b
    top_k_overlap    share that two layers' k most important tokens have in common
    jensen_shannon   distance of the two distributions of importance over tokens, base 2: 0 alike, 1 disjoint
    wasserstein      how far importance must be moved along the text to turn one into the other, as a share of the
                     window's length
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.spatial.distance import jensenshannon

__all__ = ["MEASURES", "compare_layers", "early_and_late", "plot_layers"]

MEASURES = ("spearman", "kendall", "top_k_overlap", "jensen_shannon", "wasserstein")
_TITLES = {
    "spearman": "Spearman correlation",
    "kendall": "Kendall's tau",
    "top_k_overlap": "overlap of the top {top:.0%}",
    "jensen_shannon": "Jensen-Shannon distance",
    "wasserstein": "Wasserstein distance (share of the window)",
}
_CORRELATIONS = ("spearman", "kendall")


def compare_layers(windows: Sequence[np.ndarray], top_fraction: float) -> dict[str, np.ndarray]:
    """Every measure as a symmetric float64 [L, L], mean over windows.

    Args:
        windows: importance of each window's tokens by layer, [L, T] each, not negative; T may differ.
        top_fraction: of a window's tokens that count as the top ones, at least one.

    Raises ValueError without windows, or where one has fewer than two tokens, NaN, or a layer without importance.
    """
    if not windows:
        raise ValueError("layers cannot be compared without a window")
    if not 0 < top_fraction <= 1:
        raise ValueError(f"the top fraction is {top_fraction}, it must be above 0 and at most 1")
    sums = {name: np.zeros((len(windows[0]),) * 2) for name in MEASURES}
    for number, window in enumerate(windows):
        window = np.asarray(window, dtype=np.float64)
        if window.shape[1] < 2:
            raise ValueError(f"window {number} has {window.shape[1]} tokens; at least 2 are needed to rank them")
        if not (np.isfinite(window).all() and (window >= 0).all() and (window.sum(1) > 0).all()):
            raise ValueError(f"window {number} has importance that is negative, not finite, or zero in a whole layer")
        for name, matrix in _compare(window, top_fraction).items():
            sums[name] += matrix
    return {name: total / len(windows) for name, total in sums.items()}


def _compare(window: np.ndarray, top_fraction: float) -> dict[str, np.ndarray]:
    num_layers, num_tokens = window.shape
    shares = window / window.sum(1, keepdims=True)
    k = max(1, round(top_fraction * num_tokens))
    is_top = np.zeros(window.shape)
    np.put_along_axis(is_top, np.argsort(-window, axis=1, kind="stable")[:, :k], 1, axis=1)
    ranks = stats.rankdata(window, axis=1)
    positions = np.arange(num_tokens)
    matrices = {
        "spearman": np.corrcoef(ranks).reshape(num_layers, num_layers),
        "kendall": np.eye(num_layers),
        "top_k_overlap": is_top @ is_top.T / k,
        "jensen_shannon": np.zeros((num_layers, num_layers)),
        "wasserstein": np.zeros((num_layers, num_layers)),
    }
    for i in range(num_layers):
        for j in range(i):
            a, b = shares[i], shares[j]
            for name, value in (
                ("kendall", stats.kendalltau(a, b).statistic),
                ("jensen_shannon", jensenshannon(a, b, base=2)),
                ("wasserstein", stats.wasserstein_distance(positions, positions, a, b) / num_tokens),
            ):
                matrices[name][i, j] = matrices[name][j, i] = value
    return matrices


def early_and_late(matrices: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Each measure as three numbers: the first layer against the last, the first third of the layers against the last
    third, and neighbours.
    """
    summary = {}
    for name, matrix in matrices.items():
        third = max(1, len(matrix) // 3)
        summary[name] = {
            "first_against_last": float(matrix[0, -1]),
            "early_against_late_third": float(matrix[:third, -third:].mean()),
            "neighbours": float(np.diagonal(matrix, 1).mean()) if len(matrix) > 1 else float("nan"),
        }
    return summary


def plot_layers(analysis: Mapping[str, Any], metric: str, path: Path) -> None:
    """One heatmap per measure, and each layer's likeness to the last one, as PNG.

    `analysis` is the JSON that `analyse.py layers` writes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measures = {name: np.array(matrix, dtype=float) for name, matrix in analysis["metrics"][metric]["pairs"].items()}
    figure = Figure(figsize=(13.5, 8.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).ravel()
    for axis, (name, matrix) in zip(axes, measures.items()):
        limits = {"vmin": -1, "vmax": 1, "cmap": "RdBu"} if name in _CORRELATIONS else {"vmin": 0, "cmap": "viridis"}
        if name in ("top_k_overlap", "jensen_shannon"):
            limits["vmax"] = 1
        image = axis.imshow(matrix, origin="lower", **limits)
        figure.colorbar(image, ax=axis, shrink=0.85)
        axis.set(title=_TITLES[name].format(top=analysis["top_fraction"]), xlabel="layer", ylabel="layer")
    last = axes[-1]
    for name in ("spearman", "kendall", "top_k_overlap"):
        last.plot(measures[name][:-1, -1], marker=".", label=_TITLES[name].format(top=analysis["top_fraction"]))
    last.set(title="each layer against the last one", xlabel="layer", ylim=(min(-0.05, last.get_ylim()[0]), 1.02))
    last.grid(alpha=0.3)
    last.legend()
    figure.suptitle(
        f"Which tokens are important? Layers of {analysis['model']['label']} compared "
        f"(metric: {metric}, {analysis['num_windows']} windows of up to {analysis['protocol']['max_length']} tokens)"
    )
    figure.savefig(path, dpi=110)
