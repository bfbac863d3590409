"""Entropy coding of `compressors.klt.codec` by rANS.

Everything that the models depend on is an integer: levels, classes, frequencies. Two machines whose floats differ in
the last bit still agree on every symbol.

The coder is rANS (Duda 2013, "Asymmetric numeral systems", section 3) with a 64-bit state and 32-bit words. Symbols
are found in the order in which they are decoded, kept as (start, frequency, precision), and encoded backwards.

A level's index q in its quantiser (`kernels.trellis`) is coded with the model of its class and quantiser: |q| up to
31 as one of 63 symbols in the order 0, -1, 1, -2, 2, ..., anything larger as symbol 63 and an Exp-Golomb code. The
class is eight times the logarithm to base 2 of the value's expected size in steps. Of a class above the last model,
the low bits are sent as they are and the rest with the last model. Expected sizes follow the token: every fourth
component, the sum of the levels' sizes so far is compared with what the calibration expected, which scales the rest
(`_activity`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from compressors.kernels.bits import inlined, jit
from compressors.kernels.trellis import MAX_LEVEL, NEXT_STATE, index_of_level, level_of_index

__all__ = [
    "ENCODE_AGAIN",
    "FIRST_CLASS",
    "LAST_CLASS",
    "LAST_WIDE_CLASS",
    "NUM_CLASSES",
    "NUM_SYMBOLS",
    "OPS_FULL",
    "PRECISION",
    "Models",
    "Symbols",
    "classify",
    "count_symbols",
    "decode",
    "encode",
    "make_models",
    "static_classes",
]

PRECISION = 15  # bits of a model's frequencies
NUM_SYMBOLS = 64  # 0, -1, 1, ..., -31, 31, and one that announces a larger value
ESCAPE = NUM_SYMBOLS - 1
MAX_SMALL = 31
FIRST_CLASS, LAST_CLASS = -32, 20  # of the models: 2**-4 to 2**2.5 steps
LAST_WIDE_CLASS = LAST_CLASS + 8 * 19  # whose low bits are sent as they are
NUM_CLASSES = LAST_CLASS - FIRST_CLASS + 1  # models of the second quantiser stand behind those of the first
ACTIVITY_PRIOR = 6 << 8  # in the units of `magnitude`, steps / 256
ACTIVITY_EVERY = 4  # components
KIND_PRECISION = 8  # bits of what says whether a token is raw
RAW_FREQUENCY = 1
CODED_FREQUENCY = (1 << KIND_PRECISION) - RAW_FREQUENCY
LARGEST_RMS, LARGEST_FINER = 1024, 64  # magnitudes that a frame can have
ENCODE_AGAIN, OPS_FULL = -1, -2
_TOO_DEAR = -1
_DAMAGED = -1

LOWER_BOUND = np.uint64(1 << 31)  # of the coder's state
WORD = np.uint64(32)
LOW_WORD = np.uint64(0xFFFFFFFF)

# round(8 log2(1 + i / 64))
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
    starts: np.ndarray  # int32 [2 NUM_CLASSES, NUM_SYMBOLS + 1], cumulative frequencies
    guesses: np.ndarray  # uint8 [2 NUM_CLASSES, 256], see `_first_guesses`
    num_ids: int  # 0 where ids are not coded
    id_starts: np.ndarray  # int32 [1, B + 1], cumulative frequencies of the bit length of an id's rank + 1
    id_guesses: np.ndarray  # uint8 [1, 256]
    frequency_bits: np.ndarray  # int64, what a symbol of each frequency at PRECISION costs in 1/256 bits, rounded up


class Symbols(NamedTuple):
    """What is coded of a frame of N tokens; where a token is raw, nothing but that."""

    levels: np.ndarray  # int32 [N, H], half steps
    is_raw: np.ndarray  # bool [N]
    rms: np.ndarray  # int32 [N]
    finer: np.ndarray  # int32 [N], quarter octaves by which the step is finer
    id_ranks: np.ndarray  # int32 [N], of ids by frequency


def make_models(
    *,
    side_classes: np.ndarray,
    component_class: np.ndarray,
    magnitude: np.ndarray,
    starts: np.ndarray,
    num_ids: int,
    id_starts: np.ndarray,
) -> Models:
    """`Models` with their tables; `id_starts` int32 [B + 1], the rest as there."""
    frequencies = np.arange(1, (1 << PRECISION) + 1)
    bits = np.concatenate([[0], np.ceil(256 * (PRECISION - np.log2(frequencies)))])
    return Models(
        side_classes=side_classes,
        component_class=component_class,
        magnitude=magnitude,
        starts=starts,
        guesses=_first_guesses(starts),
        num_ids=num_ids,
        id_starts=id_starts[None],
        id_guesses=_first_guesses(id_starts[None]),
        frequency_bits=bits.astype(np.int64),
    )


def _first_guesses(starts: np.ndarray) -> np.ndarray:
    """For the decoder's search: uint8 [C, 256], the first symbol that a slot with these upper bits can be."""
    slots = np.arange(256) << (PRECISION - 8)
    return np.stack([np.searchsorted(row[1:], slots, side="right") for row in starts]).astype(np.uint8)


