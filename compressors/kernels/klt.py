"""Entropy coding of `compressors.klt.codec`: what is sent of a frame, and with which model. docs/klt_format.md says it
byte for byte.

Everything that the models depend on is an integer: levels, classes, frequencies. Two machines whose floats differ in
the last bit still agree on every symbol. Tokens are coded independently of one another.

A level's index q in its quantiser (`kernels.trellis`) is coded with the model of its class and quantiser: as one of 63
symbols in the order 0, -1, 1, -2, 2, ..., anything larger as symbol 63 and 22 bits. The class is eight times the
logarithm to base 2 of the value's expected size in steps. Of a class above the last model, the low bits are sent as
they are and the rest with the last model. Expected sizes follow the token: with every stripe of LANES components, the
sum of its levels' sizes so far is compared with what the calibration expected, which scales the rest (`_activity`).
So all components of a stripe know their classes at once, and each is the next of its own trellis and its own state of
the coder (`kernels.rans`).

Large frames are cut into blocks of whole tokens that share nothing. Small ones have one block and one state, which
begins at 1 and so costs next to nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from compressors.kernels.bits import inlined, jit
from compressors.kernels.rans import (
    GUESS_BITS,
    PRECISION,
    encode_span,
    encode_stripe,
    reciprocals,
    take_bits,
    take_span,
    take_stripe,
)
from compressors.kernels.trellis import LANES, MAX_LEVEL

__all__ = [
    "FIRST_CLASS",
    "LAST_CLASS",
    "LAST_WIDE_CLASS",
    "NUM_CLASSES",
    "NUM_SYMBOLS",
    "PRECISION",
    "Models",
    "Symbols",
    "classify",
    "count_symbols",
    "decode",
    "encode",
    "make_models",
    "num_blocks",
    "num_states",
    "static_classes",
]

NUM_SYMBOLS = 64  # 0, -1, 1, ..., -31, 31, and one that announces a larger value
ESCAPE = NUM_SYMBOLS - 1
ESCAPE_BITS = 11  # twice
FIRST_CLASS, LAST_CLASS = -32, 20  # of the models: 2**-4 to 2**2.5 steps
MAX_SHIFT = 15
LAST_WIDE_CLASS = LAST_CLASS + 8 * MAX_SHIFT  # whose low bits are sent as they are
NUM_CLASSES = LAST_CLASS - FIRST_CLASS + 1  # models of the second quantiser stand behind those of the first
ACTIVITY_PRIOR = 6 << 8  # in the units of `magnitude`, steps / 256
# Each stripe takes 2**-3 off the sums of those before it: 0.014 bits per value at 2 bits, 0.007 at 1, against no decay.
ACTIVITY_DECAY = 3
MAX_ACTIVITY = 48
KIND_PRECISION = 8  # bits of what says whether a token is raw
RAW_FREQUENCY = 1
CODED_FREQUENCY = (1 << KIND_PRECISION) - RAW_FREQUENCY
LARGEST_RMS, LARGEST_FINER = 1024, 64  # magnitudes that a token can have
BLOCK_VALUES = 1 << 16  # of a frame, for each of its blocks
VALUES_PER_STATE = 2560  # at least: a state costs about 24 bits
FIRST_STATE = np.uint32(1 << 16)  # of the encoder, where there are several
MAX_SIDE_OPS = 8  # of a token
_DAMAGED = -1

# about 8 log2(1 + i / 64)
_LOG2_FRACTION = np.array(
    [0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 5]
    + [5, 5, 5, 5, 5, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 8, 8],
    dtype=np.int64,
)


class Models(NamedTuple):
    """What both ends of a link know before a frame comes, made by `make_models`."""

    side_classes: np.ndarray  # int32 [2], of a token's rms and of its finer
    component_class: np.ndarray  # int32 [H], at this step
    magnitude: np.ndarray  # int64, expected size of a level of each static class in steps / 256
    trust_starts: np.ndarray  # int32 [kernels.trust.NUM_TRUSTS + 1], cumulative frequencies
    starts: np.ndarray  # int32 [2 NUM_CLASSES, NUM_SYMBOLS + 1], cumulative frequencies
    # Of symbol s of model m in place m * NUM_SYMBOLS + s:
    spans: np.ndarray  # uint32, start + 2**16 * frequency
    inverses: np.ndarray  # uint64, `rans.reciprocals`
    costs: np.ndarray  # int32, 1/256 bits, rounded up
    guesses: np.ndarray  # uint8 [2 NUM_CLASSES * 2**GUESS_BITS], the first symbol that a slot's upper bits can be


class Symbols(NamedTuple):
    """What is coded of a frame of N tokens; where a token is raw, nothing but that."""

    levels: np.ndarray  # int32 [N, H], half steps
    is_raw: np.ndarray  # bool [N]
    rms: np.ndarray  # int32 [N]
    finer: np.ndarray  # int32 [N], quarter octaves by which the step is finer
    trust: np.ndarray  # int32 [N], `kernels.trust`


class _Token(NamedTuple):
    """Room for what is known of a token, of P = LANES * ceil(H / LANES) components."""

    statics: np.ndarray  # int32 [P], classes before anything is known of the levels
    levels: np.ndarray  # int32 [P]
    trellis: np.ndarray  # int32 [LANES], states
    expected: np.ndarray  # int32 [2 LARGEST_FINER + 1, P / LANES], `_expect` for each finer that was met
    is_met: np.ndarray  # bool [2 LARGEST_FINER + 1]


def make_models(
    *,
    side_classes: np.ndarray,
    component_class: np.ndarray,
    magnitude: np.ndarray,
    trust_starts: np.ndarray,
    starts: np.ndarray,
) -> Models:
    """`Models` with their tables; arguments as there. Raises ValueError for side classes that have no model."""
    if side_classes.min() < FIRST_CLASS or side_classes.max() > LAST_CLASS:
        raise ValueError(f"side classes go from {FIRST_CLASS} to {LAST_CLASS}, got {side_classes}")
    frequencies = np.diff(starts, axis=1).reshape(-1).astype(np.int64)
    slots = np.arange(1 << GUESS_BITS) << (PRECISION - GUESS_BITS)
    guesses = [np.searchsorted(row[1:], slots, side="right") for row in starts]
    return Models(
        side_classes=side_classes,
        component_class=component_class,
        magnitude=magnitude,
        trust_starts=trust_starts,
        starts=starts,
        spans=(starts[:, :-1].reshape(-1) + (frequencies << 16)).astype(np.uint32),
        inverses=reciprocals(frequencies),
        costs=np.ceil(256 * (PRECISION - np.log2(frequencies))).astype(np.int32),
        guesses=np.concatenate(guesses).astype(np.uint8),
    )


@jit
def num_blocks(num_tokens, width):
    """Into how many blocks a frame is cut. Block b has the tokens [b N // B, (b + 1) N // B)."""
    return max(min(num_tokens, num_tokens * width // BLOCK_VALUES), 1)


@jit
def num_states(num_tokens, width):
    """How many states the coder has in each block of a frame."""
    values, states = num_tokens // num_blocks(num_tokens, width) * width, 1
    while states < LANES and values >= 2 * states * VALUES_PER_STATE:
        states *= 2
    return states


def static_classes(component_class: np.ndarray, finer: np.ndarray) -> np.ndarray:
    """Classes int32 [N, H] of tokens' components before anything is known of their levels."""
    return np.clip(component_class + 2 * finer[:, None], FIRST_CLASS, LAST_WIDE_CLASS)


@jit
def _log2_eighths(value):
    """About 8 log2(value) of a positive int64, rounded; integers only."""
    exponent, rest = np.uint64(0), np.uint64(value) >> np.uint64(1)
    while rest:
        rest >>= np.uint64(1)
        exponent += np.uint64(1)
    fraction = ((np.uint64(value) << np.uint64(6)) >> exponent) & np.uint64(63)
    return np.int32(8 * np.int64(exponent) + _LOG2_FRACTION[fraction])


@jit
def _decayed(total):
    return total - (total >> ACTIVITY_DECAY)


@jit
def _activity(seen, expected):
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
        total = _decayed(total)
        for k in range(stripe * LANES, min((stripe + 1) * LANES, width)):
            total += magnitude[statics[k] - FIRST_CLASS]


@jit
def _room(width):
    """A `_Token` before any token."""
    stripes = (width + LANES - 1) // LANES
    return _Token(
        np.full(stripes * LANES, FIRST_CLASS, np.int32),
        np.zeros(stripes * LANES, np.int32),
        np.zeros(LANES, np.int32),
        np.empty((2 * LARGEST_FINER + 1, stripes), np.int32),
        np.zeros(2 * LARGEST_FINER + 1, np.bool_),
    )


@jit
def _begin(room, component_class, finer, magnitude):
    """Make `room` ready for a token; returns what is expected of its stripes."""
    _static_classes(component_class, np.int32(finer), room.statics)
    room.trellis[:] = 0
    i = finer + LARGEST_FINER
    if not room.is_met[i]:
        _expect(room.statics, component_class.size, magnitude, room.expected[i])
        room.is_met[i] = True
    return room.expected[i]


@inlined
def _class_of(static, activity):
    return min(max(static + activity, np.int32(FIRST_CLASS)), np.int32(LAST_WIDE_CLASS))


@inlined
def _shift_of(index):
    """The number of low bits of a class's values that no model covers."""
    return max(index - np.int32(LAST_CLASS - 7), np.int32(0)) >> np.int32(3)


@inlined
def _next_state(state, index):
    return (state >> np.int32(1)) + np.int32(2) * ((index ^ state) & np.int32(1))


@jit
def classify(levels, component_class, finer, magnitude, classes):
    """Fill `classes` int16 [N, H] with those that `levels` int32 [N, H] are coded in; the rest as in `Models`."""
    width = levels.shape[1]
    room = _room(width)
    for t in range(levels.shape[0]):
        expected, seen = _begin(room, component_class, finer[t], magnitude), np.int64(0)
        for stripe in range(expected.size):
            activity = _activity(seen, expected[stripe])
            seen = _decayed(seen)
            for k in range(stripe * LANES, min((stripe + 1) * LANES, width)):
                classes[t, k] = _class_of(room.statics[k], activity)
                seen += np.int64(abs(levels[t, k])) << 7


@jit
def count_symbols(levels, classes, counts):
    """Add to counts int64 [2 NUM_CLASSES, NUM_SYMBOLS] the symbols of `levels` in their classes and quantisers."""
    for t in range(levels.shape[0]):
        trellis = np.zeros(LANES, np.int32)
        for k in range(levels.shape[1]):
            state, level, index = trellis[k % LANES], levels[t, k], np.int32(classes[t, k])
            quantizer, shift = state >> np.int32(1), _shift_of(index)
            value = (level + (quantizer if level > 0 else np.int32(0))) >> np.int32(1)
            high = (value + ((np.int32(1) << shift) >> np.int32(1))) >> shift
            model = index - np.int32(8) * shift - FIRST_CLASS + quantizer * NUM_CLASSES
            counts[model, min((high << np.int32(1)) ^ (high >> np.int32(31)), ESCAPE)] += 1
            trellis[k % LANES] = _next_state(state, value)


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
        index, state, level = _class_of(statics[lane], activity), trellis[lane], levels[lane]
        shift, quantizer = _shift_of(index), state >> np.int32(1)
        value = (level + (quantizer if level > np.int32(0) else np.int32(0))) >> np.int32(1)
        high = (value + ((np.int32(1) << shift) >> np.int32(1))) >> shift
        symbol = min((high << np.int32(1)) ^ (high >> np.int32(31)), np.int32(ESCAPE))
        model = index - np.int32(8) * shift - np.int32(FIRST_CLASS) + quantizer * np.int32(NUM_CLASSES)
        found[lane] = model * np.int32(NUM_SYMBOLS) + symbol
        found[lane + LANES], found[lane + 2 * LANES] = value, shift
        more |= shift + ((symbol + np.int32(1)) >> np.int32(6))
        trellis[lane] = _next_state(state, value)
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
    expected, seen = _begin(room, models.component_class, symbols.finer[t], models.magnitude), np.int64(0)
    room.levels[:width] = symbols.levels[t]
    found = np.empty(3 * LANES, np.int32)
    for stripe in range(expected.size):
        begin = stripe * LANES
        activity = _activity(seen, expected[stripe])
        total, has_more = _stripe_symbols(room.levels[begin:], room.statics[begin:], activity, room.trellis, found)
        entries[begin : begin + LANES] = found[:LANES]
        before = num_more
        if has_more:
            num_more = _put_more(found, min(LANES, width - begin), more, num_more)
        num_more_of[stripe] = num_more - before
        seen = _decayed(seen) + (np.int64(total) << 7)
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
def _encode_block(symbols, begin, end, models, room, raw_cost, states, words, position):
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


@jit
def _put_integer(data, at, value, nbytes):
    for i in range(nbytes):
        data[at + i] = (np.uint64(value) >> np.uint64(8 * i)) & np.uint64(255)
    return at + nbytes


@jit
def _put_small(state, words, has_raw):
    """A frame of one block with one state."""
    state_nbytes = 3 if state < 1 << 24 and not has_raw else 4
    at = 7 if has_raw else 0
    data = np.zeros(at + state_nbytes + 2 * words.size, np.uint8)
    if has_raw:
        _put_integer(data, 3, words.size, 4)
    at = _put_integer(data, at, state, state_nbytes)
    data[at:] = words.view(np.uint8)
    return data


@jit
def encode(symbols, models, raw_cost):
    """`Symbols` to bytes, uint8; the raw tokens' values are the caller's to append, an even number of bytes.

    A token whose values cost more than `raw_cost` (1/256 bits), or whose rms or finer is out of range, is marked in
    `is_raw` and left out.
    """
    num_tokens, width = symbols.levels.shape
    blocks, num_coders = num_blocks(num_tokens, width), num_states(num_tokens, width)
    if num_tokens == 0:
        return np.empty(0, np.uint8)
    words = np.empty(num_tokens * (4 * width + MAX_SIDE_OPS) + blocks * 2 * num_coders + 1, np.uint16)
    room, position = _room(width), np.uint64(words.size)
    lengths, states = np.empty(blocks, np.int64), np.empty(num_coders, np.uint32)
    for block in range(blocks - 1, -1, -1):
        begin, end = block * num_tokens // blocks, (block + 1) * num_tokens // blocks
        states[:] = FIRST_STATE if num_coders > 1 else np.uint32(1)
        after = position
        position = _encode_block(symbols, begin, end, models, room, raw_cost, states, words, position)
        if num_coders == 1:
            return _put_small(states[0], words[position:], symbols.is_raw.any())
        position -= np.uint64(2 * num_coders)
        words[position : position + np.uint64(2 * num_coders)] = states.view(np.uint16)
        lengths[block] = after - position
    table_nbytes = 4 * blocks if blocks > 1 else 0
    rest = words[position:].view(np.uint8)
    data = np.empty(table_nbytes + rest.size, np.uint8)
    for block in range(table_nbytes // 4):
        _put_integer(data, 4 * block, lengths[block], 4)
    data[table_nbytes:] = rest
    return data


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
def _stripe_models(statics, activity, trellis, bases, shifts):
    """The models of a stripe's symbols, and whether any has more to send."""
    more = np.int32(0)
    for lane in range(trellis.size):
        index = _class_of(statics[lane], activity)
        shift = _shift_of(index)
        quantizer = trellis[lane] >> np.int32(1)
        model = index - np.int32(8) * shift - np.int32(FIRST_CLASS) + quantizer * np.int32(NUM_CLASSES)
        bases[lane], shifts[lane] = model * np.int32(NUM_SYMBOLS), shift
        more |= shift
    return more != 0


@inlined
def _integers(symbols, trellis, values):
    """Whether a stripe has an escape; `values` becomes what its symbols stand for."""
    largest = np.int32(0)
    for lane in range(trellis.size):
        symbol = symbols[lane]
        values[lane] = (symbol >> np.int32(1)) ^ -(symbol & np.int32(1))
        largest |= symbol + np.int32(1)
    return largest >= np.int32(NUM_SYMBOLS)


@inlined
def _stripe_levels(values, trellis, levels):
    """A stripe's levels from its integers; returns the sum of their sizes."""
    total = np.int32(0)
    for lane in range(trellis.size):
        value, state = values[lane], trellis[lane]
        quantizer = state >> np.int32(1)
        sign = (np.int32(1) if value > np.int32(0) else np.int32(0)) - (value >> np.int32(31) & np.int32(1))
        level = np.int32(2) * value - sign * quantizer
        levels[lane] = level
        trellis[lane] = _next_state(state, value)
        total += abs(level)
    return total


@jit
def _take_more(symbols, shifts, count, last_state, states, words, position, end, values):
    """Inverse of `_put_more`; returns the place of the next word, and whether all is in range."""
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
    expected, seen = _begin(room, models.component_class, symbols.finer[t], models.magnitude), np.int64(0)
    bases, shifts = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    found, values = np.zeros(LANES, np.int32), np.empty(LANES, np.int32)
    for stripe in range(expected.size):
        begin = stripe * LANES
        count = min(LANES, width - begin)
        activity = _activity(seen, expected[stripe])
        has_more = _stripe_models(room.statics[begin:], activity, room.trellis, bases, shifts)
        if count < LANES:
            found[count:] = 0
        position = take_stripe(
            bases, count, last_state, models.spans, models.guesses, states, words, position, end, found
        )
        if _integers(found, room.trellis, values) or has_more:
            position, fits = _take_more(found, shifts, count, last_state, states, words, position, end, values)
            if not fits:
                return position, False
        total = _stripe_levels(values, room.trellis, room.levels[begin:])
        seen = _decayed(seen) + (np.int64(total) << 7)
    symbols.levels[t] = room.levels[:width]
    return position, True


@jit
def _decode_block(symbols, first, last, models, room, states, words, position, end):
    """Inverse of `_encode_block` from words [position, end); returns the place of the next word, or the end + 1."""
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


@jit
def _words_of(data):
    """uint16 words of bytes, and one more that is not read for its value."""
    words = np.zeros(data.size // 2 + 1, np.uint16)
    words.view(np.uint8)[: data.size] = data
    return words


@jit
def _take_integer(data, at, nbytes):
    value = np.int64(0)
    for i in range(nbytes):
        value |= np.int64(data[at + i]) << (8 * i)
    return value


@jit
def _decode_small(data, models, symbols):
    """A frame of one block with one state."""
    at, state_nbytes, end = 0, 3 if data.size % 2 else 4, data.size
    if data.size >= 3 and state_nbytes == 3 and _take_integer(data, 0, 3) == 0:
        if data.size < 11:
            return _DAMAGED
        at, state_nbytes = 7, 4
        end = 11 + 2 * _take_integer(data, 3, 4)
    if data.size < at + state_nbytes or end > data.size:
        return _DAMAGED
    states = np.full(1, _take_integer(data, at, state_nbytes), np.uint32)
    words = _words_of(data[at + state_nbytes : end])
    num_words, width = np.uint64(words.size - 1), symbols.levels.shape[1]
    used = _decode_block(
        symbols, 0, symbols.levels.shape[0], models, _room(width), states, words, np.uint64(0), num_words
    )
    return end if used == num_words and symbols.is_raw.any() == (at == 7) else _DAMAGED


@jit
def decode(data, models, symbols):
    """Inverse of `encode`, into `symbols`, from uint8 `data`. The raw tokens' values may follow there.

    Returns the number of bytes that were used, or -1 where no encoder can have written them. Every value that is
    written is in the range that `encode` can have been given.
    """
    num_tokens, width = symbols.levels.shape
    blocks, num_coders = num_blocks(num_tokens, width), num_states(num_tokens, width)
    if num_tokens == 0:
        return 0
    if num_coders == 1:
        return _decode_small(data, models, symbols)
    at = 4 * blocks if blocks > 1 else 0
    room, states = _room(width), np.empty(num_coders, np.uint32)
    for block in range(blocks):
        first, last = block * num_tokens // blocks, (block + 1) * num_tokens // blocks
        length = _take_integer(data, 4 * block, 4) if blocks > 1 and data.size >= at else (data.size - at) // 2
        if length < 2 * num_coders or 2 * length > data.size - at:
            return _DAMAGED
        words = _words_of(data[at : at + 2 * length])
        states[:] = words[: 2 * num_coders].view(np.uint32)
        begin, end = np.uint64(2 * num_coders), np.uint64(length)
        used = _decode_block(symbols, first, last, models, room, states, words, begin, end)
        if used > end or (blocks > 1 and used != end):
            return _DAMAGED
        at += 2 * np.int64(used)
    return at
