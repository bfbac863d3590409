"""A linear layer and an embedding whose weights are blocks."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.models.blocks.products import BlockMatrix

__all__ = ["BlockEmbedding", "BlockLinear", "BlockModule"]


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

    @classmethod
    def of(cls, matrix: BlockMatrix) -> BlockLinear:
        """A linear layer with blocks that something else has, too."""
        linear = cls(matrix.shape, matrix.type_name)
        linear.matrix = matrix
        return linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = self.matrix @ x
        return product if self.bias is None else product + self.bias


class BlockEmbedding(BlockModule):
    """In the place of an `nn.Embedding`: int64 [...] to float32 [..., K], times `scale` where there is one (Gemma)."""

    def __init__(self, shape: tuple[int, int], type_name: str, *, scale: float | None = None) -> None:
        super().__init__(shape, type_name)
        self.scale = scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        embedded = self.matrix.rows(ids)
        return embedded if self.scale is None else embedded.mul_(self.scale)