def static_classes(component_class: np.ndarray, finer: np.ndarray) -> np.ndarray:
    """Classes int32 [N, H] of tokens' components before anything is known of their levels."""
    return np.clip(component_class + 2 * finer[:, None], FIRST_CLASS, LAST_WIDE_CLASS)


@jit
def _log2_eighths(value):
    """About 8 log2(value) of a positive int64, rounded; integers only."""
    exponent = 0
    rest = value
    for shift in (32, 16, 8, 4, 2, 1):
        if rest >> shift:
            rest >>= shift
            exponent += shift
    return 8 * exponent + _LOG2_FRACTION[((value << 6) >> exponent) & 63]


@jit
def _activity(seen, expected):
    """How many classes this token's values lie above (or below) what was expected, from sums over it so far."""
    change = _log2_eighths(seen + ACTIVITY_PRIOR) - _log2_eighths(expected + ACTIVITY_PRIOR)
    return min(max(change, -48), 48)


@jit
def _clamp_class(index):
    return min(max(index, FIRST_CLASS), LAST_WIDE_CLASS)


@inlined
def _class_of(k, component_class, finer, seen, expected, activity):
    """(static class, class, activity) of component k, from sums over the token's components before it."""
    if k % ACTIVITY_EVERY == 0:
        activity = _activity(seen, expected)
    static = _clamp_class(component_class[k] + 2 * finer)
    return static, _clamp_class(static + activity), activity


@inlined
def _add_sizes(seen, expected, level, static, magnitude):
    """The sums that `_class_of` takes, with a component more."""
    return seen + (abs(level) << 7), expected + magnitude[static - FIRST_CLASS]


@jit
def classify(levels, component_class, finer, magnitude, classes):
    """Fill `classes` int16 [N, H] with those that `levels` int32 [N, H] are coded in; the rest as in `Models`."""
    for t in range(levels.shape[0]):
        seen = expected = activity = np.int64(0)
        for k in range(levels.shape[1]):
            static, index, activity = _class_of(k, component_class, finer[t], seen, expected, activity)
            classes[t, k] = index
            seen, expected = _add_sizes(seen, expected, np.int64(levels[t, k]), static, magnitude)


@jit
def count_symbols(levels, classes, counts):
    """Add to counts int64 [2 NUM_CLASSES, NUM_SYMBOLS] the symbols of `levels` in their classes and quantisers."""
    for t in range(levels.shape[0]):
        state = 0
        for k in range(levels.shape[1]):
            value = index_of_level(np.int64(levels[t, k]), state >> 1)
            model, shift = _model(classes[t, k], state >> 1)
            high = (value + ((1 << shift) >> 1)) >> shift
            counts[model, _symbol(high)] += 1
            state = NEXT_STATE[state, value & 1]


