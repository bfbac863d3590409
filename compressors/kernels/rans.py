"""The entropy coder of `kernels.klt`: rANS with interleaved states.

After Duda 2013, "Asymmetric numeral systems", section 3, and Giesen 2014, "Interleaved entropy coders". States have 32
bits, words 16. What one state encodes, another can encode at the same time: the states share one stream of words, from
which each takes the next when it runs low, in the order in which symbols are decoded. Encoding goes backwards, so a
block's words are written from its end.
"""

from __future__ import annotations

import numpy as np

from compressors.kernels.bits import inlined, jit
from compressors.kernels.vectors import (
    LANES,
    as_floats,
    as_integers,
    as_unsigned,
    bits_of,
    gather,
    load,
    number_of_bits,
    select,
    store,
)

__all__ = [
    "GUESS_BITS",
    "PRECISION",
    "encode_span",
    "encode_lanes",
    "encode_stripe",
    "reciprocals",
    "take_bits",
    "take_lanes",
    "take_span",
    "take_stripe",
]

PRECISION = 15  # bits of a model's frequencies
LOWER_BOUND = np.uint64(1 << 16)  # of a state; one that starts at 1 grows to it
WORD, LOW_WORD = np.uint64(16), np.uint64(0xFFFF)
STATE_BITS = np.uint64(32)
SLOT_BITS, SLOT_MASK = np.uint64(PRECISION), np.uint64((1 << PRECISION) - 1)
# floor(x / f) is (x * ceil(2**47 / f)) >> 47 for x < f * 2**17 and f < 2**15, the only x that are divided.
RECIPROCAL_BITS = np.uint64(47)
GUESS_BITS = 8  # of a slot, by which the decoder begins its search
ZERO, ONE = np.uint64(0), np.uint64(1)
# By a reciprocal a little too small in float32, a quotient below 2**17 comes out whole, or 1 too small.
NEARLY_ONE = np.float32(1 - 2**-21)
# Of each mask of lanes, how many of those before a lane it has; LANES a mask.
_NUM_BEFORE = np.array([[bin(m & ((1 << i) - 1)).count("1") for i in range(8)] for m in range(256)], np.uint8).ravel()


