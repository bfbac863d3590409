"""A block of tokens to words: the symbols forwards, with the models that the levels before them give; then backwards
into the coder."""

from __future__ import annotations

import numpy as np

from compressors.kernels.bits import inlined, jit
from compressors.kernels.klt.classes import activity_of, begin_token, class_of, decayed, model_of, next_state, shift_of
from compressors.kernels.klt.models import (
    CODED_FREQUENCY,
    ESCAPE,
    ESCAPE_BITS,
    FIRST_CLASS,
    KIND_PRECISION,
    LARGEST_FINER,
    LARGEST_RMS,
    NUM_SYMBOLS,
    RAW_FREQUENCY,
)
from compressors.kernels.rans import PRECISION, encode_lanes, encode_span, encode_stripe
from compressors.kernels.vectors import LANES, bits_of, load, magnitude, select, splat, store, total

__all__ = ["MAX_SIDE_OPS", "encode_block"]

MAX_SIDE_OPS = 8  # of a token


@inlined
def _stripe_symbols(levels, statics, activity, trellis):
    """A stripe's symbols, as places in the models' tables; the integers that they stand for, the number of low bits
    that the models do not cover, and the next states."""
    index = class_of(statics, activity)
    shift = shift_of(index)
    value = (levels + select(levels > 0, trellis >> 1, 0)) >> 1
    high = (value + (splat(np.int32(1)) << shift >> 1)) >> shift
    symbol = min((high << 1) ^ (high >> 31), ESCAPE)
    return model_of(index, shift, trellis) * NUM_SYMBOLS + symbol, value, shift, next_state(trellis, value)


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
def _put_token(levels, finer, models, room, raw_cost, entries, num_more_of, more, num_more):
    """A token's symbols into `entries` uint16 [P], and what they leave to send behind the `num_more` of `more`.

    `num_more_of` [stripes] becomes its number by stripe. Returns the new `num_more`; -1 where all that costs more than
    `raw_cost`.
    """
    width, first = models.component_class.size, num_more
    expected, seen = begin_token(room, models.component_class, finer, models.magnitude), np.int64(0)
    room.levels[:width] = levels
    trellis = splat(np.int32(0))
    for stripe in range(expected.size):
        begin = stripe * LANES
        stripe_levels, activity = load(room.levels, begin), activity_of(seen, expected[stripe])
        symbols, values, shifts, trellis = _stripe_symbols(stripe_levels, load(room.statics, begin), activity, trellis)
        store(entries, begin, symbols)
        before = num_more
        if bits_of((shifts > 0) | (symbols & ESCAPE == ESCAPE)):
            store(room.found, 0, symbols)
            store(room.found, LANES, values)
            store(room.found, 2 * LANES, shifts)
            num_more = _put_more(room.found, min(LANES, width - begin), more, num_more)
        num_more_of[stripe] = num_more - before
        seen = decayed(seen) + (np.int64(total(magnitude(stripe_levels))) << 7)
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
            after = _put_token(
                symbols.levels[t], symbols.finer[t], models, room, raw_cost, row, row_more, more, num_more
            )
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
            if count == LANES and states.size == LANES:
                position = encode_lanes(row, first, models.spans, states, words, position)
            else:
                position = encode_stripe(
                    row[first:], count, last_state, models.spans, models.inverses, states, words, position
                )
    ops = np.empty(((end - begin) * MAX_SIDE_OPS, 3), np.int64)
    for i in range(_put_sides(symbols, begin, end, models, ops) - 1, -1, -1):
        position = encode_span(ops[i, 0], ops[i, 1], ops[i, 2], np.uint64(0), states, words, position)
    return position