@inlined
def _model(index, quantizer):
    """(model, number of low bits that it does not cover) of a class."""
    shift = 0 if index <= LAST_CLASS else (index - LAST_CLASS + 7) >> 3
    return index - 8 * shift - FIRST_CLASS + quantizer * NUM_CLASSES, shift


@jit
def _symbol(value):
    """0, -1, 1, -2, 2, ... to 0, 1, 2, 3, 4, ...; ESCAPE for what is larger."""
    if value > MAX_SMALL or value < -MAX_SMALL:
        return ESCAPE
    return 2 * value if value >= 0 else -2 * value - 1


@jit
def _bit_length(value):
    length = 0
    while value:
        value >>= 1
        length += 1
    return length


@jit
def _put(ops, count, start, frequency, precision):
    """Append one symbol of the coder to `ops` uint16 [., 3]."""
    ops[count, 0] = start
    ops[count, 1] = frequency
    ops[count, 2] = precision
    return count + 1


@jit
def _put_bits(ops, count, value, nbits):
    """Append `nbits` <= 30 bits as they are."""
    if nbits > 15:
        count = _put(ops, count, value >> 15, 1, nbits - 15)
        value, nbits = value & 32767, 15
    if nbits > 0:
        count = _put(ops, count, value, 1, nbits)
    return count


@jit
def _put_value(ops, count, value, index, quantizer, starts):
    """Append the symbols of an integer of a class."""
    model, shift = _model(index, quantizer)
    half = (1 << shift) >> 1
    high = (value + half) >> shift
    row = starts[model]
    symbol = _symbol(high)
    count = _put(ops, count, row[symbol], row[symbol + 1] - row[symbol], PRECISION)
    if symbol == ESCAPE:
        excess = abs(high) - MAX_SMALL  # >= 1
        length = _bit_length(excess)
        count = _put(ops, count, length - 1, 1, 5)
        rest = excess - (1 << (length - 1))
        count = _put_bits(ops, count, rest >> 12, max(length - 13, 0))
        count = _put_bits(ops, count, rest & 4095, min(length - 1, 12))
        count = _put(ops, count, 1 if high < 0 else 0, 1, 1)
    if shift > 0:
        low = (value + half) - (high << shift)
        count = _put_bits(ops, count, low >> 10, max(shift - 10, 0))
        count = _put_bits(ops, count, low & 1023, min(shift, 10))
    return count


@jit
def _cost(ops, begin, end, frequency_bits):
    """Length of symbols in 1/256 bits, rounded up each; `frequency_bits` is that of a frequency at PRECISION."""
    total = np.int64(0)
    for i in range(begin, end):
        if ops[i, 2] == PRECISION:
            total += frequency_bits[ops[i, 1]]
        else:
            total += np.int64(ops[i, 2]) << 8
    return total


@jit
def _put_rank(ops, count, rank, id_starts):
    """Append an id's rank: the bit length of rank + 1, then its bits but the first."""
    length = _bit_length(rank + 1)
    start = id_starts[length - 1]
    count = _put(ops, count, start, id_starts[length] - start, PRECISION)
    return _put_bits(ops, count, rank + 1 - (1 << (length - 1)), length - 1)


@jit
def _put_token(ops, count, symbols, t, models, raw_cost):
    """Append a token; returns the end of its symbols, or _TOO_DEAR where its values cost more than `raw_cost`."""
    levels, starts, finer = symbols.levels[t], models.starts, symbols.finer[t]
    component_class, magnitude, frequency_bits = models.component_class, models.magnitude, models.frequency_bits
    count = _put(ops, count, 0, CODED_FREQUENCY, KIND_PRECISION)
    count = _put_value(ops, count, np.int64(symbols.rms[t]), models.side_classes[0], 0, starts)
    count = _put_value(ops, count, np.int64(finer), models.side_classes[1], 0, starts)
    if models.num_ids:
        count = _put_rank(ops, count, np.int64(symbols.id_ranks[t]), models.id_starts[0])
    seen = expected = activity = cost = np.int64(0)
    trellis = 0
    for k in range(levels.size):
        static, index, activity = _class_of(k, component_class, finer, seen, expected, activity)
        level, quantizer = np.int64(levels[k]), trellis >> 1
        value, before = index_of_level(level, quantizer), count
        count = _put_value(ops, count, value, index, quantizer, starts)
        cost += _cost(ops, before, count, frequency_bits)
        if cost > raw_cost:
            return _TOO_DEAR
        trellis = NEXT_STATE[trellis, value & 1]
        seen, expected = _add_sizes(seen, expected, level, static, magnitude)
    return count


