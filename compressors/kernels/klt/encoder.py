"""A block of tokens to words: the symbols forwards, with the models that the levels before them give; then backwards
into the coder."""

from __future__ import annotations

import numpy as np

from compressors.kernels.bits import inlined, jit
from compressors.kernels.klt.classes import activity_of, begin_token, class_of, decayed, next_state, shift_of
from compressors.kernels.klt.models import (
    CODED_FREQUENCY,
    ESCAPE,
    ESCAPE_BITS,
    FIRST_CLASS,
    KIND_PRECISION,
    LARGEST_FINER,
    LARGEST_RMS,
    NUM_CLASSES,
    NUM_SYMBOLS,
    RAW_FREQUENCY,
)
from compressors.kernels.rans import PRECISION, encode_span, encode_stripe
from compressors.kernels.trellis import LANES

__all__ = ["MAX_SIDE_OPS", "encode_block"]

MAX_SIDE_OPS = 8  # of a token

# The loops below are over the size of `trellis`, which is LANES: the compiler would unroll a number that it knows, and
# not make vectors of the lanes.


@inlined
def _stripe_symbols(levels, statics, activity, trellis, found):
    """Fill `found` int32 [3 LANES] with a stripe's symbols, as places in the models' tables, then the integers, then
    the number of their low bits that the models do not cover.

    Returns (sum of the levels' sizes, whether there is more to send than symbols).
    """
    total, more = np.int32(0), np.int32(0)
    for lane in range(trellis.size):
        index, state, level = class_of(statics[lane], activity), trellis[lane], levels[lane]
        shift, quantizer = shift_of(index), state >> np.int32(1)
        value = (level + (quantizer if level > np.int32(0) else np.int32(0))) >> np.int32(1)
        high = (value + ((np.int32(1) << shift) >> np.int32(1))) >> shift
        symbol = min((high << np.int32(1)) ^ (high >> np.int32(31)), np.int32(ESCAPE))
        model = index - np.int32(8) * shift - np.int32(FIRST_CLASS) + quantizer * np.int32(NUM_CLASSES)
        found[lane] = model * np.int32(NUM_SYMBOLS) + symbol
        found[lane + LANES], found[lane + 2 * LANES] = value, shift
        more |= shift + ((symbol + np.int32(1)) >> np.int32(6))
        trellis[lane] = next_state(state, value)
        total += abs(level)
    return total, more != 0


@inlined
def _put(rows, count, first, second, third):
    """Append a row of three."""
    rows[count, 0], rows[count, 1], rows[count, 2] = first, second, third
    return count + 1


@jit
def _put_more(found, count, more, num_more):
    """Append to `more` int32 [., 3] (value, number of bits, lane) what a stripe's symbols leave to send."""
    entries, values, shifts = found[:LANES], found[LANES : 2 * LANES], found[2 * LANES :]
    for part in (1, 0):
        for lane in range(count):
            if entries[lane] & ESCAPE == ESCAPE:
                high = np.int64(values[lane] + ((1 << shifts[lane]) >> 1)) >> shifts[lane]
                excess = ((high << 1) ^ (high >> 63)) - ESCAPE
                bits = (excess >> (part * ESCAPE_BITS)) & ((1 << ESCAPE_BITS) - 1)
                num_more = _put(more, num_more, bits, ESCAPE_BITS, lane)
    for lane in range(count):
        if shifts[lane]:
            low = (values[lane] + ((1 << shifts[lane]) >> 1)) & ((1 << shifts[lane]) - 1)
            num_more = _put(more, num_more, low, shifts[lane], lane)
    return num_more


@jit
def _put_token(symbols, t, models, room, raw_cost, entries, num_more_of, more, num_more):
    """A token's symbols into `entries` uint16 [P], and what they leave to send behind the `num_more` of `more`.

    `num_more_of` [stripes] becomes its number by stripe. Returns the new `num_more`; -1 where all that costs more than
    `raw_cost`.
    """
    width, first = models.component_class.size, num_more
    expected, seen = begin_token(room, models.component_class, symbols.finer[t], models.magnitude), np.int64(0)
    room.levels[:width] = symbols.levels[t]
    found = np.empty(3 * LANES, np.int32)
    for stripe in range(expected.size):
        begin = stripe * LANES
        activity = activity_of(seen, expected[stripe])
        total, has_more = _stripe_symbols(room.levels[begin:], room.statics[begin:], activity, room.trellis, found)
        entries[begin : begin + LANES] = found[:LANES]
        before = num_more
        if has_more:
            num_more = _put_more(found, min(LANES, width - begin), more, num_more)
        num_more_of[stripe] = num_more - before
        seen = decayed(seen) + (np.int64(total) << 7)
    cost = np.int64(width) * (PRECISION << 8)  # a symbol takes no more
    for i in range(first, num_more):
        cost += more[i, 1] << 8
    if cost > raw_cost:
        cost = np.int64(0)
        for i in range(first, num_more):
            cost += more[i, 1] << 8
        for k in range(width):
            cost += models.costs[entries[k]]
        if cost > raw_cost:
            return -1
    return num_more


