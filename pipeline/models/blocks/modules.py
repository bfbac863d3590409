"""A linear layer and an embedding whose weights are blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from pipeline.models.blocks.products import TILE_FROM_ROWS, BlockMatrix

__all__ = ["BlockEmbedding", "BlockLinear", "BlockModule", "join"]


class BlockModule(nn.Module):
    """Has a `matrix` [N, K], which is None until its blocks are read; `shape` and `type_name` are what it must be of.

    It is neither a parameter nor a buffer: transformers would make it up, cast it or tie it.
    """

    def __init__(self, shape: tuple[int, int], type_name: str) -> None:
        super().__init__()
        self.shape = shape
        self.type_name = type_name
        self._matrix: BlockMatrix | None = None

    @property
    def matrix(self) -> BlockMatrix:
        assert self._matrix is not None, "the blocks have not been read"
        return self._matrix

    @matrix.setter
    def matrix(self, matrix: BlockMatrix) -> None:
        assert (matrix.shape, matrix.type_name) == (self.shape, self.type_name), (matrix.shape, matrix.type_name)
        self._matrix = matrix

    def extra_repr(self) -> str:
        return f"{self.shape[0]} x {self.shape[1]}, {self.type_name}"


class BlockLinear(BlockModule):
    """In the place of an `nn.Linear`: float32 [..., K] to [..., N]."""

    def __init__(self, shape: tuple[int, int], type_name: str, *, has_bias: bool = False) -> None:
        super().__init__(shape, type_name)
        self.bias = nn.Parameter(torch.empty(shape[0])) if has_bias else None
        self._joined: tuple[_Joined, int] | None = None

    @classmethod
    def of(cls, matrix: BlockMatrix) -> BlockLinear:
        """A linear layer with blocks that something else has, too."""
        linear = cls(matrix.shape, matrix.type_name)
        linear.matrix = matrix
        return linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._joined is not None and not x.requires_grad and x.numel() < TILE_FROM_ROWS * self.shape[1]:
            joined, part = self._joined
            product = joined.product(x, part)
        else:
            product = self.matrix @ x
        return product if self.bias is None else product + self.bias


class _Joined:
    """Products of few rows with matrices that take the same input, computed in one call when the first is asked for.

    Of an attention's query, key and value, say. What was asked for is known by the tensor that is given; until all
    parts have been taken, it is kept, so that no other can be in its place.
    """

    def __init__(self, matrix: BlockMatrix, sizes: list[int]) -> None:
        self._matrix, self._sizes = matrix, sizes
        self._input: torch.Tensor | None = None
        self._parts: dict[int, torch.Tensor] = {}

    def product(self, x: torch.Tensor, part: int) -> torch.Tensor:
        if x is not self._input or part not in self._parts:
            self._input, self._parts = x, dict(enumerate((self._matrix @ x).split_with_sizes(self._sizes, -1)))
        own = self._parts.pop(part)
        if not self._parts:
            self._input = None
        return own


def join(linears: Sequence[BlockLinear]) -> None:
    """Let linear layers of one input multiply together. Their matrices, of one type, come to lie one behind another."""
    matrices = [linear.matrix for linear in linears]
    sizes = [len(matrix.data) for matrix in matrices]
    matrix = BlockMatrix(torch.cat([matrix.data for matrix in matrices]), matrices[0].type_name)
    joined = _Joined(matrix, sizes)
    for part, (linear, data) in enumerate(zip(linears, matrix.data.split(sizes), strict=True)):
        linear.matrix = BlockMatrix(data, matrix.type_name)
        linear._joined = joined, part


class BlockEmbedding(BlockModule):
    """In the place of an `nn.Embedding`: int64 [...] to float32 [..., K], times `scale` where there is one (Gemma)."""

    def __init__(self, shape: tuple[int, int], type_name: str, *, scale: float | None = None) -> None:
        super().__init__(shape, type_name)
        self.scale = scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embedded = self.matrix.rows(ids)
        return embedded if self.scale is None else embedded.mul_(self.scale)
