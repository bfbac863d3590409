"""Dependent quantisation of `compressors.klt.codec`: a trellis chooses a token's levels, prediction is in the loop.

Two quantisers share one step. In half steps, the first reconstructs even numbers, the second odd numbers and 0; a
value's index counts within its quantiser. Which quantiser a component has follows from the parities of the indices
before it, by a machine of four states that starts anew with every token. The encoder looks for the path of least
squared error plus a price for the bits that each value's class makes likely (the Viterbi algorithm); the decoder only
walks. Per token this packs space more densely than rounding can. After Marcellin and Fischer 1990, "Trellis coded
quantization of memoryless and Gauss-Markov sources"; the states and the 0 of the second quantiser as in Schwarz et
al. 2021, "Quantization and entropy coding in the Versatile Video Coding (VVC) standard".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from compressors.kernels.bits import inlined, jit

__all__ = [
    "MAX_LEVEL",
    "NEXT_STATE",
    "Prediction",
    "Prices",
    "index_of_level",
    "level_of_index",
    "quantize",
    "reconstruct",
]

MAX_LEVEL = 1 << 20  # half steps
NEXT_STATE = np.array([[0, 2], [2, 0], [1, 3], [3, 1]])  # by state and parity of the index; state >> 1: the quantiser
TEMPORAL_LIMIT = np.float32(1e4)  # of predicted and reconstructed components
UNREACHED = np.float32(1e30)
QUARTER, HALF, ONE, TWO, THREE, FOUR = (np.float32(c) for c in (0.25, 0.5, 1, 2, 3, 4))


class Prediction(NamedTuple):
    """What both ends of a link know of a frame's components [N, H] before their levels."""

    from_ids: np.ndarray  # float32 [N, H]
    # What the token before adds, its components @ in @ out; R = 0 where it adds nothing.
    temporal_in: np.ndarray  # float32 [H, R]
    temporal_out: np.ndarray  # float32 [R, H]
    tokens_per_row: int  # a row's first token has none before it


class Prices(NamedTuple):
    """What the search gives for bits."""

    classes: np.ndarray  # int32 [H], of the components at this step, counted from 0
    rates: np.ndarray  # float32 [C, 2, S], of index magnitudes in each class and quantiser, squared half steps


@inlined
def index_of_level(level, quantizer):
    """Half steps to the index in quantiser 0 (even levels) or 1 (odd levels and 0)."""
    return (level + (quantizer if level > 0 else 0)) >> 1


@inlined
def level_of_index(index, quantizer):
    """Inverse of `index_of_level`."""
    if index > 0:
        return 2 * index - quantizer
    return 2 * index + (quantizer if index < 0 else 0)


@jit
def _predict(decoded, t, prediction, is_raw, hidden):
    """Fill decoded[t] with what is expected of token t; `hidden` float32 [R] is scratch. Raw tokens predict nothing."""
    row = decoded[t]
    row[:] = prediction.from_ids[t]
    if hidden.size == 0 or t % prediction.tokens_per_row == 0 or is_raw[t - 1]:
        return
    previous, temporal_in, temporal_out = decoded[t - 1], prediction.temporal_in, prediction.temporal_out
    hidden[:] = 0
    for k in range(previous.size):
        value = previous[k]
        for r in range(hidden.size):
            hidden[r] += value * temporal_in[k, r]
    for r in range(hidden.size):
        value = hidden[r]
        for k in range(row.size):
            row[k] += value * temporal_out[r, k]


@jit
def _add_levels(row, levels, half):
    for k in range(row.size):
        value = row[k] + np.float32(levels[k]) * half
        row[k] = min(max(value, -TEMPORAL_LIMIT), TEMPORAL_LIMIT)


