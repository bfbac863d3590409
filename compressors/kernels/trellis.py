"""Dependent quantisation of `compressors.klt.codec`: a trellis chooses a token's levels.

Two quantisers share one step. In half steps, the first reconstructs even numbers, the second odd numbers and 0; a
value's index counts within its quantiser. Which quantiser a component has follows from the parities of the indices
before it, by a machine of four states. The encoder looks for the path of least squared error plus a price for the bits
that each value's class makes likely (the Viterbi algorithm); the decoder only walks. Per token this packs space more
densely than rounding can. After Marcellin and Fischer 1990, "Trellis coded quantization of memoryless and Gauss-Markov
sources"; the states and the 0 of the second quantiser as in Schwarz et al. 2021, "Quantization and entropy coding in
the Versatile Video Coding (VVC) standard".

A token has LANES machines, each begun in state 0: component k is the next of machine k % LANES. So LANES components at
once, a stripe, can be searched, coded and decoded.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from compressors.kernels.bits import inlined, jit

__all__ = ["LANES", "MAX_LEVEL", "Prices", "quantize", "reconstruct"]

# Of one token. Each begins in state 0, which costs it about 1.5 bits: 0.02 to 0.03 bits per value at H = 576, against
# one lane. 16 would cost 0.04, 4 would cost 0.01.
LANES = 8
MAX_LEVEL = 1 << 20  # half steps
LARGEST_COMPONENT = np.float32(1e4)  # that is reconstructed
UNREACHED = np.float32(1e30)
ZERO, QUARTER, HALF, ONE, TWO, THREE, FOUR = (np.float32(c) for c in (0, 0.25, 0.5, 1, 2, 3, 4))


class Prices(NamedTuple):
    """What the search gives for bits."""

    classes: np.ndarray  # int32 [H], of the components at this step, counted from 0
    rates: np.ndarray  # float32 [C, 2, S], of index magnitudes in each class and quantiser, squared half steps


# The loops over lanes run on slices, where the compiler sees that no index is negative, and over the size of one, which
# it does not know to be LANES: it would unroll them instead of making vectors of the lanes.
# Costs of a stripe are 4 rows of LANES: of an even and an odd index in the first quantiser, then in the second.


@inlined
def _stripe_errors(target, class_row, limit, costs, entries):
    for lane in range(class_row.size):
        size, row = abs(target[lane]), class_row[lane]
        even0 = FOUR * np.floor(QUARTER * size + HALF)
        odd0 = FOUR * np.floor(QUARTER * size) + TWO
        even1 = FOUR * np.floor(QUARTER * (size + THREE)) - ONE if size >= ONE + HALF else ZERO
        odd1 = FOUR * np.floor(QUARTER * (size + ONE)) + ONE
        costs[lane] = (size - even0) * (size - even0)
        costs[lane + LANES] = (size - odd0) * (size - odd0)
        costs[lane + 2 * LANES] = (size - even1) * (size - even1)
        costs[lane + 3 * LANES] = (size - odd1) * (size - odd1)
        second = row + limit + np.int32(1)
        entries[lane] = row + min(np.int32(even0) >> np.int32(1), limit)
        entries[lane + LANES] = row + min(np.int32(odd0) >> np.int32(1), limit)
        entries[lane + 2 * LANES] = second + min((np.int32(even1) + np.int32(1)) >> np.int32(1), limit)
        entries[lane + 3 * LANES] = second + min((np.int32(odd1) + np.int32(1)) >> np.int32(1), limit)


@jit
def _errors(target, class_rows, limit, costs, entries):
    """Squared errors of the nearest level of each parity and quantiser, and their places in the rates."""
    for stripe in range(target.size // LANES):
        part, rows = target[stripe * LANES :][:LANES], class_rows[stripe * LANES :][:LANES]
        wide = slice(stripe * 4 * LANES, (stripe + 1) * 4 * LANES)
        _stripe_errors(part, rows, limit, costs[wide], entries[wide])


@jit
def _add_rates(costs, entries, rates):
    for i in range(costs.size):
        costs[i] += rates[np.uint32(entries[i])]


@inlined
def _stripe_advance(costs, paths, decisions):
    """One step of the search in all lanes. `paths` float32 [4 LANES] is what reaching each state costs; bit s of a
    lane's decision says that state s is reached from the second of its two predecessors."""
    for lane in range(decisions.size):
        even0, odd0 = costs[lane], costs[lane + LANES]
        even1, odd1 = costs[lane + 2 * LANES], costs[lane + 3 * LANES]
        path0, path1 = paths[lane], paths[lane + LANES]
        path2, path3 = paths[lane + 2 * LANES], paths[lane + 3 * LANES]
        # States 0 and 2 are reached from 0 and 1, states 1 and 3 from 2 and 3.
        to_0, other_0 = path0 + even0, path1 + odd0
        to_1, other_1 = path2 + even1, path3 + odd1
        to_2, other_2 = path0 + odd0, path1 + even0
        to_3, other_3 = path2 + odd1, path3 + even1
        decisions[lane] = (
            (np.int32(1) if other_0 < to_0 else np.int32(0))
            | (np.int32(2) if other_1 < to_1 else np.int32(0))
            | (np.int32(4) if other_2 < to_2 else np.int32(0))
            | (np.int32(8) if other_3 < to_3 else np.int32(0))
        )
        to_0 = other_0 if other_0 < to_0 else to_0
        to_1 = other_1 if other_1 < to_1 else to_1
        to_2 = other_2 if other_2 < to_2 else to_2
        to_3 = other_3 if other_3 < to_3 else to_3
        least0, least1 = (to_0 if to_0 < to_1 else to_1), (to_2 if to_2 < to_3 else to_3)
        least = least0 if least0 < least1 else least1
        paths[lane], paths[lane + LANES] = to_0 - least, to_1 - least
        paths[lane + 2 * LANES], paths[lane + 3 * LANES] = to_2 - least, to_3 - least


