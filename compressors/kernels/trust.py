"""How far a token's prediction from its id is trusted: whole, half or not at all.

A calibration has seen few texts with most ids, and none with some. Where the prediction does not fit, half of it, or
nothing, leaves less to be coded; the encoder compares and sends which. All sums are of one token.
"""

from __future__ import annotations

import numpy as np

from compressors.kernels.bits import jit

__all__ = ["NUM_TRUSTS", "apply_trust", "choose_trust"]

NUM_TRUSTS = 3
WEIGHTS = np.array([1, 0.5, 0], np.float32)


@jit
def _size(y, predicted, weight, inverse, sizes, bits):
    """About 2**23 sum log2(1 + |y - weight predicted| inverse), from the bits of the floats; `bits` views `sizes`."""
    for k in range(y.size):
        sizes[k] = np.float32(1) + abs(y[k] - weight * predicted[k]) * inverse
    total = np.int64(0)
    for k in range(y.size):
        total += bits[k]
    return total


@jit
def choose_trust(y, predicted, steps, trust):
    """Fill `trust` int32 [N], places in WEIGHTS, by what is left of y [N, H] in half steps; float32 all, steps [N]."""
    sizes = np.empty(y.shape[1], np.float32)
    bits = sizes.view(np.int32)
    for t in range(y.shape[0]):
        inverse, least = np.float32(2) / steps[t], np.int64(0)
        for i in range(NUM_TRUSTS):
            size = _size(y[t], predicted[t], WEIGHTS[i], inverse, sizes, bits)
            if i == 0 or size < least:
                least, trust[t] = size, i


@jit
def apply_trust(trust, predicted):
    """Scale the tokens' predictions [N, H]."""
    for t in range(predicted.shape[0]):
        if trust[t]:
            weight = WEIGHTS[trust[t]]
            for k in range(predicted.shape[1]):
                predicted[t, k] *= weight
