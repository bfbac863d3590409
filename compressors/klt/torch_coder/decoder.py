"""Symbols from frames: one step handles a symbol of every state of every block.

A level's escape and low bits cost three more steps. A decoder cannot know whether a stripe has any, and asking means
that the host waits for the device. So it decodes CHUNK stripes as if none had, asks once, and does it over where one
had.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from compressors.kernels.klt.models import (
    CODED_FREQUENCY,
    ESCAPE,
    ESCAPE_BITS,
    FIRST_STATE,
    KIND_PRECISION,
    LARGEST_FINER,
    LARGEST_RMS,
    NUM_SYMBOLS,
    PRECISION,
    RAW_FREQUENCY,
)
from compressors.kernels.trellis import LANES, MAX_LEVEL
from compressors.klt.torch_coder.models import (
    RAW_HEAD,
    TRUST_MODEL,
    WORD_BITS,
    Layout,
    Models,
    Symbols,
    classes_of,
    component_mask,
    decayed,
    lay_out,
    next_states,
    static_classes,
)

__all__ = ["decode"]

CHUNK = 8  # stripes
LOWER_BOUND = 1 << 16  # of a state; one that starts at 1 grows to it
ESCAPED = 1 << 30  # in the place of a value that is not known yet
DAMAGED = -1


class _Tape(NamedTuple):
    """Where a decoder stands in each block."""

    states: torch.Tensor  # [B, C]
    place: torch.Tensor  # [B, 1], of the word read last, from 1


class _Source(NamedTuple):
    """What a decoder reads."""

    words: torch.Tensor  # int64, of all blocks, behind one that is none; LANES more follow
    last: torch.Tensor  # [B, 1], the place of each block's last
    has_last: bool  # all are to be read; else they end where the symbols do
    head_nbytes: int  # before the words
    has_raw: bool | None  # None where the form of the frame does not tell


class _Stripe(NamedTuple):
    """What is known of a stripe of one token of each block before it is decoded."""

    statics: torch.Tensor  # [B, LANES], static classes
    expected: torch.Tensor  # [B, 1], logarithm of what is expected of the stripes before
    is_active: torch.Tensor | None  # bool [B, LANES]; None where all components are there and coded


class _Walk(NamedTuple):
    """Where a decoder stands in a token of each block."""

    tape: _Tape
    trellis: torch.Tensor  # [B, LANES], states
    seen: torch.Tensor  # [B, 1]


def decode(data: torch.Tensor, models: Models, num_tokens: int) -> tuple[Symbols, int]:
    """Inverse of `encode`, from uint8 `data` behind which anything may follow that `encode` lets follow.

    With the symbols comes the number of bytes that were used, -1 where no encoder can have written them. What is raw
    has symbols 0.
    """
    width, device = len(models.component_class), data.device
    nothing = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    symbols = Symbols(nothing[:, None].repeat(1, width), nothing.bool(), nothing, nothing, nothing)
    if num_tokens == 0:
        return symbols, 0
    layout = lay_out(num_tokens, width, device)
    opened = _open(data, layout)
    if opened is None:
        return symbols, DAMAGED
    tape, source = opened
    tape, is_raw, rms, finer, trust = _take_sides(tape, source, models, layout)
    if not ((rms.abs() <= LARGEST_RMS) & (finer.abs() <= LARGEST_FINER)).all():
        return symbols, DAMAGED
    if source.has_raw not in (None, bool(is_raw.any())):
        return symbols, DAMAGED
    tape, levels = _take_levels(tape, source, models, layout, is_raw, finer)
    last_state = int(FIRST_STATE) if layout.num_states > 1 else 1
    is_sound = (tape.states == last_state).all() & (levels.abs() < MAX_LEVEL).all()
    if source.has_last:
        is_sound &= (tape.place == source.last).all()
    if not is_sound:
        return symbols, DAMAGED
    num_bytes = source.head_nbytes + 2 * int(tape.place[-1])
    return Symbols(levels.int(), is_raw, rms.int(), finer.int(), trust.int()), num_bytes


def _open(data: torch.Tensor, layout: Layout) -> tuple[_Tape, _Source] | None:
    """The states and words of a frame; None where its bytes cannot be parted so."""
    num_blocks, num_states = layout.tokens.shape[1], layout.num_states
    if num_states == 1:
        return _open_small(data)
    head_nbytes = 4 * num_blocks if num_blocks > 1 else 0
    words = _join(data[head_nbytes:], 2)
    lengths = _join(data[:head_nbytes], 4) if num_blocks > 1 else words.new_tensor([len(words)])
    if len(lengths) < num_blocks or not ((lengths >= 2 * num_states).all() & (lengths.sum() <= len(words))):
        return None
    last = lengths.cumsum(0)[:, None]
    state_words = 1 + (last - lengths[:, None]) + torch.arange(2 * num_states, device=data.device)
    words = torch.nn.functional.pad(words, (1, LANES))
    low, high = words[state_words].unflatten(1, (num_states, 2)).unbind(2)
    source = _Source(words, last, has_last=num_blocks > 1, head_nbytes=head_nbytes, has_raw=None)
    return _Tape(low | high << WORD_BITS, state_words[:, -1:]), source


def _open_small(data: torch.Tensor) -> tuple[_Tape, _Source] | None:
    """Of a frame of one state."""
    start = bytes(data[: RAW_HEAD + 8].tolist())
    state_nbytes = 3 if len(data) % 2 else 4
    has_raw = state_nbytes == 3 and start[:RAW_HEAD] == bytes(RAW_HEAD)
    head_nbytes, end = (RAW_HEAD + 8, RAW_HEAD + 8) if has_raw else (state_nbytes, len(data))
    if has_raw:
        end += 2 * int.from_bytes(start[RAW_HEAD : RAW_HEAD + 4], "little")
    if not head_nbytes <= end <= len(data):
        return None
    state = int.from_bytes(start[RAW_HEAD + 4 :] if has_raw else start[:state_nbytes], "little")
    words = torch.nn.functional.pad(_join(data[head_nbytes:end], 2), (1, LANES))
    last = words.new_tensor([[(end - head_nbytes) // 2]])
    tape = _Tape(words.new_tensor([[state]]), torch.zeros_like(last))
    return tape, _Source(words, last, has_last=True, head_nbytes=head_nbytes, has_raw=has_raw)


def _join(data: torch.Tensor, num_bytes: int) -> torch.Tensor:
    """Inverse of `_split`; what is left over at the end is ignored."""
    data = data[: len(data) // num_bytes * num_bytes].view(-1, num_bytes).long()
    return (data << 8 * torch.arange(num_bytes, device=data.device)).sum(1)


def _take_symbols(
    source: _Source, models: Models, tape: _Tape, coder_models: torch.Tensor, is_active: torch.Tensor | None
) -> tuple[_Tape, torch.Tensor]:
    """The entries of a symbol of each state, of `coder_models` [B, C]. None of a state is active: all are."""
    slots = tape.states & ((1 << PRECISION) - 1)
    entries = models.slots[(coder_models << PRECISION) + slots]
    states = torch.addcmul(slots - models.starts[entries], models.frequencies[entries], tape.states >> PRECISION)
    if is_active is not None:
        states = torch.where(is_active, states, tape.states)
    return _refill(states, tape, source, is_active), entries


def _take_bits(source: _Source, tape: _Tape, num_bits: torch.Tensor) -> tuple[_Tape, torch.Tensor]:
    """Integers of `num_bits` [B, C]."""
    values = tape.states & ((1 << num_bits) - 1)
    return _refill(tape.states >> num_bits, tape, source, num_bits > 0), values


def _refill(states: torch.Tensor, tape: _Tape, source: _Source, is_active: torch.Tensor | None) -> _Tape:
    lacks = states < LOWER_BOUND
    if is_active is not None:
        lacks &= is_active
    places = tape.place + lacks.cumsum(1)
    lacks &= places <= source.last
    states = torch.where(lacks, states << WORD_BITS | source.words[places], states)
    return _Tape(states, torch.minimum(places[:, -1:], source.last))


def _take_sides(
    tape: _Tape, source: _Source, models: Models, layout: Layout
) -> tuple[_Tape, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Side information of all tokens: is_raw bool [N]; rms, finer and trust int64 [N]."""
    first = _Tape(tape.states[:, :1], tape.place)
    after, sides = _take_sides_in_order(first, source, models, layout, with_escapes=False)
    if (sides == ESCAPED).any():
        after, sides = _take_sides_in_order(first, source, models, layout, with_escapes=True)
    is_raw, trust, rms, finer = sides.movedim(1, 2)[:, layout.is_there.T]
    return _Tape(torch.cat([after.states, tape.states[:, 1:]], 1), after.place), is_raw.bool(), rms, finer, trust


