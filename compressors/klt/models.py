"""Entropy models of `klt`, and the rates that its steps give, from text that was held out.

The held-out rows are coded at several steps. Levels are counted by class and quantiser, their sizes by class alone; the
trellis weighs levels by the models' bits, so counting is done twice. A Laplace distribution stands in where counts are
few.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from compressors.klt.calibration_file import LinkCalibration
from compressors.klt.codec import KltCoder
from compressors.klt.token_table import TokenTable

__all__ = ["REFERENCE_STEP", "SampleRow", "cumulative", "eighths", "fit_models", "prior_models"]

REFERENCE_STEP = 0.75  # at which components' sizes are measured
MODEL_STEPS = (2.4, 1.4, 0.8, 0.3)
RATE_STEPS = tuple(2.0 ** (n / 2) for n in range(-8, 5))
MAX_RATE_TOKENS = 4096  # of the sample, for rates


@dataclass(frozen=True)
class SampleRow:
    """Hidden states [T, H] of one row of held-out text, and its token ids int32 [T]."""

    hidden_states: torch.Tensor
    token_ids: torch.Tensor


class _CodedLevels(NamedTuple):
    """What trellis and side information made of the N tokens of a row that are not raw."""

    levels: np.ndarray  # int32 [N, H], half steps
    finer: np.ndarray  # int32 [N], quarter octaves
    component_class: np.ndarray  # int32 [H], at the step


def prior_models() -> dict[str, torch.Tensor]:
    """Models of a Laplace distribution, in force until histograms replace them."""
    from compressors.kernels.klt import FIRST_CLASS, LAST_CLASS, LAST_WIDE_CLASS

    classes = range(FIRST_CLASS, LAST_CLASS + 1)
    starts = np.stack([cumulative(_laplace(2 ** (c / 8), quantizer)) for quantizer in (0, 1) for c in classes])
    wide = range(FIRST_CLASS, LAST_WIDE_CLASS + 1)
    magnitude = [round(256 * _laplace_magnitude(2 ** (c / 8))) for c in wide]
    return {
        "trust_starts": torch.from_numpy(cumulative(np.array([6.0, 3.0, 1.0]))),
        "starts": torch.from_numpy(starts),
        "magnitude": torch.tensor(magnitude, dtype=torch.int64),
    }


def _laplace_magnitude(size: float) -> float:
    """E|q| of a Laplace variable of mean magnitude `size`, rounded."""
    return math.exp(-0.5 / size) / (1 - math.exp(-1 / size))


def _laplace(size: float, quantizer: int) -> np.ndarray:
    """Probabilities of the symbols 0, -1, 1, ..., escape, were every value rounded within its quantiser."""
    edges = [0.25, *range(1, 32)] if quantizer else [n - 0.5 for n in range(1, 33)]
    tail = [1.0] + [math.exp(-edge / size) for edge in edges]  # P(|q| >= n)
    both = np.repeat([(a - b) / 2 for a, b in itertools.pairwise(tail[1:])], 2)
    return np.concatenate([[1 - tail[1]], both, [tail[32]]])


def cumulative(weights: np.ndarray) -> np.ndarray:
    """Integer cumulative frequencies int32 [S + 1] that sum to 2**15, each symbol at least 1."""
    total = (1 << 15) - len(weights)
    frequencies = 1 + np.floor(total * weights / weights.sum()).astype(np.int64)
    frequencies[frequencies.argmax()] += (1 << 15) - frequencies.sum()
    return np.concatenate([[0], frequencies.cumsum()]).astype(np.int32)


def fit_models(calibration: LinkCalibration, tokens: TokenTable, sample: Sequence[SampleRow]) -> LinkCalibration:
    """Classes, models and rates as the codec meets them in the sample."""
    calibration = dataclasses.replace(calibration, **_component_sizes(calibration, tokens, sample))
    for _ in range(2):
        calibration = dataclasses.replace(calibration, **_count_levels(calibration, tokens, sample))
    return dataclasses.replace(calibration, **_rates(calibration, tokens, sample))


def _count_levels(
    calibration: LinkCalibration, tokens: TokenTable, sample: Sequence[SampleRow]
) -> dict[str, torch.Tensor]:
    """Expected magnitudes from a pass with static classes, then the models from one with activity."""
    from compressors.kernels import klt as kernels

    coded = [row for step in MODEL_STEPS for row in _quantized(calibration, tokens, sample, step)]
    magnitude_sums = np.zeros((2, calibration.magnitude.numel()))
    for row in coded:
        index = kernels.static_classes(row.component_class, row.finer).reshape(-1) - kernels.FIRST_CLASS
        magnitude_sums[0] += np.bincount(index, np.abs(row.levels).reshape(-1) / 2, magnitude_sums.shape[1])
        magnitude_sums[1] += np.bincount(index, minlength=magnitude_sums.shape[1])
    prior = 1000.0
    magnitude = (256 * magnitude_sums[0] + prior * calibration.magnitude.numpy()) / (magnitude_sums[1] + prior)
    magnitude = magnitude.round().astype(np.int64)
    counts = np.zeros((calibration.starts.shape[0], kernels.NUM_SYMBOLS), np.int64)
    for row in coded:
        classes = np.empty(row.levels.shape, np.int16)
        kernels.classify(row.levels, row.component_class, row.finer, magnitude, classes)
        kernels.count_symbols(row.levels, classes, counts)
    before = calibration.starts.diff(dim=1).numpy() / (1 << 15)
    mirrored = counts.copy()
    mirrored[:, 1:-1:2] = mirrored[:, 2:-1:2] = (counts[:, 1:-1:2] + counts[:, 2:-1:2]) / 2
    starts = np.stack([cumulative(row) for row in mirrored + 200 * before])
    return {"magnitude": torch.from_numpy(magnitude), "starts": torch.from_numpy(starts)}


def _component_sizes(
    calibration: LinkCalibration, tokens: TokenTable, sample: Sequence[SampleRow]
) -> dict[str, torch.Tensor]:
    """Mean magnitude coded of each component, brought to the nominal step, and models of side information."""
    from compressors.kernels.trust import NUM_TRUSTS

    step = REFERENCE_STEP
    coder = KltCoder(calibration, tokens, step)
    sums, weight = torch.zeros(calibration.hidden_size, dtype=torch.float64), 0.0
    sides: list[torch.Tensor] = []
    trusts = np.ones(NUM_TRUSTS)
    for row in sample:
        analysis = coder.transform.analyse(row.hidden_states)
        quantized = coder.quantize(analysis, coder.check_ids(row.token_ids, len(analysis.y)))
        is_coded = torch.from_numpy(~quantized.is_raw)
        sums += (analysis.y - torch.from_numpy(quantized.predicted))[is_coded].abs().sum(0)
        weight += float(is_coded.sum())
        sides += [torch.stack([analysis.rms, analysis.finer])[:, is_coded]]
        trusts += np.bincount(quantized.trust[~quantized.is_raw], minlength=NUM_TRUSTS)
    prior = calibration.component_eighths
    side = torch.cat(sides, 1).float().abs().mean(1).clamp_min(0.1)
    result = {"side_classes": eighths(side).clamp(-16, 20), "trust_starts": torch.from_numpy(cumulative(trusts))}
    if weight:
        pseudo = 20.0
        expected = torch.exp2(prior.double() / 8)
        result["component_eighths"] = eighths((sums + pseudo * expected) / (weight + pseudo))
    return result


def _quantized(
    calibration: LinkCalibration, tokens: TokenTable, sample: Sequence[SampleRow], step: float
) -> Iterator[_CodedLevels]:
    """Of every row."""
    coder = KltCoder(calibration, tokens, step)
    for row in sample:
        analysis = coder.transform.analyse(row.hidden_states)
        quantized = coder.quantize(analysis, coder.check_ids(row.token_ids, len(analysis.y)))
        is_coded = ~quantized.is_raw
        yield _CodedLevels(quantized.levels[is_coded], analysis.finer.numpy()[is_coded], coder.component_class)


def _rates(calibration: LinkCalibration, tokens: TokenTable, sample: Sequence[SampleRow]) -> dict[str, torch.Tensor]:
    """Bits per value of some of the sample at RATE_STEPS, made to fall."""
    rows: list[SampleRow] = []
    num_tokens = 0
    for row in sample:
        if not rows or num_tokens + len(row.token_ids) <= MAX_RATE_TOKENS:
            rows.append(row)
            num_tokens += len(row.token_ids)
    num_values = num_tokens * calibration.hidden_size
    bits = []
    for step in RATE_STEPS:
        coder = KltCoder(calibration, tokens, step)
        nbytes = sum(coder.compress(row.hidden_states[None], row.token_ids).numel() for row in rows)
        bits.append(8 * nbytes / num_values)
    falling = np.minimum.accumulate(bits)
    return {
        "rate_steps": torch.tensor(RATE_STEPS, dtype=torch.float64),
        "rate_bits": torch.from_numpy(falling),
    }


def eighths(size: torch.Tensor) -> torch.Tensor:
    """8 log2(size), rounded, int32."""
    return (8 * size.log2()).round().to(torch.int32)
