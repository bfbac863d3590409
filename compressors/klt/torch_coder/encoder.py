"""Frames from symbols. All levels are known, so all models are; what is serial is the coder alone."""

from __future__ import annotations

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
from compressors.klt.torch_coder.models import (
    RAW_HEAD,
    TRUST_MODEL,
    WORD_BITS,
    Layout,
    Models,
    Symbols,
    classes_of,
    component_mask,
    in_lanes,
    lay_out,
    next_states,
    static_classes,
    sums_before,
)

__all__ = ["encode"]

STATE_BITS = 32
WORD_MASK = (1 << WORD_BITS) - 1


class _Operations(NamedTuple):
    """[..., B, C]: a symbol for each state. Where `precisions` is 0 that is none."""

    starts: torch.Tensor
    frequencies: torch.Tensor
    precisions: torch.Tensor


def encode(symbols: Symbols, models: Models, raw_cost: int) -> torch.Tensor:
    """`Symbols` to bytes, uint8; the raw tokens' values are the caller's to append, an even number of bytes.

    A token whose values cost more than `raw_cost` (1/256 bits), or whose rms or finer is out of range, is marked in
    `is_raw` and left out.
    """
    num_tokens, width = symbols.levels.shape
    device = symbols.levels.device
    if num_tokens == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    layout = lay_out(num_tokens, width, device)
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
    levels = in_lanes(symbols.levels.long())
    statics, expected = static_classes(models, symbols.finer.clamp(-LARGEST_FINER, LARGEST_FINER))
    seen = sums_before(levels.abs().sum(2) << 7)
    classes = classes_of(statics, seen[..., None], expected[..., None], models)
    is_second, indices = _walk(levels)
    shifts = models.class_shifts[classes]
    rounded = indices + ((1 << shifts) >> 1)
    entries, escaped = _entries(models.class_models[is_second, classes], rounded >> shifts)
    is_component = component_mask(symbols.levels.shape[1], levels.device)
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
        trellis = next_states(trellis, indices[-1])
    return torch.stack(seconds, 1), torch.stack(indices, 1)


def _entries(coder_models: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries of integers, and what an escape leaves to send; below 0 where there is none."""
    escaped = _zigzag(values) - ESCAPE
    return coder_models * NUM_SYMBOLS + ESCAPE + escaped.clamp_max(0), escaped


def _zigzag(values: torch.Tensor) -> torch.Tensor:
    return 2 * values.abs() - (values < 0).long()


def _escape_bits(escaped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper and the lower ESCAPE_BITS."""
    return escaped >> ESCAPE_BITS, escaped & ((1 << ESCAPE_BITS) - 1)


def _row_of_levels(operations: _Operations, layout: Layout, row: int, is_coded: torch.Tensor) -> _Operations:
    """The operations [steps, B, C] of the levels of one token of each block; is_coded [B]."""
    tokens = layout.tokens[row]
    starts, frequencies, precisions = (
        values[tokens].unflatten(3, (layout.num_rounds, layout.num_states)).movedim(0, 3).flatten(0, 2)
        for values in operations
    )
    return _only_some(_Operations(starts, frequencies, precisions * is_coded[:, None]))


def _side_operations(symbols: Symbols, models: Models, layout: Layout) -> _Operations:
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
