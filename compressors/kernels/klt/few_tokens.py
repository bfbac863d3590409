"""Frames of few tokens, as a generation sends them, in one call: between small calls their matrices leave the cache.

The same functions in the same order as `compressors.klt.codec` calls them for more tokens, whose bytes these are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from compressors.kernels.bits import jit
from compressors.kernels.klt.frame import decode, encode
from compressors.kernels.klt.models import Models, Symbols
from compressors.kernels.token_table import unpack_features
from compressors.kernels.transform import TILE_ROWS, TransformTables, analyse, multiply_rows, steps, synthesise
from compressors.kernels.trellis import Prices, quantize, reconstruct
from compressors.kernels.trust import apply_trust, choose_trust

__all__ = ["MOST_TOKENS", "Known", "PredictionTables", "decode_few", "encode_few"]

MOST_TOKENS = TILE_ROWS - 1  # more have their products by tiles


class PredictionTables(NamedTuple):
    """What says of an id how its components are likely, `kernels.token_table` first; without ids, nothing in it."""

    frequent: np.ndarray
    rare: np.ndarray
    rows: np.ndarray
    group_sizes: np.ndarray
    steps: np.ndarray
    out: np.ndarray  # uint16 [D, H], bf16
    bias: np.ndarray  # float32 [H]


class Known(NamedTuple):
    """What both ends of a link know at a step."""

    transform: TransformTables
    prediction: PredictionTables
    prices: Prices
    models: Models
    step: float


@jit
def _predict(ids, tables, width):
    """Components float32 [N, H] as the ids, int64 [N], make them likely."""
    predicted = np.zeros((ids.size, width), np.float32)
    if tables.out.size:
        features = np.empty((ids.size, tables.steps.shape[1]), np.float32)
        unpack_features(ids, tables.frequent, tables.rare, tables.rows, tables.group_sizes, tables.steps, features)
        multiply_rows(features, tables.out, predicted)
        for t in range(ids.size):
            predicted[t] += tables.bias
    return predicted


@jit
def encode_few(rows, ids, known, raw_cost):
    """`encode` of tokens float32 [N, H] with ids int64 [N], which the table has: (bytes, bool [N] which are raw)."""
    num_tokens, width = rows.shape
    y, centred = np.empty((num_tokens, width), np.float32), np.empty((num_tokens, width), np.float32)
    rms, finer, trust = np.empty(num_tokens, np.int32), np.empty(num_tokens, np.int32), np.zeros(num_tokens, np.int32)
    is_raw, token_steps = np.empty(num_tokens, np.bool_), np.empty(num_tokens, np.float32)
    analyse(rows, known.transform, centred, y, rms, finer, is_raw)
    predicted = _predict(ids, known.prediction, width)
    steps(known.step, finer, token_steps)
    if known.prediction.out.size:
        choose_trust(y, predicted, token_steps, trust)
        apply_trust(trust, predicted)
    levels = np.empty((num_tokens, width), np.int32)
    quantize(y, predicted, token_steps, finer, known.prices, levels, is_raw)
    return encode(Symbols(levels, is_raw, rms, finer, trust), known.models, raw_cost), is_raw


@jit
def decode_few(data, ids, known, rows):
    """Inverse of `encode_few`, into `rows` float32 [N, H]: (what `decode` returns, bool [N] which are raw)."""
    num_tokens, width = rows.shape
    levels, is_raw = np.empty((num_tokens, width), np.int32), np.zeros(num_tokens, np.bool_)
    rms, finer, trust = np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.int32), np.zeros(num_tokens, np.int32)
    used = decode(data, known.models, Symbols(levels, is_raw, rms, finer, trust))
    if used < 0:
        return used, is_raw
    token_steps, decoded = np.empty(num_tokens, np.float32), np.empty((num_tokens, width), np.float32)
    steps(known.step, finer, token_steps)
    predicted = _predict(ids, known.prediction, width)
    apply_trust(trust, predicted)
    reconstruct(levels, token_steps, predicted, is_raw, decoded)
    synthesise(decoded, rms, known.transform, rows)
    return used, is_raw
