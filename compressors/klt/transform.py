"""The arithmetic of `klt` around its quantiser and entropy coder: tokens to components and back, prediction from ids.

Two ways of the same. `FrameTransform` is torch's, on the device where the hidden states are, with matrix products in
blocks of many tokens. `TokenTransform` runs in compiled loops in host memory, where what a token becomes depends on no
other token of its frame to the last bit, and one token alone costs one reading of a matrix (`kernels.transform`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from compressors.klt.calibration_file import LinkCalibration
from compressors.klt.token_table import TokenTable
from compressors.rows import Scratch
from compressors.saturation import saturating_cast

__all__ = ["RAW_EIGHTHS", "Analysis", "FrameTransform", "TokenTransform", "matmul_rows"]

RAW_EIGHTHS = 32  # u that lies 4 octaves from the calibration's median, or more, makes a token raw
FINER_RANGE = (-8, 16)  # quarter octaves
MATMUL_ROWS = 128
CPU = torch.device("cpu")


class Analysis(NamedTuple):
    """A frame of N tokens as components and side information, all on the CPU."""

    y: torch.Tensor  # float32 [N, H]
    rms: torch.Tensor  # int32 [N], 8 log2 u less its median
    finer: torch.Tensor  # int32 [N], quarter octaves by which the token's step is finer
    is_raw: torch.Tensor  # bool [N], whether the token must be raw


class FrameTransform:
    """By torch, frame by frame."""

    def __init__(self, calibration: LinkCalibration, tokens: TokenTable, step: float) -> None:
        self._content, self._tokens, self._step = calibration, tokens, step
        self._scratch = Scratch()
        self._median = int(calibration.rms_eighths)

    def analyse(self, rows: torch.Tensor) -> Analysis:
        """Of tokens [N, H]."""
        content, device = self._content, rows.device
        x = rows.float()
        octaves = x.square().mean(1).sqrt().log2()
        eighths = (8 * octaves).round()
        is_raw = ~((eighths - self._median).abs() < RAW_EIGHTHS)
        eighths = torch.where(is_raw, float(self._median), eighths)
        x = (x / torch.exp2(eighths / 8).unsqueeze(1)).masked_fill_(is_raw.unsqueeze(1), 0)
        y = matmul_rows(x - self._on("mean", device), self._on("encode", device))
        constant, per_octave = content.finer_bias.tolist()
        finer = (y * self._on("finer", device)).sum(1) + (constant + per_octave * eighths / 8)
        finer = finer.round().clamp(*FINER_RANGE)
        rms = eighths.to(CPU, torch.int32) - self._median
        return Analysis(y.cpu(), rms, finer.to(CPU, torch.int32), is_raw.cpu())

    def predict(self, ids: np.ndarray) -> np.ndarray:
        """Prediction of all tokens' components from their ids, float32 [N, H]."""
        if not self._content.uses_token_ids:
            return np.zeros((ids.size, self._content.hidden_size), np.float32)
        features = self._tokens.features(torch.from_numpy(ids))
        return matmul_rows(features, self._content.token_out).add_(self._content.token_bias).numpy()

    def steps(self, finer: torch.Tensor) -> np.ndarray:
        """Step of each token, float32 [N]."""
        return (self._step * torch.exp2(finer.float() / -4)).numpy()

    def synthesise(
        self, decoded: torch.Tensor, rms: np.ndarray, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        """Tokens [N, H] in `dtype` on `device` from components float32 [N, H] and what `analyse` said of u."""
        u = torch.exp2((torch.from_numpy(rms) + self._median).float() / 8).to(device)
        x = matmul_rows(decoded.to(device), self._on("decode", device)).add_(self._on("mean", device))
        return saturating_cast(x.mul_(u.unsqueeze(1)), dtype)

    def _on(self, name: str, device: torch.device) -> torch.Tensor:
        return self._scratch.constant(name, getattr(self._content, name), device)


class TokenTransform:
    """By compiled loops in host memory, token by token. Methods as those of `FrameTransform`."""

    def __init__(self, calibration: LinkCalibration, tokens: TokenTable, step: float) -> None:
        from compressors.kernels import transform as kernels

        self._content, self._tokens, self._step = calibration, tokens, step
        self._scratch = Scratch()
        self._token_out, self._token_bias = calibration.token_out.numpy(), calibration.token_bias.numpy()
        constant, per_octave = calibration.finer_bias.tolist()
        self._tables = kernels.TransformTables(
            mean=calibration.mean.numpy(),
            encode=calibration.encode.numpy(),
            decode=calibration.decode.numpy(),
            median_eighths=int(calibration.rms_eighths),
            raw_eighths=RAW_EIGHTHS,
            finer_weights=calibration.finer.numpy(),
            finer_constant=constant,
            finer_per_octave=per_octave,
            finer_range=FINER_RANGE,
        )

    def analyse(self, rows: torch.Tensor) -> Analysis:
        from compressors.kernels import transform as kernels

        x = rows.detach().to(CPU, torch.float32).contiguous()
        y, centred = self._floats("y", x.shape), self._floats("centred", x.shape)
        rms, finer = np.empty((2, len(x)), np.int32)
        is_raw = np.empty(len(x), np.bool_)
        kernels.analyse(x.numpy(), self._tables, centred.numpy(), y.numpy(), rms, finer, is_raw)
        return Analysis(y, torch.from_numpy(rms), torch.from_numpy(finer), torch.from_numpy(is_raw))

    def predict(self, ids: np.ndarray) -> np.ndarray:
        from compressors.kernels import transform as kernels

        predicted = self._floats("predicted", (ids.size, self._content.hidden_size)).numpy()
        if not self._content.uses_token_ids:
            predicted.fill(0)
            return predicted
        features = self._tokens.features(torch.from_numpy(ids))
        kernels.multiply_rows(features.numpy(), self._token_out, predicted)
        predicted += self._token_bias
        return predicted

    def steps(self, finer: torch.Tensor) -> np.ndarray:
        from compressors.kernels import transform as kernels

        token_steps = np.empty(finer.numel(), np.float32)
        kernels.steps(self._step, finer.numpy(), token_steps)
        return token_steps

    def synthesise(
        self, decoded: torch.Tensor, rms: np.ndarray, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        from compressors.kernels import transform as kernels

        x = torch.empty(decoded.shape)
        kernels.synthesise(decoded.numpy(), rms, self._tables, x.numpy())
        return saturating_cast(x, dtype).to(device)

    def _floats(self, name: str, shape: tuple[int, ...] | torch.Size) -> torch.Tensor:
        return self._scratch.get(name, shape, torch.float32, CPU)


def matmul_rows(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """rows [N, K] @ matrix [K, M], always in blocks of one size.

    How a library sums depends on the number of rows, and a row's last bits must not: a token's reconstruction would
    depend on how many tokens follow.
    """
    num_rows = rows.shape[0]
    blocks = rows.new_zeros(-(-num_rows // MATMUL_ROWS), MATMUL_ROWS, rows.shape[1])
    blocks.view(-1, rows.shape[1])[:num_rows] = rows
    product = rows.new_empty(*blocks.shape[:2], matrix.shape[1])
    for block, out in zip(blocks, product, strict=True):
        torch.mm(block, matrix, out=out)
    return product.view(-1, matrix.shape[1])[:num_rows]
