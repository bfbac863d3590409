"""What a rank gathers for the calibration of `klt`: statistics of its links, held-out samples, and how far it has come.

Micro-batches are taken in one order, first those whose gradients come back, a few in each pass of the pipeline: between
two passes every rank is at the same one, so that what all have gathered can be put away (`analysis.unfinished`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from compressors.klt.fit import LinkStatistics
from compressors.klt.models import SampleRow
from compressors.klt.token_table import TokenTable
from pipeline.models.stage import TokenWindows
from pipeline.runtime.deployment import Deployment

__all__ = ["SUMS", "Division", "Gathered"]

MICROBATCHES_PER_PASS = 4
SUMS = ("products", "sensitivity", "log_sensitivity", "sensitive_products")  # the tensors of LinkStatistics


@dataclass(frozen=True, kw_only=True)
class Division:
    """Which micro-batches, by index, are for what: the entropy models' sample, the statistics, gradients or none."""

    held_out: frozenset[int]
    fitted: frozenset[int]
    graded: tuple[int, ...]
    others: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        return (*self.graded, *self.others)

    def next_pass(self, num_done: int) -> tuple[int, ...]:
        """Those that go around together when `num_done` have: all of `graded` or none, and none at the end."""
        end = num_done + MICROBATCHES_PER_PASS
        if num_done < len(self.graded):
            end = min(end, len(self.graded))
        return self.order[num_done:end]


class Gathered:
    """What came of the first `num_done` micro-batches of the division's order.

    Args:
        deployment: whose outgoing links on this rank are looked at.
        tokens: the ids of the micro-batches, all of one length.
        division: of these micro-batches.
        table: features of the ids; empty: none.
        dtype: of hidden states.

    Attributes:
        statistics, samples: by link index.
    """

    def __init__(
        self, deployment: Deployment, tokens: TokenWindows, division: Division, table: TokenTable, dtype: torch.dtype
    ) -> None:
        self.division, self.num_done = division, 0
        self.links = [link for link in deployment.plan.links if link.index in deployment.stages]
        self._tokens, self._table, self._dtype = tokens, table, dtype
        self._devices = deployment.devices
        hidden_size = deployment.model.config.hidden_size
        self.statistics = {
            link.index: LinkStatistics(hidden_size, table.num_features, self._devices[link.index])
            for link in self.links
        }
        self.samples: dict[int, list[SampleRow]] = {link.index: [] for link in self.links}

    @property
    def is_finished(self) -> bool:
        return self.num_done == len(self.division.order)

    def take_states(self, link_index: int, m: int, hidden_states: torch.Tensor) -> None:
        """What is sent on a link, [B, T, H], of micro-batch m."""
        ids = self._tokens.input_ids(m)
        if m in self.division.held_out:
            rows = zip(hidden_states, ids, strict=True)
            self.samples[link_index] += [SampleRow(x.clone(), row.int()) for x, row in rows]
        if m in self.division.fitted:
            features = self._table.features(ids.reshape(-1)) if self._table.num_ids else torch.zeros(ids.numel(), 0)
            self.statistics[link_index].add(hidden_states, features.view(*ids.shape, -1).to(hidden_states.device))

    def take_gradients(self, link_index: int, hidden_states: torch.Tensor, gradients: torch.Tensor) -> None:
        """What is sent on a link and the loss's gradients there, [B, T, H]."""
        self.statistics[link_index].add_gradients(hidden_states, gradients)

    def tensors(self, link_index: int) -> dict[str, torch.Tensor]:
        """All of a link, on the CPU, for `restore`."""
        statistics, rows = self.statistics[link_index], self.samples[link_index]
        assert statistics.rms_eighths is not None
        blank = self.blank(link_index, self.num_done)
        states, ids = (torch.empty_like(blank[name], device="cpu") for name in ("sample_states", "sample_ids"))
        if rows:
            torch.stack([row.hidden_states.cpu() for row in rows], out=states)
            torch.stack([row.token_ids for row in rows], out=ids)
        return {
            **{name: getattr(statistics, name).cpu() for name in SUMS},
            "numbers": torch.tensor([statistics.rms_eighths, statistics.num_tokens]),
            "sample_states": states,
            "sample_ids": ids,
        }

    def blank(self, link_index: int, num_done: int) -> dict[str, torch.Tensor]:
        """Tensors, on no device, of the shapes and dtypes that `tensors` has after `num_done` micro-batches."""
        statistics, microbatches = self.statistics[link_index], self._tokens.microbatches
        held_out = [m for m in self.division.order[:num_done] if m in self.division.held_out]
        num_rows = sum(microbatches[m].shape[0] for m in held_out)
        shape = num_rows, microbatches[0].shape[1]
        return {
            **{name: getattr(statistics, name).to("meta") for name in SUMS},
            "numbers": torch.empty(2, dtype=torch.int64, device="meta"),
            "sample_states": torch.empty(*shape, statistics.hidden_size, dtype=self._dtype, device="meta"),
            "sample_ids": torch.empty(shape, dtype=torch.int32, device="meta"),
        }

    def restore(self, num_done: int, tensors: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
        """Be where `num_done` micro-batches are done; `tensors`, by link index, are like `blank`."""
        for link_index, found in tensors.items():
            statistics, device = self.statistics[link_index], self._devices[link_index]
            for name in SUMS:
                getattr(statistics, name).copy_(found[name])
            statistics.rms_eighths, statistics.num_tokens = found["numbers"].tolist()
            rows = zip(found["sample_states"].to(device), found["sample_ids"], strict=True)
            self.samples[link_index] = [SampleRow(x.clone(), ids.clone()) for x, ids in rows]
        self.num_done = num_done
