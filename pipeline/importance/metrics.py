"""Importance of tokens: one number per token, larger for those that deserve more bits.

A codec that names a metric (`token_mixed(metric=column, ...)`) gets its result as side input: the stage in front of
the link computes it, from its own layers and output, while the micro-batch passes. In the formulas A_hij is the
attention of row (query) i to column (key) j in head h of a layer, T the number of rows; a metric over several layers
is the mean of their results. What is made from gradients comes from a file; `files` reads those.

A metric is `causal` when a token's importance depends on nothing but its place: codecs that pick the top tokens of a
frame by any other metric look at later tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from pipeline.data.windows import MicroBatch
from pipeline.models.attention import Attention, AttentionError

__all__ = ["METRICS", "AttentionMetric", "Metric", "MetricSetting"]


@dataclass(frozen=True, kw_only=True)
class MetricSetting:
    """What a metric is made from; each takes what it needs.

    Args:
        layers: of the model, those whose attention is read; they belong to the sending stage.
        first_layer: of the sending stage, where its own count starts.
        microbatches: of the run.
        seed: of the random metric.
        head_relevance: float32 [layers of the model, heads], none negative.
        token_importance: float32, one value per input token of all windows in turn.
        file_digest: of the file that one of these two was read from.
    """

    layers: Sequence[int] = ()
    first_layer: int = 0
    microbatches: Sequence[MicroBatch] = ()
    seed: int = 0
    head_relevance: torch.Tensor | None = None
    token_importance: torch.Tensor | None = None
    file_digest: str | None = None


class Metric(ABC):
    """Base class. `setting_keys` are the keys of the config's `importance` section that it reads."""

    name: ClassVar[str]
    causal: ClassVar[bool] = False
    setting_keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, setting: MetricSetting) -> None:
        self._setting = setting

    @abstractmethod
    def importance(self, hidden_states: torch.Tensor, microbatch_index: int) -> torch.Tensor:
        """float32 [B, T] on the device of `hidden_states` [B, T, H], the sending stage's output."""

    def describe(self) -> dict[str, Any]:
        """What determines the result beside model and text, for records and digests."""
        return {"metric": self.name}


class AttentionMetric(Metric):
    """A metric of the attention of some layers: `read` comes first, while the stage computes them."""

    setting_keys: ClassVar[tuple[str, ...]] = ("layers",)

    def __init__(self, setting: MetricSetting) -> None:
        super().__init__(setting)
        self._wanted = {layer - setting.first_layer for layer in setting.layers}
        self._results: dict[int, torch.Tensor] = {}

    @abstractmethod
    def reduce(self, attention: Attention, layer: int) -> torch.Tensor:
        """float32 [B, T] of one layer, counted in the model."""

    def read(self, stage_layer: int, attention: Attention) -> None:
        """Take in one layer (`attention.AttentionReader`)."""
        if stage_layer in self._wanted:
            self._results[stage_layer] = self.reduce(attention, stage_layer + self._setting.first_layer)

    def importance(self, hidden_states: torch.Tensor, microbatch_index: int) -> torch.Tensor:
        results, self._results = self._results, {}
        if results.keys() != self._wanted:
            raise AttentionError(
                f"metric {self.name} was shown the attention of the stage's layers {sorted(results)}, "
                f"it reads {sorted(self._wanted)}"
            )
        return torch.stack(list(results.values())).mean(0)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"layers": list(self._setting.layers)}


class Column(AttentionMetric):
    """Attention that a token receives: I_j = (1/T) sum_i A_ij, mean over heads. It favours early tokens."""

    name = "column"

    def reduce(self, attention: Attention, layer: int) -> torch.Tensor:
        batch, heads, num_tokens = attention.shape
        weights = self.head_weights(layer, heads).to(attention.query.device)
        total = torch.zeros(batch, num_tokens, device=attention.query.device)
        for _, rows in attention.chunks():
            total[:, : rows.shape[-1]] += torch.einsum("bhj,h->bj", rows.sum(2), weights)
        return total / max(num_tokens, 1)

    def head_weights(self, layer: int, heads: int) -> torch.Tensor:
        """float32 [heads]; they sum to 1."""
        return torch.full((heads,), 1 / heads)


class ColumnCausal(Column):
    """The same per row that can see the token: I_j = 1/n_j sum_i A_ij, mean over heads; n_j = T - j where no window
    slides.
    """

    name = "column_causal"

    def reduce(self, attention: Attention, layer: int) -> torch.Tensor:
        mean = super().reduce(attention, layer)
        return mean * mean.shape[1] / attention.rows_seeing()


