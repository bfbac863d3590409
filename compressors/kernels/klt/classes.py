"""Classes of a token's components: by which model a level is coded, as the levels before it let expect.

Also the walk through the quantisers' trellis (`kernels.trellis`), which says from which of two sets of models it is.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from compressors.kernels.bits import inlined, jit
from compressors.kernels.klt.models import (
    ESCAPE,
    FIRST_CLASS,
    LARGEST_FINER,
    LAST_CLASS,
    LAST_WIDE_CLASS,
    NUM_CLASSES,
)
from compressors.kernels.vectors import LANES, leading_zeros

__all__ = [
    "Token",
    "activity_of",
    "begin_token",
    "class_of",
    "classify",
    "count_symbols",
    "decayed",
    "model_of",
    "next_state",
    "room_for",
    "shift_of",
]

ACTIVITY_PRIOR = 6 << 8  # in the units of `magnitude`, steps / 256
# Each stripe takes 2**-3 off the sums of those before it: 0.014 bits per value at 2 bits, 0.007 at 1, against no decay.
ACTIVITY_DECAY = 3
MAX_ACTIVITY = 48

# about 8 log2(1 + i / 64)
_LOG2_FRACTION = np.array(
    [0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 5]
    + [5, 5, 5, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 8, 8],
    dtype=np.int64,
)


class Token(NamedTuple):
    """Room for what is known of a token, of P = LANES * ceil(H / LANES) components."""

    statics: np.ndarray  # int32 [P], classes before anything is known of the levels
    levels: np.ndarray  # int32 [P]
    expected: np.ndarray  # int32 [2 LARGEST_FINER + 1, P / LANES], `_expect` for each finer that was met
    is_met: np.ndarray  # bool [2 LARGEST_FINER + 1]
    found: np.ndarray  # int32 [3 LANES], of a stripe


@jit
def _log2_eighths(value):
    """About 8 log2(value) of a positive int64, rounded; integers only."""
    exponent = 63 - leading_zeros(value)
    fraction = np.uint64(((value << 6) >> exponent) & 63)
    return np.int32(8 * exponent + _LOG2_FRACTION[fraction])


@jit
def decayed(total):
    return total - (total >> ACTIVITY_DECAY)


@jit
def activity_of(seen, expected):
    """How many classes a stripe's values lie above (or below) what was expected, from the sum `seen` over this token's
    stripes before it, and from `_expect`."""
    change = _log2_eighths(seen + ACTIVITY_PRIOR) - expected
    return np.int32(min(max(change, -MAX_ACTIVITY), MAX_ACTIVITY))


@jit
def _static_classes(component_class, finer, statics):
    for k in range(component_class.size):
        statics[k] = min(
            max(component_class[k] + np.int32(2) * finer, np.int32(FIRST_CLASS)), np.int32(LAST_WIDE_CLASS)
        )


@jit
def _expect(statics, width, magnitude, expected):
    """Fill `expected` int32 [stripes] with the logarithm of what is expected of the stripes before each."""
    total = np.int64(0)
    for stripe in range(expected.size):
        expected[stripe] = _log2_eighths(total + ACTIVITY_PRIOR)
        total = decayed(total)
        for k in range(stripe * LANES, min((stripe + 1) * LANES, width)):
            total += magnitude[statics[k] - FIRST_CLASS]


@jit
def room_for(width):
    """A `Token` before any token."""
    stripes = (width + LANES - 1) // LANES
    return Token(
        np.full(stripes * LANES, FIRST_CLASS, np.int32),
        np.zeros(stripes * LANES, np.int32),
        np.empty((2 * LARGEST_FINER + 1, stripes), np.int32),
        np.zeros(2 * LARGEST_FINER + 1, np.bool_),
        np.zeros(3 * LANES, np.int32),
    )


@jit
def begin_token(room, component_class, finer, magnitude):
    """Make `room` ready for a token; returns what is expected of its stripes."""
    _static_classes(component_class, np.int32(finer), room.statics)
    i = finer + LARGEST_FINER
    if not room.is_met[i]:
        _expect(room.statics, component_class.size, magnitude, room.expected[i])
        room.is_met[i] = True
    return room.expected[i]


# Of integers and of vectors of them:


@inlined
def class_of(static, activity):
    return min(max(static + activity, np.int32(FIRST_CLASS)), np.int32(LAST_WIDE_CLASS))


@inlined
def shift_of(index):
    """The number of low bits of a class's values that no model covers."""
    return max(index - np.int32(LAST_CLASS - 7), np.int32(0)) >> np.int32(3)


@inlined
def model_of(index, shift, state):
    """The model of a class, with its shift, in a state of the trellis."""
    return index - np.int32(FIRST_CLASS) - shift * np.int32(8) + (state >> np.int32(1)) * np.int32(NUM_CLASSES)


@inlined
def next_state(state, value):
    return (state >> np.int32(1)) + ((value ^ state) & np.int32(1)) * np.int32(2)


@jit
def classify(levels, component_class, finer, magnitude, classes):
    """Fill `classes` int16 [N, H] with those that `levels` int32 [N, H] are coded in; the rest as in `Models`."""
    width = levels.shape[1]
    room = room_for(width)
    for t in range(levels.shape[0]):
        expected, seen = begin_token(room, component_class, finer[t], magnitude), np.int64(0)
        for stripe in range(expected.size):
            activity = activity_of(seen, expected[stripe])
            seen = decayed(seen)
            for k in range(stripe * LANES, min((stripe + 1) * LANES, width)):
                classes[t, k] = class_of(room.statics[k], activity)
                seen += np.int64(abs(levels[t, k])) << 7


@jit
def count_symbols(levels, classes, counts):
    """Add to counts int64 [2 NUM_CLASSES, NUM_SYMBOLS] the symbols of `levels` in their classes and quantisers."""
    for t in range(levels.shape[0]):
        trellis = np.zeros(LANES, np.int32)
        for k in range(levels.shape[1]):
            state, level, index = trellis[k % LANES], levels[t, k], np.int32(classes[t, k])
            shift = shift_of(index)
            value = (level + (state >> np.int32(1) if level > 0 else np.int32(0))) >> np.int32(1)
            high = (value + ((np.int32(1) << shift) >> np.int32(1))) >> shift
            counts[model_of(index, shift, state), min((high << np.int32(1)) ^ (high >> np.int32(31)), ESCAPE)] += 1
            trellis[k % LANES] = next_state(state, value)