def _take_sides_in_order(
    tape: _Tape, source: _Source, models: Models, layout: Layout, *, with_escapes: bool
) -> tuple[_Tape, torch.Tensor]:
    """int64 [4, M, B]: whether a token is raw, trust, rms, finer. Without escapes, what follows ESCAPED is wrong."""
    sides = []
    for is_there in layout.is_there[..., None]:
        slots = tape.states & ((1 << KIND_PRECISION) - 1)
        is_raw = slots >= CODED_FREQUENCY
        rest = tape.states >> KIND_PRECISION
        states = torch.where(is_raw, RAW_FREQUENCY * rest + slots - CODED_FREQUENCY, CODED_FREQUENCY * rest + slots)
        tape = _refill(torch.where(is_there, states, tape.states), tape, source, is_there)
        is_coded = is_there & ~is_raw
        tape, entries = _take_symbols(source, models, tape, slots.new_full(slots.shape, TRUST_MODEL), is_coded)
        row = [is_raw.long(), torch.where(is_coded, entries % NUM_SYMBOLS, 0)]
        for model in models.side_models:
            tape, entries = _take_symbols(source, models, tape, model, is_coded)
            codes = entries % NUM_SYMBOLS
            values = _unzigzag(codes)
            is_escape = is_coded & (codes == ESCAPE)
            if with_escapes:
                tape, escaped = _take_escapes(tape, source, is_escape)
                values = torch.where(is_escape, _unzigzag(ESCAPE + escaped), values)
            else:
                values = torch.where(is_escape, ESCAPED, values)
            row.append(torch.where(is_coded, values, 0))
        sides.append(torch.cat(row, 1))
    return tape, torch.stack(sides).movedim(2, 0)