class HeadWeighted(Column):
    """I_j = (1/T) sum_i sum_h w_h A_hij with w_h = R_h / sum_h R_h, the relevance R of the layer's heads."""

    name = "head_weighted"
    setting_keys = ("layers", "head_weights")

    def head_weights(self, layer: int, heads: int) -> torch.Tensor:
        assert self._setting.head_relevance is not None
        relevance = self._setting.head_relevance[layer]
        return relevance / relevance.sum()

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"head_weights": self._setting.file_digest}


class HeadWeightedCausal(ColumnCausal, HeadWeighted):
    """`head_weighted` per row that can see the token: I_j = 1/n_j sum_i sum_h w_h A_hij."""

    name = "head_weighted_causal"


class LastRow(AttentionMetric):
    """Attention of the final position: I_j = A_Tj, mean over heads."""

    name = "last_row"

    def reduce(self, attention: Attention, layer: int) -> torch.Tensor:
        batch, _, num_tokens = attention.shape
        for _, rows in attention.chunks(max(num_tokens - 1, 0)):
            return rows[:, :, -1].mean(1)
        return torch.zeros(batch, 0, device=attention.query.device)


class Norm(Metric):
    """Length of the token's activation at the boundary: I_j = ||x_j||_2."""

    name = "norm"

    def importance(self, hidden_states: torch.Tensor, microbatch_index: int) -> torch.Tensor:
        return torch.linalg.vector_norm(hidden_states, dim=-1, dtype=torch.float32)


class _ByPlace(Metric):
    """A metric that knows windows and positions only."""

    causal = True

    def importance(self, hidden_states: torch.Tensor, microbatch_index: int) -> torch.Tensor:
        microbatch = self._setting.microbatches[microbatch_index]
        positions = np.arange(microbatch.shape[1], dtype=np.uint64)
        rows = np.stack([self._row(window.index, positions) for window in microbatch.windows])
        return torch.from_numpy(rows).to(hidden_states.device)

    @abstractmethod
    def _row(self, window_index: int, positions: np.ndarray) -> np.ndarray:
        """float32 [T] of one window, from its positions uint64 [T]."""


class Random(_ByPlace):
    """Uniform in [0, 1): SplitMix64 (Steele et al. 2014) of seed, window and position, the same on every link."""

    name = "random"
    setting_keys = ("seed",)

    def _row(self, window_index: int, positions: np.ndarray) -> np.ndarray:
        window = _splitmix64(np.array([self._setting.seed], np.uint64)) + np.uint64(window_index)
        bits = _splitmix64(_splitmix64(window) + positions)
        return (bits >> np.uint64(40)).astype(np.float32) / np.float32(2**24)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"seed": self._setting.seed}


def _splitmix64(z: np.ndarray) -> np.ndarray:
    """Well-mixed bits of uint64 numbers."""
    z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Uniform(_ByPlace):
    """No token matters more. So that a codec's choice is spread evenly over the positions, I_j is van der Corput's
    sequence: the bits of j mirrored behind the binary point.
    """

    name = "uniform"

    def _row(self, window_index: int, positions: np.ndarray) -> np.ndarray:
        mirrored = np.zeros(len(positions), np.float32)
        for bit in range(24):  # of the significand
            is_set = (positions >> np.uint64(bit)) & np.uint64(1)
            mirrored += is_set.astype(np.float32) * np.float32(0.5 ** (bit + 1))
        return mirrored


class Oracle(Metric):
    """What a file says, made beforehand with the text at hand (the gradient of the loss at the link, say)."""

    name = "oracle"
    setting_keys = ("oracle",)

    def __init__(self, setting: MetricSetting) -> None:
        super().__init__(setting)
        lengths, values = [m.num_tokens for m in setting.microbatches], setting.token_importance
        assert values is not None
        if values.numel() != sum(lengths):
            raise ValueError(
                f"importance.oracle has {values.numel()} values for a link, the windows of this "
                f"run have {sum(lengths)} tokens"
            )
        self._parts = values.split(lengths)

    def importance(self, hidden_states: torch.Tensor, microbatch_index: int) -> torch.Tensor:
        shape = self._setting.microbatches[microbatch_index].shape
        return self._parts[microbatch_index].view(shape).to(hidden_states.device)

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"oracle": self._setting.file_digest}


METRICS: Mapping[str, type[Metric]] = {
    cls.name: cls
    for cls in (
        Column,
        ColumnCausal,
        LastRow,
        HeadWeighted,
        HeadWeightedCausal,
        Norm,
        Random,
        Uniform,
        Oracle,
    )
}
