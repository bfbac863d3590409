"""What both ends of a link know before a frame comes, and what a frame says of its tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from compressors.kernels.rans import GUESS_BITS, PRECISION, reciprocals

__all__ = [
    "CODED_FREQUENCY",
    "ESCAPE",
    "ESCAPE_BITS",
    "FIRST_CLASS",
    "FIRST_STATE",
    "KIND_PRECISION",
    "LARGEST_FINER",
    "LARGEST_RMS",
    "LAST_CLASS",
    "LAST_WIDE_CLASS",
    "NUM_CLASSES",
    "NUM_SYMBOLS",
    "RAW_FREQUENCY",
    "Models",
    "Symbols",
    "make_models",
    "static_classes",
]

NUM_SYMBOLS = 64  # 0, -1, 1, ..., -31, 31, and one that announces a larger value
ESCAPE = NUM_SYMBOLS - 1
ESCAPE_BITS = 11  # twice
FIRST_CLASS, LAST_CLASS = -32, 20  # of the models: 2**-4 to 2**2.5 steps
MAX_SHIFT = 15
LAST_WIDE_CLASS = LAST_CLASS + 8 * MAX_SHIFT  # whose low bits are sent as they are
NUM_CLASSES = LAST_CLASS - FIRST_CLASS + 1  # models of the second quantiser stand behind those of the first
KIND_PRECISION = 8  # bits of what says whether a token is raw
RAW_FREQUENCY = 1
CODED_FREQUENCY = (1 << KIND_PRECISION) - RAW_FREQUENCY
FIRST_STATE = np.uint32(1 << 16)  # of the encoder, where there are several
LARGEST_RMS, LARGEST_FINER = 1024, 64  # magnitudes that a token can have


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
    guesses: np.ndarray  # uint8, the first symbol that a slot's upper bits can be: 2**GUESS_BITS a model, and 3 more


class Symbols(NamedTuple):
    """What is coded of a frame of N tokens; where a token is raw, nothing but that."""

    levels: np.ndarray  # int32 [N, H], half steps
    is_raw: np.ndarray  # bool [N]
    rms: np.ndarray  # int32 [N]
    finer: np.ndarray  # int32 [N], quarter octaves by which the step is finer
    trust: np.ndarray  # int32 [N], `kernels.trust`


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
        guesses=np.concatenate([*guesses, np.zeros(3, np.int64)]).astype(np.uint8),
    )


def static_classes(component_class: np.ndarray, finer: np.ndarray) -> np.ndarray:
    """Classes int32 [N, H] of tokens' components before anything is known of their levels."""
    return np.clip(component_class + 2 * finer[:, None], FIRST_CLASS, LAST_WIDE_CLASS)
