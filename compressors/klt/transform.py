"""The arithmetic of `klt` around its quantiser and entropy coder: tokens to components and back, prediction from ids.

Two ways of the same, which agree to float tolerance. `KernelTransform` runs in compiled loops in host memory
(`kernels.transform`), `TorchTransform` by torch's operations on an accelerator. In both, what a token becomes depends
on no other token of its frame to the last bit: the loops have one order of summation, and torch's products and sums run
in blocks of one number of rows. Steps and powers of two come from one table and are the same in both.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch

from compressors.klt.calibration_file import LinkCalibration
from compressors.klt.token_table import TokenTable
from compressors.rows import Scratch
from compressors.saturation import saturating_cast

__all__ = ["RAW_EIGHTHS", "Analysis", "KernelTransform", "TorchTransform", "make_transform", "multiply_rows"]

RAW_EIGHTHS = 32  # u that lies 4 octaves from the calibration's median, or more, makes a token raw
FINER_RANGE = (-8, 16)  # quarter octaves
BLOCK_ROWS = 128
CPU = torch.device("cpu")
_FIRST = np.zeros(1, np.int64)


class Analysis(NamedTuple):
    """A frame of N tokens as components and side information, all on the CPU."""

    y: torch.Tensor  # float32 [N, H]
    rms: torch.Tensor  # int32 [N], 8 log2 u less its median
    finer: torch.Tensor  # int32 [N], quarter octaves by which the token's step is finer
    is_raw: torch.Tensor  # bool [N], whether the token must be raw


class KernelTransform:
    """By compiled loops in host memory. One token costs one reading of a matrix."""

    def __init__(self, calibration: LinkCalibration, tokens: TokenTable, step: float) -> None:
        from compressors.kernels import transform as kernels
        from compressors.kernels.klt.few_tokens import PredictionTables

        self._content, self._tokens, self._step = calibration, tokens, step
        self._scratch = Scratch()
        of_link = _halves(calibration.token_out), calibration.token_bias.numpy()
        self.prediction = PredictionTables(*(*tokens.arrays, *of_link))
        constant, per_octave = calibration.finer_bias.tolist()
        self.tables = kernels.TransformTables(
            mean=calibration.mean.numpy(),
            encode=_halves(calibration.encode),
            decode=_halves(calibration.decode),
            median_eighths=int(calibration.rms_eighths),
            raw_eighths=RAW_EIGHTHS,
            finer_weights=calibration.finer.numpy(),
            finer_constant=constant,
            finer_per_octave=per_octave,
            finer_range=FINER_RANGE,
        )

    def analyse(self, rows: torch.Tensor) -> Analysis:
        """Of tokens [N, H]. Its `y` holds until the next call."""
        from compressors.kernels import transform as kernels

        x = rows.detach().to(CPU, torch.float32).contiguous()
        y, centred = self._floats("y", *x.shape), self._floats("centred", *x.shape)
        rms, finer = np.empty((2, len(x)), np.int32)
        is_raw = np.empty(len(x), np.bool_)
        kernels.analyse(x.numpy(), self.tables, centred.numpy(), y.numpy(), rms, finer, is_raw)
        return Analysis(y, torch.from_numpy(rms), torch.from_numpy(finer), torch.from_numpy(is_raw))

    def predict(self, ids: np.ndarray) -> np.ndarray:
        """Prediction of all tokens' components from their ids int32 [N], float32 [N, H]. Holds until the next call."""
        from compressors.kernels import transform as kernels

        width = self._content.hidden_size
        predicted = self._floats("predicted", ids.size, width).numpy()
        if not self._content.uses_token_ids:
            predicted.fill(0)
            return predicted
        distinct, inverse = (ids, _FIRST) if ids.size == 1 else np.unique(ids, return_inverse=True)
        of_distinct = self._floats("of distinct ids", distinct.size, width).numpy()
        features = self._tokens.features(torch.from_numpy(distinct))
        kernels.multiply_rows(features.numpy(), self.prediction.out, of_distinct)
        of_distinct += self.prediction.bias
        return np.take(of_distinct, inverse, axis=0, out=predicted, mode="clip")

    def steps(self, finer: torch.Tensor) -> np.ndarray:
        """Step of each token, float32 [N]."""
        from compressors.kernels import transform as kernels

        token_steps = np.empty(finer.numel(), np.float32)
        kernels.steps(self._step, finer.numpy(), token_steps)
        return token_steps

    def synthesise(
        self, decoded: torch.Tensor, rms: np.ndarray, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """Tokens [N, H] in `dtype` on `device` from components float32 [N, H] and what `analyse` said of u."""
        from compressors.kernels import transform as kernels

        x = torch.empty(decoded.shape)
        kernels.synthesise(decoded.numpy(), rms, self.tables, x.numpy())
        return saturating_cast(x, dtype).to(device)

    def _floats(self, name: str, *shape: int) -> torch.Tensor:
        return self._scratch.get(name, shape, torch.float32, CPU)


class TorchTransform:
    """By torch on one device. Methods as those of `KernelTransform`.

    Matrices stay on the device in float32: a product would need them so beside the bf16 they come from.
    """

    def __init__(self, calibration: LinkCalibration, tokens: TokenTable, step: float, device: torch.device) -> None:
        self._content, self._tokens, self._step, self._device = calibration, tokens, step, device
        self._scratch = Scratch()
        self._median = int(calibration.rms_eighths)
        self._finer_constant, self._finer_per_octave = calibration.finer_bias.tolist()

    def analyse(self, rows: torch.Tensor) -> Analysis:
        parts = [self._analyse_block(block) for block in _blocks(rows.float())]
        y, eighths, finer, is_raw = (torch.cat(part)[: len(rows)].to(CPU) for part in zip(*parts, strict=True))
        return Analysis(y, eighths - self._median, finer, is_raw)

    def _analyse_block(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Components, eighths of u, quarter octaves and whether it is raw, of BLOCK_ROWS tokens."""
        octaves = x.square().mean(1).sqrt().log2()
        eighths = (8 * octaves).round()
        is_raw = ~((eighths - self._median).abs() < RAW_EIGHTHS)
        eighths = torch.where(is_raw, self._median, eighths).int()
        scaled = (x / self._powers(eighths).unsqueeze(1)).masked_fill_(is_raw.unsqueeze(1), 0)
        y = torch.mm(scaled - self._constant("mean"), self._constant("encode"))
        finer = (y * self._constant("finer")).sum(1) + (self._finer_constant + self._finer_per_octave * eighths / 8)
        return y, eighths, finer.round().clamp(*FINER_RANGE).int(), is_raw

    def predict(self, ids: np.ndarray) -> np.ndarray:
        if not self._content.uses_token_ids:
            return np.zeros((ids.size, self._content.hidden_size), np.float32)
        distinct, inverse = np.unique(ids, return_inverse=True)
        features = self._tokens.features(torch.from_numpy(distinct)).to(self._device)
        of_distinct = _multiply_blocks(features, self._constant("token_out")) + self._constant("token_bias")
        return of_distinct[torch.from_numpy(inverse).to(self._device)].cpu().numpy()

    def steps(self, finer: torch.Tensor) -> np.ndarray:
        return (self._step * _power_table()[_power_index(-2 * finer)]).numpy()

    def synthesise(
        self, decoded: torch.Tensor, rms: np.ndarray, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        u = self._powers(torch.from_numpy(rms).to(self._device) + self._median)
        x = _multiply_blocks(decoded.to(self._device), self._constant("decode")).add_(self._constant("mean"))
        return saturating_cast(x.mul_(u.unsqueeze(1)), dtype).to(device)

    def _constant(self, name: str) -> torch.Tensor:
        return self._scratch.constant(name, getattr(self._content, name), self._device, torch.float32)

    def _powers(self, eighths: torch.Tensor) -> torch.Tensor:
        return self._scratch.constant("powers", _power_table(), self._device)[_power_index(eighths)]


def make_transform(
    calibration: LinkCalibration, tokens: TokenTable, step: float, device: torch.device
) -> KernelTransform | TorchTransform:
    """What computes hidden states that are on `device`."""
    if device.type == "cpu":
        return KernelTransform(calibration, tokens, step)
    return TorchTransform(calibration, tokens, step, device)


def multiply_rows(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """rows [N, K] @ matrix [K, M] in float32; the matrix in bf16 on the CPU, in float32 elsewhere.

    How a library sums depends on the number of rows, and a row's last bits must not: a token's reconstruction would
    depend on how many tokens follow.
    """
    if rows.device.type != "cpu":
        return _multiply_blocks(rows, matrix)
    from compressors.kernels import transform as kernels

    product = rows.new_empty(len(rows), matrix.shape[1])
    kernels.multiply_rows(rows.contiguous().numpy(), _halves(matrix), product.numpy())
    return product


def _multiply_blocks(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    blocks = _blocks(rows)
    product = rows.new_empty(*blocks.shape[:2], matrix.shape[1])
    for block, out in zip(blocks, product, strict=True):
        torch.mm(block, matrix, out=out)
    return product.view(-1, matrix.shape[1])[: len(rows)]


def _blocks(rows: torch.Tensor) -> torch.Tensor:
    """Rows [N, K] followed by zeros, as [blocks, BLOCK_ROWS, K]."""
    blocks = rows.new_zeros(-(-len(rows) // BLOCK_ROWS), BLOCK_ROWS, rows.shape[1])
    blocks.view(-1, rows.shape[1])[: len(rows)] = rows
    return blocks


def _halves(matrix: torch.Tensor) -> np.ndarray:
    """The bits of a bf16 matrix, uint16."""
    return matrix.contiguous().view(torch.uint16).numpy()


@functools.cache
def _power_table() -> torch.Tensor:
    """2 ** (n / 8) as float32 for n = -1280 to 1280, beyond which it is 0 or infinite; as in `kernels.transform`."""
    octaves = np.array([2.0 ** (n / 8) for n in range(8)])
    n = np.arange(-1280, 1281)
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.ldexp(octaves[n & 7], n >> 3).astype(np.float32))


def _power_index(eighths: torch.Tensor) -> torch.Tensor:
    return eighths.clamp(-1280, 1280).long() + 1280