def _take_escapes(tape: _Tape, source: _Source, is_escape: torch.Tensor) -> tuple[_Tape, torch.Tensor]:
    tape, upper = _take_bits(source, tape, ESCAPE_BITS * is_escape)
    tape, lower = _take_bits(source, tape, ESCAPE_BITS * is_escape)
    return tape, upper << ESCAPE_BITS | lower


def _take_levels(
    tape: _Tape, source: _Source, models: Models, layout: Layout, is_raw: torch.Tensor, finer: torch.Tensor
) -> tuple[_Tape, torch.Tensor]:
    """Levels int64 [N, H] of all tokens."""
    width = len(models.component_class)
    statics, expected = static_classes(models, finer)
    is_component = component_mask(width, is_raw.device)[-1]
    is_coded = layout.is_there & ~is_raw[layout.tokens]
    all_coded, some_coded = is_coded.all(1).tolist(), is_coded.any(1).tolist()
    levels = torch.zeros(*is_coded.shape, layout.num_stripes, LANES, dtype=torch.int64, device=is_raw.device)
    has_rare: set[int] = set()  # first stripes of chunks that had some in the row before
    for row in range(len(is_coded)):
        if not some_coded[row]:
            continue
        tokens = layout.tokens[row]
        row_statics, row_expected = statics[tokens], expected[tokens][..., None]
        is_active = None if all_coded[row] else is_coded[row][:, None].expand(-1, LANES)
        stripes = [_Stripe(row_statics[:, i], row_expected[:, i], is_active) for i in range(layout.num_stripes)]
        if width % LANES:
            stripes[-1] = stripes[-1]._replace(is_active=is_coded[row][:, None] & is_component)
        zeros = torch.zeros_like(row_statics[:, 0])
        walk = _Walk(tape, zeros, zeros[:, :1])
        for first in range(0, len(stripes), CHUNK):
            chunk = stripes[first : first + CHUNK]
            if first not in has_rare:
                after, found, is_rare = _take_stripes(walk, chunk, source, models, with_rare=False)
            if first in has_rare or is_rare.any():
                has_rare.add(first)
                after, found, _ = _take_stripes(walk, chunk, source, models, with_rare=True)
            walk = after
            levels[row, :, first : first + CHUNK] = found
        tape = walk.tape
    return tape, levels.transpose(0, 1)[layout.is_there.T].flatten(1)[:, :width]


