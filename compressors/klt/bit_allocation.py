"""Whole bits for components of unequal size, and the uniform quantiser that goes with them.

Reverse water-filling (Cover and Thomas, "Elements of Information Theory", section 10.3.3) in whole bits: one after the
other to the component whose error falls most, up to 8 each. Steps and errors are those of the best uniform quantiser of
a Laplace distribution: tails are heavier than a normal distribution's, and what is clipped hurts most.
"""

from __future__ import annotations

import torch

__all__ = ["LAPLACE_STEP", "MAX_NBITS", "allocate"]

MAX_NBITS = 8
# Of a Laplace variable of variance 1 by bits: step of the best uniform quantiser, and its mean squared error.
LAPLACE_STEP = (0.0, 1.4142, 1.0874, 0.7309, 0.4610, 0.2800, 0.1657, 0.0961, 0.0548)
LAPLACE_ERROR = (1.0, 0.5, 0.1963, 0.07175, 0.02535, 0.008713, 0.002913, 0.0009486, 0.0003014)


def allocate(sizes: torch.Tensor, total: int, costs: torch.Tensor | None = None) -> torch.Tensor:
    """Whole bits of components of standard deviation `sizes` [H], int64 [H], `total` in all (or 8 each, if fewer).

    `costs` int64 [H] is what a bit of each component counts for in `total`, 1 if it is left out.
    """
    error = torch.tensor(LAPLACE_ERROR, dtype=torch.float64)
    costs = torch.ones(len(sizes), dtype=torch.int64) if costs is None else costs
    # What each bit of each component gains; it falls from bit to bit, so the best of them are a valid choice.
    gains = sizes.double().square().unsqueeze(1) * (error[:-1] - error[1:])
    order = (gains / costs.unsqueeze(1)).reshape(-1).argsort(descending=True, stable=True)
    chosen = order[costs[order // MAX_NBITS].cumsum(0) <= total]
    return torch.bincount(chosen // MAX_NBITS, minlength=len(sizes))
