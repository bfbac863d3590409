"""klt's quantiser and entropy coder in PyTorch: the bytes and levels of `kernels.klt` and `kernels.trellis`, anywhere.

Tensors live on one device, and nothing loops over values: what is serial in a frame are the rows of its blocks' tokens
and the stripes of a token, and one step handles all states of all blocks at once. docs/klt_format.md specifies the
bytes. Numbers are int64, as PyTorch's unsigned integers lack arithmetic.

A level's escape and low bits cost three more steps. A decoder cannot know whether a stripe has any, and asking means
that the host waits for the device. So it decodes CHUNK stripes as if none had, asks once, and does it over where one
had.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from compressors.kernels.klt import (
    ACTIVITY_DECAY,
    ACTIVITY_PRIOR,
    BLOCK_VALUES,
    CODED_FREQUENCY,
    ESCAPE,
    ESCAPE_BITS,
    FIRST_CLASS,
    FIRST_STATE,
    KIND_PRECISION,
    LARGEST_FINER,
    LARGEST_RMS,
    LAST_CLASS,
    LAST_WIDE_CLASS,
    MAX_ACTIVITY,
    NUM_CLASSES,
    NUM_SYMBOLS,
    PRECISION,
    RAW_FREQUENCY,
    VALUES_PER_STATE,
)
from compressors.kernels.trellis import LANES, LARGEST_COMPONENT, MAX_LEVEL, UNREACHED

__all__ = ["Models", "Symbols", "decode", "encode", "make_models", "quantize", "reconstruct"]

CHUNK = 8  # stripes
TRUST_MODEL = 2 * NUM_CLASSES  # stands behind those of levels
LOG2_STEPS = (3, 9, 16, 23, 31, 40, 51, 61)  # 64ths above 1 at which about 8 log2 becomes 1, 2, ..., 8
STATE_BITS, WORD_BITS = 32, 16
LOWER_BOUND = 1 << 16  # of a state; one that starts at 1 grows to it
WORD_MASK = (1 << WORD_BITS) - 1
RAW_HEAD = 3  # bytes 0 of a frame of one state that has raw tokens
ESCAPED = 1 << 30  # in the place of a value that is not known yet
DAMAGED = -1


class Models(NamedTuple):
    """What both ends of a link know before a frame comes, int64, made by `make_models`."""

    side_models: torch.Tensor  # [2], of a token's rms and of its finer
    component_class: torch.Tensor  # [H], at this step
    magnitude: torch.Tensor  # expected size of a level of each static class in steps / 256
    class_shifts: torch.Tensor  # of each class: how many low bits are sent as they are,
    class_models: torch.Tensor  # [2, classes] and the model of the rest in each quantiser
    # Of symbol s of model m in place m * NUM_SYMBOLS + s, an *entry*:
    starts: torch.Tensor
    frequencies: torch.Tensor
    costs: torch.Tensor  # 1/256 bits, rounded up
    slots: torch.Tensor  # int32, the entry of each slot of model m in place m * 2**PRECISION + slot
    log_steps: torch.Tensor  # the least values at which `_log2_eighths` is 1, 2, ...


class Symbols(NamedTuple):
    """What is coded of a frame of N tokens; where a token is raw, nothing but that."""

    levels: torch.Tensor  # int32 [N, H], half steps
    is_raw: torch.Tensor  # bool [N]
    rms: torch.Tensor  # int32 [N]
    finer: torch.Tensor  # int32 [N], quarter octaves by which the step is finer
    trust: torch.Tensor  # int32 [N], `kernels.trust`


class _Layout(NamedTuple):
    """How a frame's tokens lie in B blocks, M at most in each, with C states for LANES lanes in R rounds."""

    num_states: int
    num_rounds: int
    num_stripes: int
    tokens: torch.Tensor  # int64 [M, B], which token is the m-th of block b
    is_there: torch.Tensor  # bool [M, B], false where block b has fewer


class _Operations(NamedTuple):
    """[..., B, C]: a symbol for each state. Where `precisions` is 0 that is none."""

    starts: torch.Tensor
    frequencies: torch.Tensor
    precisions: torch.Tensor


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