def _take_stripes(
    walk: _Walk, stripes: list[_Stripe], source: _Source, models: Models, *, with_rare: bool
) -> tuple[_Walk, torch.Tensor, torch.Tensor]:
    """Levels [B, stripes, LANES], and whether any has an escape or low bits, without which they are wrong after it
    unless taken `with_rare`."""
    found, is_rare = [], []
    for stripe in stripes:
        walk, levels, rare = _take_stripe(walk, stripe, source, models, with_rare=with_rare)
        found.append(levels)
        is_rare.append(rare)
    return walk, torch.stack(found, 1), torch.stack(is_rare)


def _take_stripe(
    walk: _Walk, stripe: _Stripe, source: _Source, models: Models, *, with_rare: bool
) -> tuple[_Walk, torch.Tensor, torch.Tensor]:
    tape, trellis, seen = walk
    is_active = stripe.is_active
    classes = classes_of(stripe.statics, seen, stripe.expected, models)
    is_second, shifts = trellis >> 1, models.class_shifts[classes]
    coder_models = models.class_models[is_second, classes]
    tape, entries = _in_rounds(functools.partial(_take_symbols, source, models), tape, coder_models, is_active)
    codes = entries % NUM_SYMBOLS
    index = _unzigzag(codes)
    is_escape = codes == ESCAPE
    is_rare = is_escape | (shifts > 0)
    if is_active is not None:
        is_rare &= is_active
    if with_rare:
        take_bits = functools.partial(_take_bits, source)
        escape_bits, num_low = ESCAPE_BITS * (is_escape & is_rare), shifts * is_rare
        tape, upper = _in_rounds(take_bits, tape, escape_bits)
        tape, lower = _in_rounds(take_bits, tape, escape_bits)
        tape, low = _in_rounds(take_bits, tape, num_low)
        index = torch.where(is_escape, _unzigzag(ESCAPE + (upper << ESCAPE_BITS | lower)), index)
        index = (index << shifts) + low - ((1 << shifts) >> 1)
    levels = 2 * index - is_second * index.sign()
    if is_active is not None:
        levels = levels * is_active
    seen = decayed(seen) + (levels.abs().sum(1, keepdim=True) << 7)
    return _Walk(tape, next_states(trellis, index), seen), levels, is_rare


def _in_rounds(
    take: Callable[..., tuple[_Tape, torch.Tensor]], tape: _Tape, *values: torch.Tensor | None
) -> tuple[_Tape, torch.Tensor]:
    """`take` of values [B, LANES], as many lanes at once as there are states."""
    num_states, taken = tape.states.shape[1], []
    for first in range(0, LANES, num_states):
        parts = [None if value is None else value[:, first : first + num_states] for value in values]
        tape, part = take(tape, *parts)
        taken.append(part)
    return tape, taken[0] if len(taken) == 1 else torch.cat(taken, 1)


def _unzigzag(codes: torch.Tensor) -> torch.Tensor:
    return (codes >> 1) ^ -(codes & 1)