@jit
def _best_levels(target, classes, rates, decisions, candidates, levels):
    """Levels int32 [H] of `target` float32 [H] in half steps.

    `rates` float32 [C, 2, S] is what index magnitudes cost in each class and quantiser, in squared half steps.
    """
    largest = rates.shape[2] - 1
    cost0, cost1, cost2, cost3 = np.float32(0), UNREACHED, UNREACHED, UNREACHED
    for k in range(target.size):
        size = abs(target[k])
        # Of each quantiser the nearest level with an even and with an odd index.
        even0 = FOUR * np.floor(QUARTER * size + HALF)
        odd0 = FOUR * np.floor(QUARTER * size) + TWO
        even1 = FOUR * np.floor(QUARTER * (size + THREE)) - ONE if size >= ONE + HALF else np.float32(0)
        odd1 = FOUR * np.floor(QUARTER * (size + ONE)) + ONE
        rate0, rate1 = rates[classes[k], 0], rates[classes[k], 1]
        even_cost0 = (size - even0) ** 2 + rate0[min(np.int32(even0) >> 1, largest)]
        odd_cost0 = (size - odd0) ** 2 + rate0[min(np.int32(odd0) >> 1, largest)]
        even_cost1 = (size - even1) ** 2 + rate1[min((np.int32(even1) + 1) >> 1, largest)]
        odd_cost1 = (size - odd1) ** 2 + rate1[min((np.int32(odd1) + 1) >> 1, largest)]
        candidates[k, 0], candidates[k, 1], candidates[k, 2], candidates[k, 3] = even0, odd0, even1, odd1
        # States 0 and 2 are reached from 0 and 1, states 1 and 3 from 2 and 3.
        to_0, other_0 = cost0 + even_cost0, cost1 + odd_cost0
        to_1, other_1 = cost2 + even_cost1, cost3 + odd_cost1
        to_2, other_2 = cost0 + odd_cost0, cost1 + even_cost0
        to_3, other_3 = cost2 + odd_cost1, cost3 + even_cost1
        decisions[k, 0], decisions[k, 1] = other_0 < to_0, other_1 < to_1
        decisions[k, 2], decisions[k, 3] = other_2 < to_2, other_3 < to_3
        cost0, cost1, cost2, cost3 = min(to_0, other_0), min(to_1, other_1), min(to_2, other_2), min(to_3, other_3)
        least = min(min(cost0, cost1), min(cost2, cost3))
        cost0, cost1, cost2, cost3 = cost0 - least, cost1 - least, cost2 - least, cost3 - least
    state = 0 if cost0 == 0 else 1 if cost1 == 0 else 2 if cost2 == 0 else 3
    for k in range(target.size - 1, -1, -1):
        second = decisions[k, state]
        level = np.int32(candidates[k, 2 * (state & 1) + (second ^ (state >> 1))])
        levels[k] = level if target[k] >= 0 else -level
        state = 2 * (state & 1) + second


@jit
def quantize(y, steps, finer, prediction, prices, levels, is_raw, decoded):
    """Closed-loop quantisation: levels int32 [N, H] of what prediction leaves of components y float32 [N, H].

    `steps` float32 [N] are the tokens' steps, `finer` int32 [N] the quarter octaves by which they are finer; `decoded`
    [N, H] becomes what `reconstruct` will give. A token with a level out of range is marked in `is_raw`.
    """
    num_tokens, width = y.shape
    hidden = np.empty(prediction.temporal_in.shape[1], np.float32)
    target = np.empty(width, np.float32)
    classes, rates = prices.classes, prices.rates
    token_classes = np.empty(width, np.int32)
    decisions = np.empty((width, 4), np.int8)
    candidates = np.empty((width, 4), np.float32)
    for t in range(num_tokens):
        row = decoded[t]
        _predict(decoded, t, prediction, is_raw, hidden)
        half = HALF * steps[t]
        inverse = ONE / half
        for k in range(width):
            target[k] = (y[t, k] - row[k]) * inverse
            token_classes[k] = min(max(classes[k] + 2 * finer[t], 0), rates.shape[0] - 1)
            if not (abs(target[k]) < np.float32(MAX_LEVEL - 4)):
                is_raw[t] = True
        if is_raw[t]:
            levels[t] = 0
            continue
        _best_levels(target, token_classes, rates, decisions, candidates, levels[t])
        _add_levels(row, levels[t], half)


@jit
def reconstruct(levels, steps, prediction, is_raw, decoded):
    """Components float32 [N, H] from levels; the rest as in `quantize`."""
    hidden = np.empty(prediction.temporal_in.shape[1], np.float32)
    for t in range(levels.shape[0]):
        _predict(decoded, t, prediction, is_raw, hidden)
        _add_levels(decoded[t], levels[t], HALF * steps[t])