@jit
def _to_words(ops, count, words):
    """The coder: the first `count` of `ops` to uint32 `words`, in the order in which they are read. Returns their
    number."""
    state, num_words = LOWER_BOUND, 0
    for i in range(count - 1, -1, -1):
        start, frequency = np.uint64(ops[i, 0]), np.uint64(ops[i, 1])
        precision = np.uint64(ops[i, 2])
        if state >= ((LOWER_BOUND >> precision) << WORD) * frequency:
            words[num_words] = np.uint32(state & LOW_WORD)
            num_words += 1
            state >>= WORD
        quotient = state // frequency
        state = (quotient << precision) + (state - quotient * frequency) + start
    words[num_words] = np.uint32(state & LOW_WORD)
    words[num_words + 1] = np.uint32(state >> WORD)
    num_words += 2
    for i in range(num_words // 2):
        other = num_words - 1 - i
        words[i], words[other] = words[other], words[i]
    return num_words


@jit
def encode(symbols, models, raw_cost, ops, words):
    """`Symbols` to uint32 `words`; returns their number, or why there are none yet.

    A token whose values cost more than `raw_cost` (1/256 bits) is marked in `is_raw`. What follows was predicted from
    it, so ENCODE_AGAIN says that the caller must quantise anew. OPS_FULL asks for more room in `ops` uint16 [., 3].
    """
    count, num_marked = 0, 0
    for t in range(symbols.levels.shape[0]):
        if count + 17 * symbols.levels.shape[1] + 64 > ops.shape[0]:
            return OPS_FULL
        if not symbols.is_raw[t]:
            end = _put_token(ops, count, symbols, t, models, raw_cost)
            if end == _TOO_DEAR:
                symbols.is_raw[t] = True
                num_marked += 1
            else:
                count = end
        if symbols.is_raw[t]:
            count = _put(ops, count, CODED_FREQUENCY, RAW_FREQUENCY, KIND_PRECISION)
    if num_marked:
        return ENCODE_AGAIN
    return _to_words(ops, count, words)


@inlined
def _advance(state, position, words, start, frequency, precision):
    """The state without its last symbol, and the position of the next word; words that are missing read as 0."""
    mask = (np.uint64(1) << np.uint64(precision)) - np.uint64(1)
    state = np.uint64(frequency) * (state >> np.uint64(precision)) + (state & mask) - np.uint64(start)
    if state < LOWER_BOUND:
        state <<= WORD
        if position < words.size:
            state |= np.uint64(words[position])
        position += 1
    return state, position


@jit
def _take_bits(state, position, words, nbits):
    value = np.int64(0)
    while nbits > 0:
        part = nbits - 15 if nbits > 15 else nbits
        slot = np.int64(state & ((np.uint64(1) << np.uint64(part)) - np.uint64(1)))
        state, position = _advance(state, position, words, slot, 1, part)
        value = (value << part) | slot
        nbits -= part
    return value, state, position


@inlined
def _take_symbol(state, position, words, starts, guesses, index):
    slot = np.int64(state & np.uint64((1 << PRECISION) - 1))
    symbol = np.int64(guesses[index, slot >> (PRECISION - 8)])
    while starts[index, symbol + 1] <= slot:
        symbol += 1
    start = starts[index, symbol]
    state, position = _advance(state, position, words, start, starts[index, symbol + 1] - start, PRECISION)
    return symbol, state, position


@jit
def _take_value(state, position, words, index, quantizer, starts, guesses):
    """Inverse of `_put_value`."""
    model, shift = _model(index, quantizer)
    symbol, state, position = _take_symbol(state, position, words, starts, guesses, model)
    if symbol == ESCAPE:
        length, state, position = _take_bits(state, position, words, 5)
        rest, state, position = _take_bits(state, position, words, max(length - 12, 0))
        low, state, position = _take_bits(state, position, words, min(length, 12))
        high = (np.int64(1) << length) + (rest << 12) + low + MAX_SMALL
        is_negative, state, position = _take_bits(state, position, words, 1)
        if is_negative:
            high = -high
    else:
        high = np.int64(symbol >> 1) if symbol % 2 == 0 else -np.int64((symbol + 1) >> 1)
    if shift:
        top, state, position = _take_bits(state, position, words, max(shift - 10, 0))
        low, state, position = _take_bits(state, position, words, min(shift, 10))
        high = (high << shift) + (top << 10) + low - ((1 << shift) >> 1)
    return high, state, position


@inlined
def _take_rank(state, position, words, models):
    """Inverse of `_put_rank`."""
    length, state, position = _take_symbol(state, position, words, models.id_starts, models.id_guesses, 0)
    rank, state, position = _take_bits(state, position, words, length)
    return rank + (np.int64(1) << length) - 1, state, position


@jit
def _take_token(state, position, words, symbols, t, models):
    """Inverse of `_put_token`, behind what says that the token is not raw; the position is _DAMAGED where no encoder
    can have written it."""
    levels, starts, guesses = symbols.levels[t], models.starts, models.guesses
    component_class, magnitude = models.component_class, models.magnitude
    rms, state, position = _take_value(state, position, words, models.side_classes[0], 0, starts, guesses)
    finer, state, position = _take_value(state, position, words, models.side_classes[1], 0, starts, guesses)
    if abs(rms) > LARGEST_RMS or abs(finer) > LARGEST_FINER or position > words.size:
        return state, _DAMAGED
    symbols.rms[t], symbols.finer[t] = rms, finer
    if models.num_ids:
        rank, state, position = _take_rank(state, position, words, models)
        if rank >= models.num_ids:
            return state, _DAMAGED
        symbols.id_ranks[t] = rank
    seen = expected = activity = np.int64(0)
    trellis = 0
    for k in range(levels.size):
        static, index, activity = _class_of(k, component_class, finer, seen, expected, activity)
        quantizer = trellis >> 1
        value, state, position = _take_value(state, position, words, index, quantizer, starts, guesses)
        level = level_of_index(value, quantizer)
        if abs(level) >= MAX_LEVEL:
            return state, _DAMAGED
        levels[k] = level
        trellis = NEXT_STATE[trellis, value & 1]
        seen, expected = _add_sizes(seen, expected, level, static, magnitude)
    return state, position


@jit
def decode(words, models, symbols):
    """Inverse of `encode`, into `symbols`; returns the number of words that were used, or -1 where they cannot be a
    frame's.

    Every value that is written is in the range that `encode` can have been given.
    """
    if words.size < 2:
        return _DAMAGED
    state, position = (np.uint64(words[0]) << WORD) | np.uint64(words[1]), np.int64(2)
    if state < LOWER_BOUND:
        return _DAMAGED
    for t in range(symbols.levels.shape[0]):
        symbols.is_raw[t] = np.int64(state & np.uint64((1 << KIND_PRECISION) - 1)) >= CODED_FREQUENCY
        if symbols.is_raw[t]:
            state, position = _advance(state, position, words, CODED_FREQUENCY, RAW_FREQUENCY, KIND_PRECISION)
            symbols.levels[t] = 0
            continue
        state, position = _advance(state, position, words, 0, CODED_FREQUENCY, KIND_PRECISION)
        state, position = _take_token(state, position, words, symbols, t, models)
        if position < 0:
            return _DAMAGED
    if state != LOWER_BOUND or position > words.size:
        return _DAMAGED
    return position
