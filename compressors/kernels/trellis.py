"""Dependent quantisation of `compressors.klt.codec`: a trellis chooses a token's levels.

Two quantisers share one step. In half steps, the first reconstructs even numbers, the second odd numbers and 0; a
value's index counts within its quantiser. Which quantiser a component has follows from the parities of the indices
before it, by a machine of four states. The encoder looks for the path of least squared error plus a price for the bits
that each value's class makes likely (the Viterbi algorithm); the decoder only walks. Per token this packs space more
densely than rounding can. After Marcellin and Fischer 1990, "Trellis coded quantization of memoryless and Gauss-Markov
sources"; the states and the 0 of the second quantiser as in Schwarz et al. 2021, "Quantization and entropy coding in
the Versatile Video Coding (VVC) standard".

A token has LANES machines, each begun in state 0: component k is the next of machine k % LANES. So LANES components at
once, a stripe, can be searched, coded and decoded. Each machine's beginning costs about 1.5 bits: 0.02 to 0.03 bits per
value at H = 576, against one lane; 16 would cost 0.04, 4 would cost 0.01.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from compressors.kernels.bits import inlined, jit
from compressors.kernels.vectors import (
    LANES,
    as_floats,
    as_integers,
    gather,
    lane_numbers,
    load,
    magnitude,
    select,
    splat,
    store,
)

__all__ = ["LANES", "MAX_LEVEL", "Prices", "quantize", "reconstruct"]

MAX_LEVEL = 1 << 20  # half steps
LARGEST_COMPONENT = np.float32(1e4)  # that is reconstructed
UNREACHED = np.float32(1e30)
ZERO, QUARTER, HALF, ONE, TWO, THREE, FOUR = (np.float32(c) for c in (0, 0.25, 0.5, 1, 2, 3, 4))


class Prices(NamedTuple):
    """What the search gives for bits."""

    classes: np.ndarray  # int32 [H], of the components at this step, counted from 0
    rates: np.ndarray  # float32 [C, 2, S], of index magnitudes in each class and quantiser, squared half steps


# Costs and paths are tuples of four: of an even and an odd index in the first quantiser, then in the second; of states.


@inlined
def _errors(target, row, limit, rates):
    """Costs of the nearest level of each parity and quantiser: squared errors and the rates of their indices.

    The rates of a lane's class begin at `row`; `limit` is the largest index that they have.
    """
    size = magnitude(target)
    quarter = size * QUARTER
    even0 = as_integers(quarter + HALF)
    odd0 = as_integers(quarter)
    even1 = select(size >= ONE + HALF, as_integers((size + THREE) * QUARTER), 0)
    odd1 = as_integers((size + ONE) * QUARTER)
    error0 = size - as_floats(even0) * FOUR
    error1 = size - (as_floats(odd0) * FOUR + TWO)
    error2 = size - max(as_floats(even1) * FOUR - ONE, ZERO)
    error3 = size - (as_floats(odd1) * FOUR + ONE)
    second = row + (limit + 1)
    rate0 = gather(rates, row + min(even0 * 2, limit))
    rate1 = gather(rates, row + min(odd0 * 2 + 1, limit))
    rate2 = gather(rates, second + min(even1 * 2, limit))
    rate3 = gather(rates, second + min(odd1 * 2 + 1, limit))
    return error0 * error0 + rate0, error1 * error1 + rate1, error2 * error2 + rate2, error3 * error3 + rate3


@inlined
def _advance(costs, paths):
    """One step of the search in all lanes: what reaching each state costs, and the decisions. Bit s of a lane's says
    that state s is reached from the second of its two predecessors."""
    even0, odd0, even1, odd1 = costs
    path0, path1, path2, path3 = paths
    # States 0 and 2 are reached from 0 and 1, states 1 and 3 from 2 and 3.
    to_0, other_0 = path0 + even0, path1 + odd0
    to_1, other_1 = path2 + even1, path3 + odd1
    to_2, other_2 = path0 + odd0, path1 + even0
    to_3, other_3 = path2 + odd1, path3 + even1
    of_even = select(other_0 < to_0, 1, splat(0)) | select(other_2 < to_2, 4, splat(0))
    of_odd = select(other_1 < to_1, 2, splat(0)) | select(other_3 < to_3, 8, splat(0))
    to_0, to_1 = min(other_0, to_0), min(other_1, to_1)
    to_2, to_3 = min(other_2, to_2), min(other_3, to_3)
    least = min(min(to_0, to_1), min(to_2, to_3))
    return (to_0 - least, to_1 - least, to_2 - least, to_3 - least), of_even | of_odd


@jit
def _search(target, classes, change, rates, limit, width, decisions):
    """Fill `decisions` int32 [P] for `target` float32 [P]; returns the states int32 at the end of the cheapest path.

    `classes` int32 [P] and `change` give the components' classes, `rates` float32 are flat.
    """
    length = np.int32(2 * limit + 2)
    last = np.int32(rates.size // length - 1)
    paths = splat(ZERO), splat(UNREACHED), splat(UNREACHED), splat(UNREACHED)
    for begin in range(0, target.size, LANES):
        row = min(max(load(classes, begin) + change, 0), last) * length
        costs = _errors(load(target, begin), row, limit, rates)
        if begin + LANES > width:  # what is missing in the last stripe costs nothing
            is_there = lane_numbers() < np.int32(width - begin)
            even0, odd0, even1, odd1 = costs
            even0, odd0 = select(is_there, even0, ZERO), select(is_there, odd0, ZERO)
            even1, odd1 = select(is_there, even1, ZERO), select(is_there, odd1, ZERO)
            costs = even0, odd0, even1, odd1
        paths, chosen = _advance(costs, paths)
        store(decisions, begin, chosen)
    path0, path1, path2, _ = paths
    return select(path0 == ZERO, 0, select(path1 == ZERO, 1, select(path2 == ZERO, 2, splat(3))))


@jit
def _walk_back(target, decisions, states, levels):
    """Fill `levels` int32 [P] from the states at the end."""
    for begin in range(target.size - LANES, -1, -LANES):
        value = load(target, begin)
        size = magnitude(value)
        second = (load(decisions, begin) >> states) & 1
        quantizer, is_odd = states & 1, second ^ (states >> 1)
        add = quantizer - is_odd * 2 + 2  # the four lines of `_errors`
        level = as_integers((size + as_floats(add)) * QUARTER) * 4 + 2 - add
        level = select(size < select(add == 3, ONE + HALF, splat(ZERO)), 0, level)
        store(levels, begin, select(value < ZERO, level * -1, level))
        states = quantizer * 2 + second


@jit
def _scale(values, expected, inverse, target):
    """Fill `target` with what is to be quantised, in half steps; whether all of it is in range."""
    outside = np.int32(0)
    for k in range(values.size):
        t = (values[k] - expected[k]) * inverse
        target[k] = t
        outside |= np.int32(0) if abs(t) < np.float32(MAX_LEVEL - 4) else np.int32(1)
    return outside == 0


@jit
def quantize(y, predicted, steps, finer, prices, levels, is_raw):
    """Levels int32 [N, H] of what `predicted` leaves of components `y`, both float32 [N, H].

    `steps` float32 [N] are the tokens' steps, `finer` int32 [N] the quarter octaves by which they are finer. A token
    with a level out of range is marked in `is_raw`; raw tokens have levels 0.
    """
    num_tokens, width = y.shape
    padded = (width + LANES - 1) // LANES * LANES
    limit, rates = np.int32(prices.rates.shape[2] - 1), prices.rates.reshape(-1)
    target, classes = np.zeros(padded, np.float32), np.zeros(padded, np.int32)
    decisions, row_levels = np.empty(padded, np.int32), np.empty(padded, np.int32)
    classes[:width] = prices.classes
    for t in range(num_tokens):
        if not _scale(y[t], predicted[t], ONE / (HALF * steps[t]), target[:width]):
            is_raw[t] = True
        if is_raw[t]:
            levels[t] = 0
            continue
        states = _search(target, classes, np.int32(2 * finer[t]), rates, limit, width, decisions)
        _walk_back(target, decisions, states, row_levels)
        levels[t] = row_levels[:width]


@jit
def reconstruct(levels, steps, predicted, is_raw, decoded):
    """Fill `decoded` float32 [N, H] with the components that the levels stand for; the rest as in `quantize`.

    Of raw tokens it is `predicted`.
    """
    for t in range(levels.shape[0]):
        half = ZERO if is_raw[t] else HALF * steps[t]
        row, expected, row_levels = decoded[t], predicted[t], levels[t]
        for k in range(row.size):
            value = expected[k] + np.float32(row_levels[k]) * half
            value = -LARGEST_COMPONENT if value < -LARGEST_COMPONENT else value
            row[k] = LARGEST_COMPONENT if value > LARGEST_COMPONENT else value
