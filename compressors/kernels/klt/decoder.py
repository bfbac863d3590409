"""Inverse of `kernels.klt.encoder`: words to a block of tokens."""

from __future__ import annotations

import numpy as np

from compressors.kernels.bits import inlined, jit
from compressors.kernels.klt.classes import activity_of, begin_token, class_of, decayed, model_of, next_state, shift_of
from compressors.kernels.klt.models import (
    CODED_FREQUENCY,
    ESCAPE,
    ESCAPE_BITS,
    FIRST_CLASS,
    FIRST_STATE,
    KIND_PRECISION,
    LARGEST_FINER,
    LARGEST_RMS,
    NUM_SYMBOLS,
)
from compressors.kernels.rans import PRECISION, take_bits, take_lanes, take_span, take_stripe
from compressors.kernels.trellis import MAX_LEVEL
from compressors.kernels.vectors import LANES, bits_of, load, magnitude, select, splat, store, total

__all__ = ["decode_block"]


@jit
def _take_side(model, models, states, words, position, end):
    """Inverse of `_put_side`: (value, the place of the next word)."""
    symbol, bases = np.empty(1, np.int32), np.full(1, model * NUM_SYMBOLS, np.uint32)
    position = take_stripe(bases, 1, np.uint64(0), models.spans, models.guesses, states, words, position, end, symbol)
    zigzag = np.int64(symbol[0])
    if zigzag == ESCAPE:
        high, position = take_bits(ESCAPE_BITS, 0, states, words, position, end)
        low, position = take_bits(ESCAPE_BITS, 0, states, words, position, end)
        zigzag += (high << ESCAPE_BITS) + low
    return (zigzag >> 1) ^ -(zigzag & 1), position


@jit
def _take_sides(symbols, first, last, models, states, words, position, end):
    """Inverse of `_put_sides`; returns the place of the next word, and whether all is in range."""
    for t in range(first, last):
        symbols.rms[t], symbols.finer[t], symbols.trust[t] = 0, 0, 0
        slot = np.int64(states[0]) & ((1 << KIND_PRECISION) - 1)
        symbols.is_raw[t] = slot >= CODED_FREQUENCY
        if symbols.is_raw[t]:
            _, position = take_bits(KIND_PRECISION, 0, states, words, position, end)
            continue
        position = take_span(0, CODED_FREQUENCY, KIND_PRECISION, states, words, position, end)
        slot = np.int64(states[0]) & ((1 << PRECISION) - 1)
        while models.trust_starts[symbols.trust[t] + 1] <= slot:
            symbols.trust[t] += 1
        start = models.trust_starts[symbols.trust[t]]
        frequency = models.trust_starts[symbols.trust[t] + 1] - start
        position = take_span(start, frequency, PRECISION, states, words, position, end)
        rms, position = _take_side(models.side_classes[0] - FIRST_CLASS, models, states, words, position, end)
        finer, position = _take_side(models.side_classes[1] - FIRST_CLASS, models, states, words, position, end)
        if abs(rms) > LARGEST_RMS or abs(finer) > LARGEST_FINER:
            return position, False
        symbols.rms[t], symbols.finer[t] = rms, finer
    return position, True


@inlined
def _levels(values, trellis):
    """What integers stand for in each state."""
    quantizer = trellis >> 1
    return values * 2 - select(values > 0, quantizer, 0) + select(values < 0, quantizer, 0)


@jit
def _take_more(found, count, last_state, states, words, position, end):
    """Inverse of `_put_more`, from and into `Token.found`: symbols, numbers of low bits, integers.

    Returns the place of the next word, and whether all is in range.
    """
    symbols, shifts, values = found[:LANES], found[LANES : 2 * LANES], found[2 * LANES :]
    values[count:] = 0
    high = np.zeros(LANES, np.int64)
    for lane in range(count):
        high[lane] = symbols[lane]
    for part in (1, 0):
        for lane in range(count):
            if symbols[lane] == ESCAPE:
                i = np.uint64(lane) & last_state
                bits, position = take_bits(ESCAPE_BITS, i, states, words, position, end)
                high[lane] += bits << (part * ESCAPE_BITS)
    fits = True
    for lane in range(count):
        value, shift = (high[lane] >> 1) ^ -(high[lane] & 1), np.int64(shifts[lane])
        if shift:
            low, position = take_bits(shift, np.uint64(lane) & last_state, states, words, position, end)
            value = (value << shift) + low - ((1 << shift) >> 1)
        fits = fits and 2 * abs(value) < MAX_LEVEL
        values[lane] = value if fits else 0
    return position, fits


@jit
def _take_token(symbols, t, models, room, last_state, states, words, position, end):
    """Inverse of `_put_token`; returns the place of the next word, and whether all is in range."""
    width = models.component_class.size
    expected, seen = begin_token(room, models.component_class, symbols.finer[t], models.magnitude), np.int64(0)
    trellis, found = splat(np.int32(0)), room.found
    for stripe in range(expected.size):
        begin = stripe * LANES
        count = min(LANES, width - begin)
        index = class_of(load(room.statics, begin), activity_of(seen, expected[stripe]))
        shifts = shift_of(index)
        bases = model_of(index, shifts, trellis) * NUM_SYMBOLS
        if count == LANES and states.size == LANES and position + np.uint64(LANES) <= end:
            codes, position = take_lanes(bases, models.spans, models.guesses, states, words, position)
        else:
            store(found, 0, splat(np.int32(0)))
            store(found, LANES, bases)
            position = take_stripe(
                found[LANES:], count, last_state, models.spans, models.guesses, states, words, position, end, found
            )
            codes = load(found, 0)
        values = (codes >> 1) ^ (0 - (codes & 1))
        if bits_of((shifts > 0) | (codes == ESCAPE)):
            store(found, 0, codes)
            store(found, LANES, shifts)
            position, fits = _take_more(found, count, last_state, states, words, position, end)
            if not fits:
                return position, False
            values = load(found, 2 * LANES)
        levels = _levels(values, trellis)
        store(room.levels, begin, levels)
        trellis = next_state(trellis, values)
        seen = decayed(seen) + (np.int64(total(magnitude(levels))) << 7)
    symbols.levels[t] = room.levels[:width]
    return position, True


@jit
def decode_block(symbols, first, last, models, room, states, words, position, end):
    """Inverse of `encode_block` from words [position, end); returns the place of the next word, or the end + 1."""
    start_state = FIRST_STATE if states.size > 1 else np.uint32(1)
    last_state = np.uint64(states.size - 1)
    position, fits = _take_sides(symbols, first, last, models, states, words, position, end)
    if not fits:
        return end + np.uint64(1)
    for t in range(first, last):
        if symbols.is_raw[t]:
            symbols.levels[t] = 0
            continue
        position, fits = _take_token(symbols, t, models, room, last_state, states, words, position, end)
        if not fits:
            return end + np.uint64(1)
    for i in range(states.size):
        if states[i] != start_state:
            return end + np.uint64(1)
    return position