def reciprocals(frequencies: np.ndarray) -> np.ndarray:
    """uint64, with which `encode_stripe` divides by frequencies 1 to 2**15 - 1."""
    return (((1 << int(RECIPROCAL_BITS)) - 1) // frequencies.astype(np.int64) + 1).astype(np.uint64)


@inlined
def encode_stripe(entries, count, last_state, spans, inverses, states, words, position):
    """Encode the first `count` symbols of a stripe backwards; returns the new place of the first word.

    `entries` uint16 are the symbols' places in the tables `spans` uint32, start + 2**16 * frequency, and `inverses`
    uint64. The symbol in place i has state i & `last_state` of `states` uint32.
    """
    for lane in range(count - 1, -1, -1):
        i, entry = np.uint64(lane) & last_state, entries[lane]
        state, span, inverse = np.uint64(states[i]), np.uint64(spans[entry]), inverses[entry]
        frequency = span >> WORD
        is_full = state >= (frequency << (STATE_BITS - SLOT_BITS))
        words[position - ONE] = np.uint16(state & LOW_WORD)
        position -= ONE if is_full else ZERO
        state = state >> WORD if is_full else state
        quotient = (state * inverse) >> RECIPROCAL_BITS
        states[i] = np.uint32((quotient << SLOT_BITS) + (state - quotient * frequency) + (span & LOW_WORD))
    return position


@inlined
def encode_lanes(entries, begin, spans, states, words, position):
    """`encode_stripe` of LANES symbols from entries [begin], with as many states."""
    state, span = load(states, 0), gather(spans, load(entries, begin))
    frequency = span >> 16
    is_full = state >= frequency << (32 - PRECISION)
    full = np.uint64(bits_of(is_full))
    for lane in range(LANES - 1, -1, -1):
        words[position - ONE] = np.uint16(states[np.uint64(lane)] & np.uint32(0xFFFF))
        position -= (full >> np.uint64(lane)) & ONE
    state = select(is_full, state >> 16, state)
    quotient = as_unsigned(as_integers(as_floats(state) * (NEARLY_ONE / as_floats(frequency))))
    rest = state - quotient * frequency
    missing = select(rest >= frequency, (1 << PRECISION) - frequency, 0)
    store(states, 0, (quotient << PRECISION) + rest + (span & 0xFFFF) + missing)
    return position


@jit
def encode_span(start, frequency, precision, i, states, words, position):
    """Encode one symbol by its start and frequency of `precision` bits."""
    state, frequency, precision = np.uint64(states[i]), np.uint64(frequency), np.uint64(precision)
    if state >= frequency << (STATE_BITS - precision):
        position -= ONE
        words[position] = np.uint16(state & LOW_WORD)
        state >>= WORD
    quotient = state // frequency
    states[i] = np.uint32((quotient << precision) + (state - quotient * frequency) + np.uint64(start))
    return position


@inlined
def _refill(state, words, position, end):
    """The state with a word more where it is low and one is left, and the place of the next word."""
    is_low = state < LOWER_BOUND and position < end
    state = (state << WORD) | np.uint64(words[position]) if is_low else state
    return state, position + (ONE if is_low else ZERO)


@inlined
def take_stripe(bases, count, last_state, spans, guesses, states, words, position, end, symbols):
    """Decode the first `count` symbols of a stripe; returns the place of the next word.

    `bases` uint32 [count] are the places of the symbols' models in `spans`. `words` has one more than the `end` that
    count.
    """
    for lane in range(count):
        i, base = np.uint64(lane) & last_state, np.uint64(bases[lane])
        state = np.uint64(states[i])
        slot = state & SLOT_MASK
        cell = (base << np.uint64(GUESS_BITS - 6)) + (slot >> np.uint64(PRECISION - GUESS_BITS))
        symbol = np.uint64(guesses[cell])
        span = np.uint64(spans[base + symbol])
        while slot - (span & LOW_WORD) >= span >> WORD:
            symbol += ONE
            span = np.uint64(spans[base + symbol])
        state = (span >> WORD) * (state >> SLOT_BITS) + slot - (span & LOW_WORD)
        state, position = _refill(state, words, position, end)
        states[i] = np.uint32(state)
        symbols[lane] = np.int32(symbol)
    return position


@inlined
def take_lanes(bases, spans, guesses, states, words, position):
    """`take_stripe` of LANES symbols with as many states, where as many words are left: (symbols, place)."""
    state = load(states, 0)
    slot = as_integers(state & ((1 << PRECISION) - 1))
    symbols = gather(guesses, (bases << (GUESS_BITS - 6)) + (slot >> (PRECISION - GUESS_BITS)))
    span = as_integers(gather(spans, bases + symbols))
    rest = slot - (span & 0xFFFF)
    is_beyond = rest >= span >> 16
    while bits_of(is_beyond):
        symbols = symbols + as_integers(is_beyond)
        span = as_integers(gather(spans, bases + symbols))
        rest = slot - (span & 0xFFFF)
        is_beyond = rest >= span >> 16
    state = as_unsigned(span >> 16) * (state >> PRECISION) + as_unsigned(rest)
    is_low = state < (1 << 16)
    low = bits_of(is_low)
    word = gather(words, load(_NUM_BEFORE, low * LANES) + position)
    store(states, 0, select(is_low, (state << 16) | as_unsigned(word), state))
    return symbols, position + np.uint64(number_of_bits(low))


@jit
def take_span(start, frequency, precision, states, words, position, end):
    """Take from the first state a symbol that has been recognised; returns the place of the next word."""
    state, precision = np.uint64(states[0]), np.uint64(precision)
    slot = state & ((ONE << precision) - ONE)
    state = np.uint64(frequency) * (state >> precision) + slot - np.uint64(start)
    state, position = _refill(state, words, position, end)
    states[0] = np.uint32(state)
    return position


@jit
def take_bits(nbits, i, states, words, position, end):
    """Decode up to 15 bits that were sent as they are: (value, the place of the next word)."""
    state, nbits = np.uint64(states[i]), np.uint64(nbits)
    value = state & ((ONE << nbits) - ONE)
    state, position = _refill(state >> nbits, words, position, end)
    states[i] = np.uint32(state)
    return np.int64(value), position
