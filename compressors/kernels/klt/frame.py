"""Frames: their blocks, and how those stand in the bytes."""

from __future__ import annotations

import numpy as np

from compressors.kernels.bits import jit
from compressors.kernels.klt.classes import room_for
from compressors.kernels.klt.decoder import decode_block
from compressors.kernels.klt.encoder import MAX_SIDE_OPS, encode_block
from compressors.kernels.klt.models import FIRST_STATE
from compressors.kernels.vectors import LANES

__all__ = ["BLOCK_VALUES", "VALUES_PER_STATE", "decode", "encode", "num_blocks", "num_states"]

BLOCK_VALUES = 1 << 16  # of a frame, for each of its blocks
VALUES_PER_STATE = 2560  # at least: a state costs about 24 bits
_DAMAGED = -1


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
    room, position = room_for(width), np.uint64(words.size)
    lengths, states = np.empty(blocks, np.int64), np.empty(num_coders, np.uint32)
    for block in range(blocks - 1, -1, -1):
        begin, end = block * num_tokens // blocks, (block + 1) * num_tokens // blocks
        states[:] = FIRST_STATE if num_coders > 1 else np.uint32(1)
        after = position
        position = encode_block(symbols, begin, end, models, room, raw_cost, states, words, position)
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
    used = decode_block(
        symbols, 0, symbols.levels.shape[0], models, room_for(width), states, words, np.uint64(0), num_words
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
    room, states = room_for(width), np.empty(num_coders, np.uint32)
    for block in range(blocks):
        first, last = block * num_tokens // blocks, (block + 1) * num_tokens // blocks
        length = _take_integer(data, 4 * block, 4) if blocks > 1 and data.size >= at else (data.size - at) // 2
        if length < 2 * num_coders or 2 * length > data.size - at:
            return _DAMAGED
        words = _words_of(data[at : at + 2 * length])
        states[:] = words[: 2 * num_coders].view(np.uint32)
        begin, end = np.uint64(2 * num_coders), np.uint64(length)
        used = decode_block(symbols, first, last, models, room, states, words, begin, end)
        if used > end or (blocks > 1 and used != end):
            return _DAMAGED
        at += 2 * np.int64(used)
    return at
