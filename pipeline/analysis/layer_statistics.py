"""How alike are layers in which tokens they find important? Statistics, with NumPy and SciPy alone.

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

import numpy as np
from scipy import stats
from scipy.spatial.distance import jensenshannon

__all__ = ["MEASURES", "compare_layers", "early_and_late", "position_correlation"]

MEASURES = ("spearman", "kendall", "top_k_overlap", "jensen_shannon", "wasserstein")


def compare_layers(windows: Sequence[np.ndarray], top_fraction: float) -> dict[str, np.ndarray]:
    """Every measure as a symmetric float64 [L, L], mean over windows.

    Args:
        windows: importance of each window's tokens by layer, [L, T] each, not negative; T may differ.
        top_fraction: of a window's tokens that count as the top ones, at least one.

    Raises ValueError without windows or with a single layer, or where a window has fewer than two tokens, NaN, or a
    layer without importance.
    """
    if not windows:
        raise ValueError("layers cannot be compared without a window")
    if len(windows[0]) < 2:
        raise ValueError("a model of one layer has no layers to compare")
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


def position_correlation(windows: Sequence[np.ndarray]) -> np.ndarray:
    """Spearman correlation of each layer's importance with the position, [L] float64, mean over windows.

    What layers agree on may be no more than that: some metrics favour early or late tokens whatever they are.
    """
    ranks = [stats.rankdata(window, axis=1) for window in windows]
    return np.mean([[np.corrcoef(row, np.arange(len(row)))[0, 1] for row in window] for window in ranks], axis=0)


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
