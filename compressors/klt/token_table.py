"""What is known of a token from its id alone: D features, from which each link predicts its components.

A calibration makes the table twice. The wide one has the embedding's principal components in 8 bits each; statistics
are gathered with it. What the links make of the features (`compressors.klt.fit.token_importance`) then says what an
error in them costs, and the narrow one, which goes to the file, has features in which that cost and the variance are
both diagonal: transform coding for a weighted error, as for the hidden states. Whole bits go to them by reverse
water-filling (`compressors.klt.bit_allocation`), BITS_PER_FEATURE times as many as the wide table has features, on
average of all ids: the most frequent FREQUENT_SHARE of them, most of any text, have more bits than the rest, by what
their errors cost in all. Features without bits are left out, or 0 for the rest.

A feature is quantised uniformly and saturates. An id's codes are packed into one row, features of one width after the
other (`compressors.bitpack`), the widest first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from compressors.bitpack import pack, packed_nbytes
from compressors.klt.bit_allocation import LAPLACE_STEP, MAX_NBITS, allocate
from compressors.klt.tensor_fields import tensor_field

__all__ = ["CHUNK", "NarrowTable", "TokenTable", "make_token_table", "narrow_token_table"]

MAX_FEATURES = 1024
BITS_PER_FEATURE = 15 / 8  # with the rows' padding and numbers, a quarter of the wide table's bytes
FREQUENT_SHARE = 1 / 16
FLATTENING = 0.02  # of the average importance, given to every direction
CHUNK = 8192  # ids at once


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """Of V token ids: D features each, in P bytes of F frequent ids, Q of R others. Without ids, all of these are 0.

    A feature of n bits is (code + 0.5 - 2 ** (n - 1)) * step.
    """

    frequent: torch.Tensor = tensor_field(torch.uint8, "F", "P", mapped=True)
    rare: torch.Tensor = tensor_field(torch.uint8, "R", "Q", mapped=True)
    rows: torch.Tensor = tensor_field(torch.int32, "V")  # of each id, in `frequent` and then `rare`
    group_sizes: torch.Tensor = tensor_field(torch.int64, "two", "eight")  # how many features have 8, 7, ..., 1 bits
    steps: torch.Tensor = tensor_field(torch.float32, "two", "D")

    @property
    def num_ids(self) -> int:
        return self.rows.numel()

    @property
    def num_features(self) -> int:
        return self.steps.shape[1]

    @classmethod
    def empty(cls) -> TokenTable:
        return cls(
            frequent=torch.zeros(0, 0, dtype=torch.uint8),
            rare=torch.zeros(0, 0, dtype=torch.uint8),
            rows=torch.zeros(0, dtype=torch.int32),
            group_sizes=torch.zeros(2, MAX_NBITS, dtype=torch.int64),
            steps=torch.zeros(2, 0),
        )

    def features(self, ids: torch.Tensor) -> torch.Tensor:
        """Float32 [N, D] of ids [N], on the CPU. Raises ValueError for ids that the table does not have."""
        from compressors.kernels.token_table import unpack_features

        ids = ids.long().contiguous()
        features = torch.empty(len(ids), self.num_features)
        if not unpack_features(ids.numpy(), *self.arrays, features.numpy()):
            raise ValueError(f"the table has {self.num_ids} token ids, got {int(ids.min())} to {int(ids.max())}")
        return features

    @functools.cached_property
    def arrays(self) -> list[np.ndarray]:
        """As `kernels.token_table` takes them."""
        return [t.numpy() for t in (self.frequent, self.rare, self.rows, self.group_sizes, self.steps)]

    def fault(self) -> str | None:
        """What does not fit together in tensors of the right shapes; the kernel takes them as they are."""
        if len(self.frequent) + len(self.rare) != self.num_ids:
            return f"{len(self.frequent)} and {len(self.rare)} rows of {self.num_ids} ids"
        if self.num_ids and not 0 <= int(self.rows.min()) <= int(self.rows.max()) < self.num_ids:
            return f"rows {int(self.rows.min())} to {int(self.rows.max())} of {self.num_ids}"
        for packed, sizes in zip((self.frequent, self.rare), self.group_sizes.tolist(), strict=True):
            if min(sizes) < 0 or sum(sizes) > self.num_features:
                return f"groups {sizes} of {self.num_features} features"
            if packed.shape[1] != _row_nbytes(sizes):
                return f"rows of {packed.shape[1]} bytes for {_row_nbytes(sizes)}"
        return None


@dataclass(frozen=True, kw_only=True, eq=False)
class NarrowTable:
    """A narrow table and what its features say of the wide one's: narrow @ back + mean, with errors of a covariance.

    d are the features of the wide table, D those of the narrow one.
    """

    table: TokenTable
    back: torch.Tensor  # float64 [D, d]
    mean: torch.Tensor  # float64 [d]
    errors: torch.Tensor  # float64 [d, d]

    @classmethod
    def empty(cls) -> NarrowTable:
        none = torch.zeros(0, 0, dtype=torch.float64)
        return cls(table=TokenTable.empty(), back=none, mean=none.reshape(0), errors=none)


@torch.no_grad()
def make_token_table(embedding_chunks: Callable[[], Iterable[torch.Tensor]], counts: torch.Tensor) -> TokenTable:
    """The wide table of all ids; beside it, a few chunks are in memory.

    `embedding_chunks()` gives float32 [n, H] rows in the order of ids, anew at each call; `counts` int64 [V] is how
    often the text has each id, which weighs the components.
    """
    mean, covariance = _moments(embedding_chunks(), counts)
    variances, basis = _principal(covariance)
    features = _Features(mean, basis[:, :MAX_FEATURES], variances[:MAX_FEATURES], MAX_NBITS, counts)
    return features.quantize(embedding_chunks())[0]


@torch.no_grad()
def narrow_token_table(wide: TokenTable, counts: torch.Tensor, importance: torch.Tensor) -> NarrowTable:
    """The table for the file. `counts` as for `make_token_table`; an error e in the wide table's features costs
    e @ importance @ e, float64 [d, d], up to a factor."""

    def chunks() -> Iterator[torch.Tensor]:
        return (wide.features(ids) for ids in torch.arange(wide.num_ids).split(CHUNK))

    mean, covariance = _moments(chunks(), counts)
    eigenvalues, vectors = torch.linalg.eigh((importance + importance.T) / 2)
    eigenvalues = eigenvalues.clamp_min(0)
    weights = (eigenvalues / eigenvalues.mean().clamp_min(1e-30) + FLATTENING).sqrt()
    root, inverse = (vectors * weights) @ vectors.T, (vectors / weights) @ vectors.T
    variances, basis = _principal(root @ covariance @ root)
    table, errors = _Features(mean, root @ basis, variances, BITS_PER_FEATURE, counts).quantize(chunks())
    back = basis.T @ inverse
    return NarrowTable(table=table, back=back[: table.num_features], mean=mean, errors=(back.T * errors) @ back)


class _Features:
    """(row - mean) @ basis for rows [n, H] by id, of variances that fall, in `nbits` times H bits a row on average."""

    def __init__(
        self, mean: torch.Tensor, basis: torch.Tensor, variances: torch.Tensor, nbits: float, counts: torch.Tensor
    ) -> None:
        num_ids, num_frequent = len(counts), math.ceil(len(counts) * FREQUENT_SHARE)
        order = counts.argsort(descending=True, stable=True)
        self.rows = torch.empty(num_ids, dtype=torch.int32)
        self.rows[order] = torch.arange(num_ids, dtype=torch.int32)
        self.weights = _weights(counts)
        num_rows = torch.tensor([num_frequent, num_ids - num_frequent])
        shares = torch.stack([part.sum() for part in self.weights[order].tensor_split([num_frequent])])
        sizes = (shares.unsqueeze(1) * variances).sqrt().reshape(-1)
        costs = num_rows.clamp_min(1).repeat_interleave(len(variances))
        # Of the frequent ids and of the others, int64 [2, H]; they fall, as the variances do.
        widths = allocate(sizes, int(nbits * len(variances) * num_ids), costs).view(2, -1)
        num_features = int((widths.amax(0) > 0).sum())
        self.widths = widths[:, :num_features]
        steps = variances[:num_features].sqrt().clamp_min(1e-30) * torch.tensor(LAPLACE_STEP)[self.widths]
        self.steps = steps.float()
        self.group_sizes = [[int((own == n).sum()) for n in range(MAX_NBITS, 0, -1)] for own in self.widths]
        self.num_rows, self.variances = num_rows.tolist(), variances
        self.mean, self.basis = mean.float(), basis[:, :num_features].float()

    def quantize(self, chunks: Iterable[torch.Tensor]) -> tuple[TokenTable, torch.Tensor]:
        """The table, and its features' mean squared errors, float64, those of features without bits included."""
        num_features = self.steps.shape[1]
        sums = torch.zeros(num_features, dtype=torch.float64)
        tables = [
            torch.empty(n, _row_nbytes(sizes), dtype=torch.uint8)
            for n, sizes in zip(self.num_rows, self.group_sizes, strict=True)
        ]
        for ids, chunk in _in_chunks(chunks, len(self.rows)):
            rows, weights = self.rows[ids], self.weights[ids]
            features = (chunk - self.mean) @ self.basis
            for tier, is_own in enumerate((rows < self.num_rows[0], rows >= self.num_rows[0])):
                own, width = features[is_own], int((self.widths[tier] > 0).sum())
                codes, decoded = self._codes(own[:, :width], tier)
                missed = own.clone()
                missed[:, :width] -= decoded
                sums += weights[is_own] @ missed.double().square()
                parts = [pack(codes[:, a:b].contiguous(), n) for n, a, b in _groups(self.group_sizes[tier])]
                tables[tier][rows[is_own].long() - tier * self.num_rows[0]] = torch.cat(
                    [codes.new_empty(len(own), 0), *parts], 1
                )
        errors = torch.cat([sums / self.weights.sum(), self.variances[num_features:]])
        frequent, rare = tables
        sizes = torch.tensor(self.group_sizes)
        return TokenTable(frequent=frequent, rare=rare, rows=self.rows, group_sizes=sizes, steps=self.steps), errors

    def _codes(self, features: torch.Tensor, tier: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes uint8 of features [n, D], and what they stand for."""
        width = features.shape[1]
        steps, levels = self.steps[tier, :width], torch.exp2(self.widths[tier, :width].float())
        codes = (features / steps + levels / 2).floor().clamp_(min=0).minimum(levels - 1)
        return codes.to(torch.uint8), (codes + 0.5 - levels / 2) * steps


def _groups(sizes: list[int]) -> Iterator[tuple[int, int, int]]:
    """(nbits, first, last) of the features of each width, the last exclusive."""
    first = 0
    for nbits, size in zip(range(MAX_NBITS, 0, -1), sizes, strict=True):
        if size:
            yield nbits, first, first + size
        first += size


def _row_nbytes(sizes: list[int]) -> int:
    return sum(packed_nbytes(last - first, nbits) for nbits, first, last in _groups(sizes))


def _weights(counts: torch.Tensor) -> torch.Tensor:
    """How much each id weighs, float64 [V]: a text does not have all that others may have."""
    return counts.double() + 0.1


def _moments(rows: Iterable[torch.Tensor], counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [H] and covariance [H, H] of rows by id, float64."""
    weights = _weights(counts)
    mean: torch.Tensor | float = 0.0
    products: torch.Tensor | float = 0.0
    for ids, chunk in _in_chunks(rows, len(counts)):
        chunk, weight = chunk.double(), weights[ids]
        mean, products = mean + weight @ chunk, products + (chunk.T * weight) @ chunk
    mean = mean / weights.sum()
    return mean, products / weights.sum() - torch.outer(mean, mean)


def _principal(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances, falling, and principal components as columns."""
    variances, vectors = torch.linalg.eigh(covariance)
    return variances.flip(0).clamp_min(0), vectors.flip(1)


def _in_chunks(rows: Iterable[torch.Tensor], num_ids: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """At most CHUNK rows at a time, and which ids they are of."""
    first = 0
    for piece in rows:
        for chunk in piece.split(CHUNK):
            yield slice(first, first + len(chunk)), chunk
            first += len(chunk)
    if first != num_ids:
        raise ValueError(f"an embedding of {first} rows for {num_ids} token ids")