def make_models(
    *,
    side_classes: torch.Tensor,
    component_class: torch.Tensor,
    magnitude: torch.Tensor,
    trust_starts: torch.Tensor,
    starts: torch.Tensor,
) -> Models:
    """`Models` with their tables, from integers on any one device: [2], [H], [classes], [NUM_TRUSTS + 1],
    [models, NUM_SYMBOLS + 1].

    Raises ValueError for side classes that have no model.
    """
    if not FIRST_CLASS <= int(side_classes.min()) <= int(side_classes.max()) <= LAST_CLASS:
        raise ValueError(f"side classes go from {FIRST_CLASS} to {LAST_CLASS}, got {side_classes.tolist()}")
    device = starts.device
    of_trust = torch.nn.functional.pad(trust_starts, (0, starts.shape[1] - len(trust_starts)), value=1 << PRECISION)
    starts = torch.cat([starts, of_trust[None]])
    frequencies = starts.long().diff(dim=1).flatten()
    classes = torch.arange(FIRST_CLASS, LAST_WIDE_CLASS + 1, device=device)
    shifts = (classes - (LAST_CLASS - 7)).clamp_min(0) >> 3
    return Models(
        side_models=side_classes.long() - FIRST_CLASS,
        component_class=component_class.long(),
        magnitude=magnitude.long(),
        class_shifts=shifts,
        class_models=torch.stack([classes - 8 * shifts - FIRST_CLASS + second * NUM_CLASSES for second in (0, 1)]),
        starts=starts[:, :-1].long().flatten(),
        frequencies=frequencies,
        costs=(256 * (PRECISION - frequencies.cpu().clamp_min(1).double().log2())).ceil().long().to(device),
        slots=torch.arange(len(frequencies), dtype=torch.int32, device=device).repeat_interleave(frequencies),
        log_steps=torch.tensor(_log_steps(), device=device),
    )