@jit
def _put_side(value, model, starts, ops, count):
    """Append the symbols of an integer of side information to `ops` int64 [., 3]: start, frequency, precision."""
    zigzag = (value << 1) ^ (value >> 63)
    symbol = min(zigzag, ESCAPE)
    start = starts[model, symbol]
    count = _put(ops, count, start, starts[model, symbol + 1] - start, PRECISION)
    if symbol == ESCAPE:
        count = _put(ops, count, (zigzag - ESCAPE) >> ESCAPE_BITS, 1, ESCAPE_BITS)
        count = _put(ops, count, (zigzag - ESCAPE) & ((1 << ESCAPE_BITS) - 1), 1, ESCAPE_BITS)
    return count


@jit
def _put_sides(symbols, begin, end, models, ops):
    """The side information of tokens [begin, end), as in `_put_side`; returns the number of `ops`."""
    count = 0
    for t in range(begin, end):
        if symbols.is_raw[t]:
            count = _put(ops, count, CODED_FREQUENCY, RAW_FREQUENCY, KIND_PRECISION)
            continue
        count = _put(ops, count, 0, CODED_FREQUENCY, KIND_PRECISION)
        start = models.trust_starts[symbols.trust[t]]
        count = _put(ops, count, start, models.trust_starts[symbols.trust[t] + 1] - start, PRECISION)
        rms_model, finer_model = models.side_classes[0] - FIRST_CLASS, models.side_classes[1] - FIRST_CLASS
        count = _put_side(np.int64(symbols.rms[t]), rms_model, models.starts, ops, count)
        count = _put_side(np.int64(symbols.finer[t]), finer_model, models.starts, ops, count)
    return count


@jit
def encode_block(symbols, begin, end, models, room, raw_cost, states, words, position):
    """Encode tokens [begin, end) into `words` before `position`; returns the place of the first word.

    `states` uint32 become those with which the decoder begins.
    """
    width, stripes = models.component_class.size, room.expected.shape[1]
    last_state = np.uint64(states.size - 1)
    entries = np.empty((end - begin, stripes * LANES), np.uint16)
    num_more_of = np.empty((end - begin, stripes), np.uint8)
    more = np.empty((3 * (end - begin) * width, 3), np.int32)  # mostly untouched
    num_more = 0
    for t in range(begin, end):
        if abs(symbols.rms[t]) > LARGEST_RMS or abs(symbols.finer[t]) > LARGEST_FINER:
            symbols.is_raw[t] = True
        if not symbols.is_raw[t]:
            row, row_more = entries[t - begin], num_more_of[t - begin]
            after = _put_token(symbols, t, models, room, raw_cost, row, row_more, more, num_more)
            if after < 0:
                symbols.is_raw[t] = True
            else:
                num_more = after
    for t in range(end - 1, begin - 1, -1):
        if symbols.is_raw[t]:
            continue
        row, row_more = entries[t - begin], num_more_of[t - begin]
        for stripe in range(stripes - 1, -1, -1):
            for _ in range(row_more[stripe]):
                num_more -= 1
                value, nbits, lane = more[num_more, 0], more[num_more, 1], more[num_more, 2]
                i = np.uint64(lane) & last_state
                position = encode_span(value, 1, nbits, i, states, words, position)
            first = stripe * LANES
            count = min(LANES, width - first)
            position = encode_stripe(
                row[first:], count, last_state, models.spans, models.inverses, states, words, position
            )
    ops = np.empty(((end - begin) * MAX_SIDE_OPS, 3), np.int64)
    for i in range(_put_sides(symbols, begin, end, models, ops) - 1, -1, -1):
        position = encode_span(ops[i, 0], ops[i, 1], ops[i, 2], np.uint64(0), states, words, position)
    return position
