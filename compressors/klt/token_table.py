"""What is known of a token from its id alone: D features, from which each link predicts its components.

A calibration makes the table twice. The wide one has the embedding's principal components in 8 bits each; statistics
are gathered with it. What the links make of the features (`compressors.klt.fit.token_importance`) then says what an
error in them costs, and the narrow one, which goes to the file, has features in which that cost and the variance are
both diagonal: transform coding for a weighted error, as for the hidden states. Whole bits go to them by reverse
water-filling (`compressors.klt.bit_allocation`), BITS_PER_FEATURE times as many as the wide table has features; those
without bits are left out.

A feature is quantised uniformly and saturates. An id's codes are packed into one row, features of one width after the
other (`compressors.bitpack`), the widest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from compressors.bitpack import pack, packed_nbytes
from compressors.klt.bit_allocation import LAPLACE_STEP, MAX_NBITS, allocate
from compressors.klt.tensor_fields import tensor_field

__all__ = ["CHUNK", "NarrowTable", "TokenTable", "make_token_table", "narrow_token_table"]

MAX_FEATURES = 1024
BITS_PER_FEATURE = 2
FLATTENING = 0.02  # of the average importance, given to every direction
CHUNK = 8192  # ids at once


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenTable:
    """Of V token ids: D features each, in P bytes. Without ids, V, D and P are 0."""

    packed: torch.Tensor = tensor_field(torch.uint8, "V", "P", mapped=True)
    group_sizes: torch.Tensor = tensor_field(torch.int64, "eight")  # how many features have 8, 7, ..., 1 bits
    steps: torch.Tensor = tensor_field(torch.float32, "D")  # a feature of n bits is (code + 0.5 - 2 ** (n - 1)) * step

    @property
    def num_ids(self) -> int:
        return self.packed.shape[0]

    @property
    def num_features(self) -> int:
        return self.steps.numel()

    # Of the coding of ids, which goes with `temporal`: ids stand for their own ranks.
    @property
    def ranks(self) -> torch.Tensor:
        return torch.arange(self.num_ids, dtype=torch.int32)

    by_rank = ranks

    @property
    def rank_starts(self) -> torch.Tensor:
        lengths = torch.arange(self.num_ids.bit_length() + 1) if self.num_ids else torch.tensor([0, 1])
        return ((lengths << 15) // lengths[-1]).to(torch.int32)

    @classmethod
    def empty(cls) -> TokenTable:
        return cls(
            packed=torch.zeros(0, 0, dtype=torch.uint8),
            group_sizes=torch.zeros(MAX_NBITS, dtype=torch.int64),
            steps=torch.zeros(0),
        )

    def features(self, ids: torch.Tensor) -> torch.Tensor:
        """Float32 [N, D] of ids [N], on the CPU. Raises ValueError for ids that the table does not have."""
        from compressors.kernels.token_table import unpack_features

        ids = ids.long().contiguous()
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_ids:
            raise ValueError(f"the table has {self.num_ids} token ids, got {int(ids.min())} to {int(ids.max())}")
        features = torch.empty(len(ids), self.num_features)
        sizes, steps = self.group_sizes.numpy(), self.steps.numpy()
        unpack_features(self.packed.numpy(), ids.numpy(), sizes, steps, features.numpy())
        return features

    def fault(self) -> str | None:
        """What does not fit together in tensors of the right shapes; the kernel takes them as they are."""
        sizes = self.group_sizes.tolist()
        if min(sizes) < 0 or sum(sizes) != self.num_features:
            return f"groups {sizes} of {self.num_features} features"
        row_nbytes = _row_nbytes(sizes)
        return None if self.packed.shape[1] == row_nbytes else f"rows of {self.packed.shape[1]} bytes for {row_nbytes}"


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
    features = _Features(mean, basis[:, :MAX_FEATURES], variances[:MAX_FEATURES], MAX_NBITS)
    return features.quantize(embedding_chunks(), counts)[0]


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
    table, errors = _Features(mean, root @ basis, variances, BITS_PER_FEATURE).quantize(chunks(), counts)
    back = basis.T @ inverse
    return NarrowTable(table=table, back=back[: table.num_features], mean=mean, errors=(back.T * errors) @ back)


class _Features:
    """(row - mean) @ basis for rows [n, H], of variances that fall, in `nbits` times len(mean) bits."""

    def __init__(self, mean: torch.Tensor, basis: torch.Tensor, variances: torch.Tensor, nbits: int) -> None:
        self.variances = variances
        widths = allocate(variances.sqrt(), nbits * len(variances))  # they fall, as the variances do
        self.sizes = [int((widths == n).sum()) for n in range(MAX_NBITS, 0, -1)]
        self.num_features = sum(self.sizes)
        widths = widths[: self.num_features]
        self.steps = (variances[: self.num_features].sqrt() * torch.tensor(LAPLACE_STEP)[widths]).float()
        self.steps.clamp_min_(1e-30)
        self.levels = torch.exp2(widths.float())
        self.mean, self.basis = mean.float(), basis[:, : self.num_features].float()

    def quantize(self, chunks: Iterable[torch.Tensor], counts: torch.Tensor) -> tuple[TokenTable, torch.Tensor]:
        """The table, and its features' mean squared errors, float64, those of features without bits included."""
        sums = torch.zeros(self.num_features, dtype=torch.float64)
        weights = _weights(counts)
        packed = torch.empty(len(counts), _row_nbytes(self.sizes), dtype=torch.uint8)
        for rows, row_bytes, weight in zip(_in_chunks(chunks), packed.split(CHUNK), weights.split(CHUNK), strict=True):
            features = (rows - self.mean) @ self.basis
            codes = (features / self.steps + self.levels / 2).floor().clamp_(min=0).minimum(self.levels - 1)
            sums += weight @ ((codes + 0.5 - self.levels / 2) * self.steps - features).double().square()
            codes = codes.to(torch.uint8)
            parts = [pack(codes[:, first:last].contiguous(), n) for n, first, last in _groups(self.sizes)]
            row_bytes.copy_(torch.cat(parts, 1))
        errors = torch.cat([sums / weights.sum(), self.variances[self.num_features :]])
        return TokenTable(packed=packed, group_sizes=torch.tensor(self.sizes), steps=self.steps), errors


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
    for chunk, weight in zip(_in_chunks(rows), weights.split(CHUNK), strict=True):
        chunk = chunk.double()
        mean, products = mean + weight @ chunk, products + (chunk.T * weight) @ chunk
    mean = mean / weights.sum()
    return mean, products / weights.sum() - torch.outer(mean, mean)


def _principal(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances, falling, and principal components as columns."""
    variances, vectors = torch.linalg.eigh(covariance)
    return variances.flip(0).clamp_min(0), vectors.flip(1)


def _in_chunks(rows: Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    """The same rows, CHUNK at a time."""
    for piece in rows:
        yield from piece.split(CHUNK)