def _log_steps() -> list[int]:
    """The least v at which `_log2_eighths` is 1, 2, ..., up to 2**56."""
    return [-(-((64 + step) << exponent) // 64) for exponent in range(56) for step in LOG2_STEPS]


def _log2_eighths(values: torch.Tensor, models: Models) -> torch.Tensor:
    """About 8 log2(v)."""
    return torch.bucketize(values, models.log_steps, right=True)


def _num_blocks(num_tokens: int, width: int) -> int:
    return max(1, min(num_tokens, num_tokens * width // BLOCK_VALUES))


def _num_states(num_tokens: int, width: int) -> int:
    num_values, num_states = num_tokens // _num_blocks(num_tokens, width) * width, 1
    while num_states < LANES and num_values >= 2 * num_states * VALUES_PER_STATE:
        num_states *= 2
    return num_states


def _lay_out(num_tokens: int, width: int, device: torch.device) -> _Layout:
    num_blocks, num_states = _num_blocks(num_tokens, width), _num_states(num_tokens, width)
    bounds = torch.arange(num_blocks + 1, device=device) * num_tokens // num_blocks
    tokens = bounds[:-1] + torch.arange(-(-num_tokens // num_blocks), device=device)[:, None]
    is_there = tokens < bounds[1:]
    return _Layout(num_states, LANES // num_states, -(-width // LANES), tokens.clamp_max(num_tokens - 1), is_there)


def _in_lanes(values: torch.Tensor) -> torch.Tensor:
    """[N, H] to [N, S, LANES], with 0 where components are missing."""
    return torch.nn.functional.pad(values, (0, -values.shape[1] % LANES)).view(len(values), -1, LANES)


def _is_component(width: int, device: torch.device) -> torch.Tensor:
    """bool [S, LANES]"""
    return _in_lanes(torch.ones(1, width, dtype=torch.bool, device=device))[0]


def _sums_before(sums: torch.Tensor) -> torch.Tensor:
    """Of [N, S]: of the stripes before each, those longer ago counting less."""
    total, before = torch.zeros_like(sums[:, 0]), []
    for stripe_sums in sums.unbind(1):
        before.append(total)
        total = _decayed(total) + stripe_sums
    return torch.stack(before, 1)


def _decayed(total: torch.Tensor) -> torch.Tensor:
    return total - (total >> ACTIVITY_DECAY)


def _static_classes(models: Models, finer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens' static classes [N, S, LANES], and logarithms [N, S] of what they let expect of the stripes before."""
    statics = (models.component_class + 2 * finer.long()[:, None]).clamp(FIRST_CLASS, LAST_WIDE_CLASS)
    expected = _sums_before(_in_lanes(models.magnitude[statics - FIRST_CLASS]).sum(2))
    return _in_lanes(statics), _log2_eighths(expected + ACTIVITY_PRIOR, models)


def _classes(statics: torch.Tensor, seen: torch.Tensor, expected: torch.Tensor, models: Models) -> torch.Tensor:
    """Classes, counted from 0, of components [..., LANES] from what was seen and expected before [..., 1]."""
    activity = (_log2_eighths(seen + ACTIVITY_PRIOR, models) - expected).clamp(-MAX_ACTIVITY, MAX_ACTIVITY)
    return (statics + activity).clamp(FIRST_CLASS, LAST_WIDE_CLASS) - FIRST_CLASS


def _next_states(trellis: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return (trellis >> 1) + 2 * ((index + trellis) & 1)


def _zigzag(values: torch.Tensor) -> torch.Tensor:
    return 2 * values.abs() - (values < 0).long()


def _unzigzag(codes: torch.Tensor) -> torch.Tensor:
    return (codes >> 1) ^ -(codes & 1)


def encode(symbols: Symbols, models: Models, raw_cost: int) -> torch.Tensor:
    """`Symbols` to bytes, uint8; the raw tokens' values are the caller's to append, an even number of bytes.

    A token whose values cost more than `raw_cost` (1/256 bits), or whose rms or finer is out of range, is marked in
    `is_raw` and left out.
    """
    num_tokens, width = symbols.levels.shape
    device = symbols.levels.device
    if num_tokens == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    layout = _lay_out(num_tokens, width, device)
    operations, costs = _level_operations(symbols, models)
    is_out_of_range = (symbols.rms.abs() > LARGEST_RMS) | (symbols.finer.abs() > LARGEST_FINER)
    symbols.is_raw.logical_or_((costs > raw_cost) | is_out_of_range)
    is_coded = layout.is_there & ~symbols.is_raw[layout.tokens]
    first_state = int(FIRST_STATE) if layout.num_states > 1 else 1
    states = torch.full((layout.tokens.shape[1], layout.num_states), first_state, device=device)
    pushed = []
    for row in reversed(range(len(layout.tokens))):
        states, before = _push(states, _row_of_levels(operations, layout, row, is_coded[row]))
        pushed.append(before)
    states, before = _push(states, _side_operations(symbols, models, layout))
    before = torch.cat([before, *reversed(pushed)]).movedim(0, 1).flatten(1)  # [B, steps * C]
    return _frame(states, before, bool(symbols.is_raw.any()))


def _level_operations(symbols: Symbols, models: Models) -> tuple[_Operations, torch.Tensor]:
    """All tokens' levels as operations, and what tokens cost in 1/256 bits [N].

    The operations are [N, S, 4, LANES]: symbols, an escape's upper and lower bits, low bits.
    """
    levels = _in_lanes(symbols.levels.long())
    statics, expected = _static_classes(models, symbols.finer.clamp(-LARGEST_FINER, LARGEST_FINER))
    seen = _sums_before(levels.abs().sum(2) << 7)
    classes = _classes(statics, seen[..., None], expected[..., None], models)
    is_second, indices = _walk(levels)
    shifts = models.class_shifts[classes]
    rounded = indices + ((1 << shifts) >> 1)
    entries, escaped = _entries(models.class_models[is_second, classes], rounded >> shifts)
    is_component = _is_component(symbols.levels.shape[1], levels.device)
    bits = torch.stack([*_escape_bits(escaped), rounded & ((1 << shifts) - 1)], 2)
    precisions = torch.stack([*2 * [ESCAPE_BITS * (escaped >= 0)], shifts], 2)
    operations = _Operations(
        torch.cat([models.starts[entries][:, :, None], bits], 2),
        torch.cat([models.frequencies[entries][:, :, None], torch.ones_like(bits)], 2),
        torch.cat([torch.full_like(entries, PRECISION)[:, :, None], precisions], 2) * is_component[:, None],
    )
    costs = models.costs[entries] + 256 * precisions.sum(2)
    return operations, (costs * is_component).sum((1, 2))


def _walk(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each of levels [N, S, LANES] is of the second quantiser (0 or 1), and its index there."""
    trellis, seconds, indices = torch.zeros_like(levels[:, 0]), [], []
    for stripe in levels.unbind(1):
        seconds.append(trellis >> 1)
        indices.append((stripe + seconds[-1] * (stripe > 0)) >> 1)
        trellis = _next_states(trellis, indices[-1])
    return torch.stack(seconds, 1), torch.stack(indices, 1)


def _entries(coder_models: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries of integers, and what an escape leaves to send; below 0 where there is none."""
    escaped = _zigzag(values) - ESCAPE
    return coder_models * NUM_SYMBOLS + ESCAPE + escaped.clamp_max(0), escaped


def _escape_bits(escaped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper and the lower ESCAPE_BITS."""
    return escaped >> ESCAPE_BITS, escaped & ((1 << ESCAPE_BITS) - 1)


def _row_of_levels(operations: _Operations, layout: _Layout, row: int, is_coded: torch.Tensor) -> _Operations:
    """The operations [steps, B, C] of the levels of one token of each block; is_coded [B]."""
    tokens = layout.tokens[row]
    starts, frequencies, precisions = (
        values[tokens].unflatten(3, (layout.num_rounds, layout.num_states)).movedim(0, 3).flatten(0, 2)
        for values in operations
    )
    return _only_some(_Operations(starts, frequencies, precisions * is_coded[:, None]))


def _side_operations(symbols: Symbols, models: Models, layout: _Layout) -> _Operations:
    """The operations [steps, B, C] of all tokens' side information, which the first of C states has."""
    is_raw = symbols.is_raw
    nothing = torch.zeros_like(symbols.rms, dtype=torch.int64)
    flag_frequencies = torch.where(is_raw, RAW_FREQUENCY, CODED_FREQUENCY)
    trusts = TRUST_MODEL * NUM_SYMBOLS + symbols.trust.long()
    kinds = [
        _Operations(is_raw * CODED_FREQUENCY, flag_frequencies, nothing + KIND_PRECISION),
        _Operations(models.starts[trusts], models.frequencies[trusts], PRECISION * ~is_raw),
    ]
    for model, value in zip(models.side_models, (symbols.rms, symbols.finer), strict=True):
        entries, escaped = _entries(model, value.long())
        kinds.append(_Operations(models.starts[entries], models.frequencies[entries], PRECISION * ~is_raw))
        for bits in _escape_bits(escaped):
            kinds.append(_Operations(bits, nothing + 1, ESCAPE_BITS * (~is_raw & (escaped >= 0))))
    starts, frequencies, precisions = (
        torch.nn.functional.pad(
            torch.stack(parts)[:, layout.tokens].transpose(0, 1).flatten(0, 1)[..., None], (0, layout.num_states - 1)
        )
        for parts in zip(*kinds, strict=True)
    )
    is_there = layout.is_there.repeat_interleave(len(kinds), 0)[..., None]
    return _only_some(_Operations(starts, frequencies, precisions * is_there))


def _only_some(operations: _Operations) -> _Operations:
    """Those steps in which any state has a symbol; of a state that has none, an operation that changes nothing."""
    steps = operations.precisions.flatten(1).any(1).nonzero()[:, 0]
    starts, frequencies, precisions = (part[steps] for part in operations)
    is_none = precisions == 0
    return _Operations(starts.masked_fill(is_none, 0), frequencies.masked_fill(is_none, 1), precisions)


def _push(states: torch.Tensor, operations: _Operations) -> tuple[torch.Tensor, torch.Tensor]:
    """States [B, C] after encoding, last step first; and [steps, B, C]: the words put out, -1 where there was none."""
    limits = operations.frequencies << (STATE_BITS - operations.precisions)
    complements = (1 << operations.precisions) - operations.frequencies
    before = torch.empty_like(limits)
    for step in reversed(range(len(limits))):
        before[step] = states
        states = states >> WORD_BITS * (states >= limits[step])
        quotients = states // operations.frequencies[step]
        states = torch.addcmul(states + operations.starts[step], quotients, complements[step])
    return states, torch.where(before >= limits, before & WORD_MASK, -1)


def _frame(states: torch.Tensor, words: torch.Tensor, has_raw: bool) -> torch.Tensor:
    """Bytes of final states [B, C] and of each block's words, -1 where there is none."""
    num_blocks, num_states = states.shape
    if num_states == 1:
        state, words = int(states), words[words >= 0]
        head = _bytes_of(state, 3 if state < 1 << 24 and not has_raw else 4)
        if has_raw:
            head = RAW_HEAD * [0] + _bytes_of(len(words), 4) + head
        return torch.cat([torch.tensor(head, dtype=torch.uint8, device=states.device), _split(words, 2)])
    words = torch.cat([(states[..., None] >> states.new_tensor([0, WORD_BITS]) & WORD_MASK).flatten(1), words], 1)
    is_word = words >= 0
    table = _split(is_word.sum(1), 4) if num_blocks > 1 else torch.empty(0, dtype=torch.uint8, device=states.device)
    return torch.cat([table, _split(words[is_word], 2)])


def _bytes_of(value: int, num_bytes: int) -> list[int]:
    return list(value.to_bytes(num_bytes, "little"))


def _split(values: torch.Tensor, num_bytes: int) -> torch.Tensor:
    """Integers [n] to uint8 [n num_bytes], little-endian."""
    shifts = 8 * torch.arange(num_bytes, device=values.device)
    return (values[:, None] >> shifts & 255).to(torch.uint8).flatten()


def _join(data: torch.Tensor, num_bytes: int) -> torch.Tensor:
    """Inverse of `_split`; what is left over at the end is ignored."""
    data = data[: len(data) // num_bytes * num_bytes].view(-1, num_bytes).long()
    return (data << 8 * torch.arange(num_bytes, device=data.device)).sum(1)


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
    layout = _lay_out(num_tokens, width, device)
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


def _open(data: torch.Tensor, layout: _Layout) -> tuple[_Tape, _Source] | None:
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
    tape: _Tape, source: _Source, models: Models, layout: _Layout
) -> tuple[_Tape, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Side information of all tokens: is_raw bool [N]; rms, finer and trust int64 [N]."""
    first = _Tape(tape.states[:, :1], tape.place)
    after, sides = _take_sides_in_order(first, source, models, layout, with_escapes=False)
    if (sides == ESCAPED).any():
        after, sides = _take_sides_in_order(first, source, models, layout, with_escapes=True)
    is_raw, trust, rms, finer = sides.movedim(1, 2)[:, layout.is_there.T]
    return _Tape(torch.cat([after.states, tape.states[:, 1:]], 1), after.place), is_raw.bool(), rms, finer, trust


def _take_sides_in_order(
    tape: _Tape, source: _Source, models: Models, layout: _Layout, *, with_escapes: bool
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
    tape: _Tape, source: _Source, models: Models, layout: _Layout, is_raw: torch.Tensor, finer: torch.Tensor
) -> tuple[_Tape, torch.Tensor]:
    """Levels int64 [N, H] of all tokens."""
    width = len(models.component_class)
    statics, expected = _static_classes(models, finer)
    is_component = _is_component(width, is_raw.device)[-1]
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
    classes = _classes(stripe.statics, seen, stripe.expected, models)
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
    seen = _decayed(seen) + (levels.abs().sum(1, keepdim=True) << 7)
    return _Walk(tape, _next_states(trellis, index), seen), levels, is_rare


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


def quantize(
    y: torch.Tensor,
    predicted: torch.Tensor,
    steps: torch.Tensor,
    finer: torch.Tensor,
    classes: torch.Tensor,
    rates: torch.Tensor,
    is_raw: torch.Tensor,
) -> torch.Tensor:
    """Levels int32 [N, H] of what `predicted` leaves of components `y`, both float32 [N, H].

    `steps` float32 [N] are the tokens' steps, `finer` int32 [N] the quarter octaves by which they are finer; `classes`
    int32 [H] and `rates` float32 [C, 2, S] as in `kernels.trellis.Prices`. A token with a level out of range is marked
    in `is_raw` bool [N]; raw tokens have levels 0.
    """
    target = (y - predicted) * (1 / (0.5 * steps))[:, None]
    is_raw |= ~(target.abs() < MAX_LEVEL - 4).all(1)
    target = _in_lanes(torch.where(is_raw[:, None], 0, target))
    rows = _in_lanes((classes.long() + 2 * finer.long()[:, None]).clamp(0, len(rates) - 1)) * (2 * rates.shape[2])
    costs = _errors(target.abs(), rows, rates) * _is_component(y.shape[1], y.device)[:, None]
    paths = torch.full_like(costs[:, 0], float(UNREACHED))
    paths[:, 0] = 0
    # Costs are those of an even and an odd index in the first quantiser, then in the second. States 0 and 2 are reached
    # from 0 and 1, states 1 and 3 from 2 and 3.
    states, other_states, orders, other_orders = torch.tensor(
        [[0, 2, 0, 2], [1, 3, 1, 3], [0, 2, 1, 3], [1, 3, 0, 2]], device=y.device
    )
    decisions = []
    for stripe in costs.unbind(1):
        others = paths[:, other_states] + stripe[:, other_orders]
        paths = paths[:, states] + stripe[:, orders]
        decisions.append(others < paths)
        paths = torch.minimum(others, paths)
        paths = paths - paths.amin(1, keepdim=True)
    second, odd = _walk_back(paths, decisions)
    size, add = target.abs(), (2 + second - 2 * odd).to(target.dtype)
    levels = 4 * torch.floor(0.25 * (size + add)) + (2 - add)
    levels = torch.where((add == 3) & (size < 1.5), 0, levels)
    levels = torch.where(target >= 0, levels, -levels).int().flatten(1)[:, : y.shape[1]]
    return torch.where(is_raw[:, None], 0, levels)


def _errors(size: torch.Tensor, rows: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """Cost [N, S, 4, LANES] of the nearest level of each parity and quantiser to magnitudes [N, S, LANES].

    Places in `rates` begin at `rows`."""
    levels = torch.stack(
        [
            4 * torch.floor(0.25 * size + 0.5),
            4 * torch.floor(0.25 * size) + 2,
            torch.where(size >= 1.5, 4 * torch.floor(0.25 * (size + 3)) - 1, 0),
            4 * torch.floor(0.25 * (size + 1)) + 1,
        ],
        2,
    )
    second = torch.tensor([0, 0, 1, 1], device=size.device)[:, None]
    indices = ((levels.long() + second) >> 1).clamp_max(rates.shape[2] - 1)
    difference = size[:, :, None] - levels
    return difference * difference + rates.flatten()[rows[:, :, None] + rates.shape[2] * second + indices]


def _walk_back(paths: torch.Tensor, decisions: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each level of the cheapest path is of the second quantiser and has an odd index, 0 or 1 [N, S, LANES].

    `paths` [N, 4, LANES] is what the states at the end cost; of decisions [N, 4, LANES], state s's says that it is
    reached from the second of its two predecessors.
    """
    state = (paths == 0).long().mul(torch.tensor([4, 3, 2, 1], device=paths.device)[:, None]).argmax(1, keepdim=True)
    seconds, odds = [], []
    for decision in reversed(decisions):
        from_second = decision.gather(1, state).long()
        seconds.append(state & 1)
        odds.append(from_second ^ (state >> 1))
        state = 2 * seconds[-1] + from_second
    return torch.cat(seconds[::-1], 1), torch.cat(odds[::-1], 1)


def reconstruct(
    levels: torch.Tensor, steps: torch.Tensor, predicted: torch.Tensor, is_raw: torch.Tensor
) -> torch.Tensor:
    """Components float32 [N, H] that the levels stand for; arguments as in `quantize`. Of raw tokens, `predicted`."""
    half = torch.where(is_raw, 0, 0.5 * steps)
    limit = float(LARGEST_COMPONENT)
    return (predicted + levels * half[:, None]).clamp(-limit, limit)
