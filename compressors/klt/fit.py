"""From what a link carried, and the loss's gradients there, to the calibration of `klt`.

`LinkStatistics` is fed token by token and keeps sums of products only, so its memory is that of a few [H, H] matrices
however long the text is. `fit` makes a `LinkCalibration` of them; its entropy models come from text that was held out
(`compressors.klt.models`).

With z = (x / u - mean) for a token x of root mean square u, and g = u dL/dx:

* Space. F = E[g g^T / |g|] has the directions in which errors cost loss; a token with a large gradient counts for less
  than its square, since it gets a finer step. z W, with W = (F / mean eigenvalue + 0.1)^(1/2), weighs an error by what
  it costs; the 0.1 keeps some precision where the gradient is small, since errors at useful rates are too large for a
  quadratic form.
* Prediction. Ridge regression of z W on features of the token's id (`compressors.klt.token_table`).
* Transform. Eigenvectors of the covariance of what prediction leaves.
* Step. The logarithm of |g|^2 is regressed on z and log2 u. The step of a token is proportional to |g| to the power
  -2 STEP_EXPONENT as predicted. High-resolution theory has 1/2 in place of STEP_EXPONENT; the prediction is uncertain,
  and half of that did best.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from compressors.klt.calibration_file import LinkCalibration
from compressors.klt.models import REFERENCE_STEP, SampleRow, eighths, fit_models, prior_models
from compressors.klt.token_table import NarrowTable
from compressors.klt.transform import RAW_EIGHTHS

__all__ = ["LinkStatistics", "fit", "token_importance"]

FLATTENING = 0.1
STEP_EXPONENT = 0.25


class LinkStatistics:
    """Sums over tokens. The vector of a token is (x / u [H], log2 u, 1, its id's features [D]); `products` sums its
    outer product. D = 0 leaves ids out. Gradients may be known of some of the tokens only."""

    def __init__(self, hidden_size: int, num_features: int, device: torch.device) -> None:
        self.hidden_size, self.num_features = hidden_size, num_features
        size = hidden_size + 2 + num_features
        make: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.products = torch.zeros(size, size, **make)
        self.sensitivity = torch.zeros(hidden_size, hidden_size, **make)
        # Of tokens with a gradient, whose vectors end before the features.
        self.log_sensitivity = torch.zeros(hidden_size + 2, **make)  # sums of the vector times log |g|^2
        self.sensitive_products = torch.zeros(hidden_size + 2, hidden_size + 2, **make)
        self.rms_eighths: int | None = None
        self.num_tokens = 0

    @torch.no_grad()
    def add(self, hidden_states: torch.Tensor, features: torch.Tensor) -> None:
        """One micro-batch: hidden states [B, T, H], features float32 [B, T, D]."""
        own, _, is_coded = self._vectors(hidden_states)
        vectors = torch.cat([own, features], -1)[is_coded]
        self.products += vectors.T @ vectors
        self.num_tokens += len(vectors)

    @torch.no_grad()
    def add_gradients(self, hidden_states: torch.Tensor, gradients: torch.Tensor) -> None:
        """Of one micro-batch: hidden states [B, T, H] and gradients float32 [B, T, H]."""
        own, u, is_coded = self._vectors(hidden_states)
        g = (gradients.float() * u)[is_coded]
        size = g.square().sum(-1)
        usable = size.isfinite() & (size > 0)  # nothing depends on a row's last token
        g, own, size = g[usable], own[is_coded][usable], size[usable]
        self.sensitivity += (g / size.sqrt().unsqueeze(-1)).T @ g
        self.log_sensitivity += size.log() @ own
        self.sensitive_products += own.T @ own

    def _vectors(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(x / u, log2 u, 1) [B, T, H + 2], u [B, T, 1], and which tokens are not raw, bool [B, T]."""
        x = hidden_states.float()
        octaves = x.square().mean(-1).sqrt().log2()
        if self.rms_eighths is None:
            usable = octaves[octaves.isfinite()]
            if usable.numel() == 0:
                raise ValueError("calibration text gives no finite, non-zero hidden states")
            self.rms_eighths = round(8 * usable.median().item())
        is_coded = ((8 * octaves - self.rms_eighths).abs() < RAW_EIGHTHS) & x.isfinite().all(-1)
        octaves = torch.where(is_coded, octaves, 0).unsqueeze(-1)
        u = torch.exp2(octaves)
        return torch.cat([x / u, octaves, torch.ones_like(octaves)], -1), u, is_coded


@torch.no_grad()
def token_importance(statistics: LinkStatistics) -> torch.Tensor:
    """What errors in a token's features cost at a link, float64 [D, D] on the CPU: e @ it @ e, in 2 nats, where e is
    small beside what the prediction leaves and quantisation adds."""
    prediction = _Prediction(statistics, _Space(statistics))
    residual = prediction.residual.clone()
    residual.diagonal().add_(REFERENCE_STEP**2 / 12)
    return (prediction.weights @ torch.linalg.solve(residual, prediction.weights.T)).cpu()


@torch.no_grad()
def fit(statistics: LinkStatistics, sample: Sequence[SampleRow], tokens: NarrowTable) -> LinkCalibration:
    """The link's calibration. `tokens` is empty, or made from the table that gave `statistics` its features."""
    space = _Space(statistics)
    prediction = _Prediction(statistics, space)
    by_features = prediction.weights
    residual = prediction.residual + by_features.T @ tokens.errors.to(by_features) @ by_features
    variances, basis = _principal(residual, statistics.num_tokens)
    fixed_variances, fixed_basis = _principal(space.covariance, statistics.num_tokens)
    encode, fixed_encode = ((space.to_space @ b).bfloat16() for b in (basis, fixed_basis))
    token_out = (tokens.back.to(by_features) @ by_features @ basis).bfloat16()
    token_bias = (tokens.mean.to(by_features) - prediction.features_mean) @ by_features @ basis
    finer, finer_bias = _fit_finer(statistics, space, basis)
    calibration = LinkCalibration(
        mean=space.mean.float(),
        encode=encode,
        decode=_inverse(encode),
        fixed_encode=fixed_encode,
        fixed_decode=_inverse(fixed_encode),
        fixed_size=fixed_variances.clamp_min(1e-12).sqrt().float(),
        component_eighths=eighths(variances.clamp_min(1e-9).sqrt() * 0.8),
        token_out=token_out,
        token_bias=token_bias.float(),
        finer=finer.float(),
        finer_bias=finer_bias.float(),
        rms_eighths=torch.tensor([statistics.rms_eighths], dtype=torch.int32),
        side_classes=torch.zeros(2, dtype=torch.int32),
        **prior_models(),
        rate_steps=torch.zeros(0, dtype=torch.float64),
        rate_bits=torch.zeros(0, dtype=torch.float64),
    )
    return fit_models(_on_cpu(calibration), tokens.table, sample)


class _Space:
    """The weighted space: z W with W divided so that the average variance is 1."""

    def __init__(self, statistics: LinkStatistics) -> None:
        n, size = statistics.num_tokens, statistics.hidden_size
        if n < 2:
            raise ValueError(f"calibration needs at least 2 tokens that can be coded, got {n}")
        one = size + 1
        self.mean = statistics.products[one, :size] / n
        eigenvalues, vectors = torch.linalg.eigh(statistics.sensitivity)
        average = eigenvalues.clamp_min(0).mean()
        if not average > 0:
            raise ValueError("calibration text gives no gradients at this link")
        weights = (eigenvalues.clamp_min(0) / average + FLATTENING).sqrt()
        root = (vectors * weights) @ vectors.T
        covariance = statistics.products[:size, :size] / n - torch.outer(self.mean, self.mean)
        scale = (root @ covariance @ root).trace().div(size).clamp_min(1e-12).sqrt()
        self.to_space = root / scale
        self.covariance = self.to_space @ covariance @ self.to_space


class _Prediction:
    """Regression of a token in the space on its centred features."""

    def __init__(self, statistics: LinkStatistics, space: _Space) -> None:
        n, size = statistics.num_tokens, statistics.hidden_size
        one, first = size + 1, size + 2  # of the statistics' vector: the constant, the features
        products = statistics.products / n
        self.features_mean = products[one, first:]
        own = products[first:, first:] - torch.outer(self.features_mean, self.features_mean)
        cross = (products[first:, :size] - torch.outer(self.features_mean, space.mean)) @ space.to_space
        ridge = 1e-3 + 0.05 * len(own) / n
        self.weights = torch.linalg.solve(own + torch.diag(ridge * own.diagonal() + 1e-9), cross)
        explained = cross.T @ self.weights
        self.residual = space.covariance - explained - explained.T + self.weights.T @ own @ self.weights


def _principal(covariance: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances, falling, and principal components as columns. The covariance is first drawn towards a multiple of the
    identity by the share of what is unknown, which matters for short texts."""
    size = len(covariance)
    share = 0.1 * size / (size + num_tokens)
    identity = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    shrunk = (1 - share) * (covariance + covariance.T) / 2 + share * covariance.trace() / size * identity
    variances, vectors = torch.linalg.eigh(shrunk)
    return variances.flip(0), vectors.flip(1)


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    """Of a matrix as it is rounded, in bfloat16: its rounding is then no error of what is decoded."""
    return torch.linalg.inv(matrix.double()).bfloat16()


def _fit_finer(statistics: LinkStatistics, space: _Space, basis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quarter octaves by which a token's step is finer, as a function of its components and of log2 u."""
    size, one = statistics.hidden_size, statistics.hidden_size + 1
    n = statistics.sensitive_products[one, one]
    to_features = statistics.products.new_zeros(size + 2, size + 1)  # components in the space, log2 u
    to_features[:size, :size] = space.to_space @ basis
    to_features[size, size] = 1
    products = to_features.T @ statistics.sensitive_products @ to_features / n
    mean = statistics.sensitive_products[one] @ to_features / n
    centred = products - torch.outer(mean, mean)
    target_mean = statistics.log_sensitivity[one] / n
    target = statistics.log_sensitivity @ to_features / n - mean * target_mean
    ridge = 1e-3 + 0.1 * size / n
    weights = torch.linalg.solve(centred + torch.diag(ridge * centred.diagonal() + 1e-9), target)
    weights *= 4 * STEP_EXPONENT / math.log(2)  # nats of |g|^2 to quarter octaves of the step
    # The codec's components are centred on the mean of all tokens: y = (x / u) E - mean E.
    offset = space.mean @ space.to_space @ basis @ weights[:size]
    return weights[:size], torch.stack([offset - mean @ weights, weights[size]])


def _on_cpu(calibration: LinkCalibration) -> LinkCalibration:
    tensors = {f.name: getattr(calibration, f.name).cpu() for f in dataclasses.fields(calibration)}
    return dataclasses.replace(calibration, **tensors)
