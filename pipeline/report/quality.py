"""What a codec does to the model's predictions, token by token, against the same run without compression.

Works on the per-token files of two records (`record.read_per_token`): loss and top-1 id of every scored
token, and its window. Exact, since both runs scored the same tokens; logits are not needed. What leaves no
trace in those two columns (the shape of the distribution below its top) is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["MIN_WINDOWS", "Quality", "compare"]

MIN_WINDOWS = 8  # with fewer, resampling windows says little: three give an interval far too narrow
_NUM_RESAMPLES = 2000
_SEED = 20260101
_LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Quality:
    """One point against its baseline. Losses are in nats; NaN or infinity where the point's losses are not
    finite.

    `ppl_interval` is None where fewer than `MIN_WINDOWS` windows were scored, or a loss is not finite.
    """

    ppl_ratio: float
    ppl_interval: tuple[float, float] | None
    mean_loss_change: float
    p99_loss_change: float
    top1_agreement: float
    num_tokens: int
    num_windows: int


def compare(baseline: Mapping[str, np.ndarray], point: Mapping[str, np.ndarray]) -> Quality:
    """`point` against `baseline`: columns `loss` float32, `top1` and `window` int32, a row per scored token.

    The perplexity ratio exp(mean loss of the point - mean loss of the baseline) comes with the 95% percentile
    interval of a paired bootstrap (Efron and Tibshirani 1993, chapter 13): windows are drawn with
    replacement, each with all its tokens in both runs, so that what a window has in common cancels.
    Neighbouring windows share context and are not quite independent, which the interval does not know. The
    seed is fixed: the same files give the same interval.

    Raises ValueError when the two did not score the same tokens of the same windows.
    """
    if not np.array_equal(baseline["window"], point["window"]):
        raise ValueError(
            f"{len(point['window'])} scored tokens in other windows than the baseline's {len(baseline['window'])}"
        )
    if len(point["window"]) == 0:
        raise ValueError("no token was scored")
    change = point["loss"].astype(np.float64) - baseline["loss"].astype(np.float64)
    windows, window_of_token = np.unique(point["window"], return_inverse=True)
    sums = np.bincount(window_of_token, weights=change)
    counts = np.bincount(window_of_token)
    finite = bool(np.isfinite(change).all())
    mean = float(change.mean())
    return Quality(
        ppl_ratio=_exp(mean),
        ppl_interval=_bootstrap(sums, counts) if finite and len(windows) >= MIN_WINDOWS else None,
        mean_loss_change=mean,
        p99_loss_change=float(np.quantile(change, 0.99)) if finite else math.nan,
        top1_agreement=float(np.mean(point["top1"] == baseline["top1"])),
        num_tokens=len(change),
        num_windows=len(windows),
    )


def _bootstrap(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Percentile interval of exp(sum / count); how often each window is drawn is multinomial."""
    num_windows = len(sums)
    draws = np.random.default_rng(_SEED).multinomial(num_windows, np.full(num_windows, 1 / num_windows), _NUM_RESAMPLES)
    means = (draws @ sums) / (draws @ counts)
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return _exp(float(low)), _exp(float(high))


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