@jit
def _advance(costs, paths, decisions):
    for stripe in range(decisions.size // LANES):
        _stripe_advance(costs[stripe * 4 * LANES :][: 4 * LANES], paths, decisions[stripe * LANES :][:LANES])


@jit
def _best_states(paths, states):
    for lane in range(LANES):
        state = np.int32(2) if paths[lane + 2 * LANES] == ZERO else np.int32(3)
        state = np.int32(1) if paths[lane + LANES] == ZERO else state
        states[lane] = np.int32(0) if paths[lane] == ZERO else state


@inlined
def _stripe_walk_back(target, decisions, states, levels):
    """A stripe's levels, and in `states` int32 [LANES], the states after it, those before it."""
    for lane in range(states.size):
        state, value = states[lane], target[lane]
        size = abs(value)
        second = (decisions[lane] >> state) & np.int32(1)
        quantizer, is_odd = state & np.int32(1), second ^ (state >> np.int32(1))
        add = np.float32(np.int32(2) + quantizer - np.int32(2) * is_odd)  # the four lines of `_errors`
        level = np.int32(FOUR * np.floor(QUARTER * (size + add)) + (TWO - add))
        level = np.int32(0) if add == THREE and size < ONE + HALF else level
        levels[lane] = level if value >= ZERO else -level
        states[lane] = np.int32(2) * quantizer + second


@jit
def _walk_back(target, decisions, states, levels):
    for stripe in range(target.size // LANES - 1, -1, -1):
        begin = stripe * LANES
        _stripe_walk_back(target[begin:], decisions[begin:], states, levels[begin:])


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
def _class_rows(classes, change, last, length, rows):
    """Where the rates of each component's class begin."""
    for k in range(classes.size):
        rows[k] = min(max(classes[k] + change, np.int32(0)), last) * length


@jit
def quantize(y, predicted, steps, finer, prices, levels, is_raw):
    """Levels int32 [N, H] of what `predicted` leaves of components `y`, both float32 [N, H].

    `steps` float32 [N] are the tokens' steps, `finer` int32 [N] the quarter octaves by which they are finer. A token
    with a level out of range is marked in `is_raw`; raw tokens have levels 0.
    """
    num_tokens, width = y.shape
    num_stripes = (width + LANES - 1) // LANES
    last, largest = np.int32(prices.rates.shape[0] - 1), prices.rates.shape[2] - 1
    rates = prices.rates.reshape(-1)
    target, class_rows = np.zeros(num_stripes * LANES, np.float32), np.zeros(num_stripes * LANES, np.int32)
    decisions, row_levels = np.empty(num_stripes * LANES, np.int32), np.empty(num_stripes * LANES, np.int32)
    costs, entries = np.empty(num_stripes * 4 * LANES, np.float32), np.empty(num_stripes * 4 * LANES, np.int32)
    paths, states = np.empty(4 * LANES, np.float32), np.empty(LANES, np.int32)
    for t in range(num_tokens):
        if not _scale(y[t], predicted[t], ONE / (HALF * steps[t]), target[:width]):
            is_raw[t] = True
        if is_raw[t]:
            levels[t] = 0
            continue
        _class_rows(prices.classes, np.int32(2 * finer[t]), last, np.int32(2 * largest + 2), class_rows[:width])
        _errors(target, class_rows, np.int32(largest), costs, entries)
        _add_rates(costs, entries, rates)
        if width % LANES:  # what is missing in the last stripe costs nothing
            for row in range(4 * (num_stripes - 1), 4 * num_stripes):
                costs[row * LANES + width % LANES : (row + 1) * LANES] = 0
        paths[:LANES], paths[LANES:] = 0, UNREACHED
        _advance(costs, paths, decisions)
        _best_states(paths, states)
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
