"""Perplexity, exp(total negative log-likelihood / scored tokens), from sums that do not depend on grouping."""

from __future__ import annotations

import math
from collections.abc import Iterable

__all__ = ["perplexity", "sum_nll"]


def perplexity(total_nll: float, num_scored: int) -> float:
    """exp of the mean negative log-likelihood in nats; inf when that overflows, nan when nothing was scored."""
    if num_scored == 0:
        return math.nan
    try:
        return math.exp(total_nll / num_scored)
    except OverflowError:
        return math.inf


def sum_nll(losses: Iterable[float]) -> float:
    """Exactly rounded sum, so that it does not depend on how tokens were grouped."""
    return math.fsum(losses)
