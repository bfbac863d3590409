"""What both ends know, how a frame's tokens lie in blocks and lanes, and the classes that levels are coded in."""

from __future__ import annotations

from typing import NamedTuple

import torch

from compressors.kernels.klt.classes import ACTIVITY_DECAY, ACTIVITY_PRIOR, MAX_ACTIVITY
from compressors.kernels.klt.frame import BLOCK_VALUES, VALUES_PER_STATE
from compressors.kernels.klt.models import (
    FIRST_CLASS,
    LAST_CLASS,
    LAST_WIDE_CLASS,
    NUM_CLASSES,
    PRECISION,
)
from compressors.kernels.trellis import LANES

__all__ = [
    "RAW_HEAD",
    "TRUST_MODEL",
    "WORD_BITS",
    "Layout",
    "Models",
    "Symbols",
    "classes_of",
    "component_mask",
    "decayed",
    "in_lanes",
    "lay_out",
    "next_states",
    "static_classes",
    "sums_before",
    "make_models",
]

TRUST_MODEL = 2 * NUM_CLASSES  # stands behind those of levels
LOG2_STEPS = (3, 9, 16, 23, 31, 40, 51, 61)  # 64ths above 1 at which about 8 log2 becomes 1, 2, ..., 8
WORD_BITS = 16
RAW_HEAD = 3  # bytes 0 of a frame of one state that has raw tokens


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


class Layout(NamedTuple):
    """How a frame's tokens lie in B blocks, M at most in each, with C states for LANES lanes in R rounds."""

    num_states: int
    num_rounds: int
    num_stripes: int
    tokens: torch.Tensor  # int64 [M, B], which token is the m-th of block b
    is_there: torch.Tensor  # bool [M, B], false where block b has fewer


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


def lay_out(num_tokens: int, width: int, device: torch.device) -> Layout:
    num_blocks, num_states = _num_blocks(num_tokens, width), _num_states(num_tokens, width)
    bounds = torch.arange(num_blocks + 1, device=device) * num_tokens // num_blocks
    tokens = bounds[:-1] + torch.arange(-(-num_tokens // num_blocks), device=device)[:, None]
    is_there = tokens < bounds[1:]
    return Layout(num_states, LANES // num_states, -(-width // LANES), tokens.clamp_max(num_tokens - 1), is_there)


def in_lanes(values: torch.Tensor) -> torch.Tensor:
    """[N, H] to [N, S, LANES], with 0 where components are missing."""
    return torch.nn.functional.pad(values, (0, -values.shape[1] % LANES)).view(len(values), -1, LANES)


def component_mask(width: int, device: torch.device) -> torch.Tensor:
    """bool [S, LANES]"""
    return in_lanes(torch.ones(1, width, dtype=torch.bool, device=device))[0]


def sums_before(sums: torch.Tensor) -> torch.Tensor:
    """Of [N, S]: of the stripes before each, those longer ago counting less."""
    total, before = torch.zeros_like(sums[:, 0]), []
    for stripe_sums in sums.unbind(1):
        before.append(total)
        total = decayed(total) + stripe_sums
    return torch.stack(before, 1)


def decayed(total: torch.Tensor) -> torch.Tensor:
    return total - (total >> ACTIVITY_DECAY)


def static_classes(models: Models, finer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens' static classes [N, S, LANES], and logarithms [N, S] of what they let expect of the stripes before."""
    statics = (models.component_class + 2 * finer.long()[:, None]).clamp(FIRST_CLASS, LAST_WIDE_CLASS)
    expected = sums_before(in_lanes(models.magnitude[statics - FIRST_CLASS]).sum(2))
    return in_lanes(statics), _log2_eighths(expected + ACTIVITY_PRIOR, models)


def classes_of(statics: torch.Tensor, seen: torch.Tensor, expected: torch.Tensor, models: Models) -> torch.Tensor:
    """Classes, counted from 0, of components [..., LANES] from what was seen and expected before [..., 1]."""
    activity = (_log2_eighths(seen + ACTIVITY_PRIOR, models) - expected).clamp(-MAX_ACTIVITY, MAX_ACTIVITY)
    return (statics + activity).clamp(FIRST_CLASS, LAST_WIDE_CLASS) - FIRST_CLASS


def next_states(trellis: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return (trellis >> 1) + 2 * ((index + trellis) & 1)
