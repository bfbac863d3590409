"""A matrix kept as blocks: products with it, and its rows as float32."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pipeline.models.blocks.layouts import LAYOUTS

__all__ = ["TILE_FROM_ROWS", "BlockMatrix", "compile_products"]

# From so many rows on, blocks are made float32 a tile at a time and multiplied by torch.
TILE_FROM_ROWS = 32
TILE_NBYTES = 4 << 20  # of float32 weights; smaller ones are slower to multiply with, larger ones no faster
# With fewer bytes of blocks, waking other threads takes longer than they save.
MIN_NBYTES_FOR_THREADS = 32 << 10
CHUNKS_PER_THREAD = 4


class BlockMatrix:
    """Weights [N, K] as GGUF's blocks, row by row, on a CPU.

    `data` is uint8 [N, bytes of a row], contiguous and not empty, `type_name` one of `LAYOUTS`. Products are what
    float32 weights of the same values give but for the order of summation, which depends on whether there are many rows
    or few (`TILE_FROM_ROWS`), not on what the other rows are, nor on the number of threads below it.
    """

    def __init__(self, data: torch.Tensor, type_name: str) -> None:
        self.layout = LAYOUTS[type_name]
        self.type_name = type_name
        assert data.dtype == torch.uint8 and data.dim() == 2 and data.is_contiguous(), (data.dtype, data.shape)
        assert data.numel() and data.shape[1] % self.layout.nbytes == 0, (data.shape, type_name)
        assert data.device.type == "cpu", data.device
        self.data = data
        self._num_blocks = data.shape[1] // self.layout.nbytes
        self.shape = (len(data), self._num_blocks * self.layout.num_weights)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def __matmul__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., K] to [..., N], x times the transpose: records gradients of `x` where it requires one."""
        if x.requires_grad and torch.is_grad_enabled():
            return _Product.apply(x, self)
        return self._multiply(x)

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """float32 [..., K] of int64 [...], as `gguf.dequantize` gives them, bit for bit."""
        gathered = self.data.index_select(0, indices.reshape(-1))
        return self._dequantised(gathered, 1).view(*indices.shape, self.shape[1])

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        num_outputs, num_inputs = self.shape
        # Compiled code takes addresses: it would read another type's, device's or width's as if they were its own.
        assert x.dtype == torch.float32 and x.device.type == "cpu", (x.dtype, x.device)
        assert x.shape[-1] == num_inputs, (x.shape, num_inputs)
        x = x.contiguous()
        num_rows = x.numel() // num_inputs
        product = x.new_empty((*x.shape[:-1], num_outputs))
        if num_rows >= TILE_FROM_ROWS:
            rows, outputs = x.view(-1, num_inputs), product.view(-1, num_outputs)
            for first, tile in self._tiles():
                torch.mm(rows, tile.T, out=outputs[:, first : first + len(tile)])
        else:
            self._multiply_few(x.data_ptr(), product.data_ptr(), num_rows)
        return product

    def _multiply_few(self, inputs: int, outputs: int, num_rows: int) -> None:
        kernels = _kernels()
        num_outputs, num_inputs = self.shape
        # All or one, as torch does: for another number than before, libgomp ends threads and starts new ones.
        num_threads = torch.get_num_threads() if self.data.nbytes >= MIN_NBYTES_FOR_THREADS else 1
        while num_rows:
            count = min(num_rows, kernels.rows_at_once())
            task = self._task(self.data, num_threads, inputs, outputs, 4 * num_outputs)
            kernels.run(kernels.multiplying(self.type_name, count), task, num_threads)
            num_rows -= count
            inputs += 4 * count * num_inputs
            outputs += 4 * count * num_outputs

    def _tiles(self) -> Any:
        """First row and float32 weights of each tile, in the same memory one after the other."""
        step = max(1, TILE_NBYTES // (4 * self.shape[1]))
        scratch = _empty(min(step, self.shape[0]), self.shape[1])
        for first in range(0, self.shape[0], step):
            part = self.data[first : first + step]
            yield first, self._dequantised(part, torch.get_num_threads(), scratch[: len(part)])

    def _dequantised(self, data: torch.Tensor, num_threads: int, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is None:
            out = _empty(len(data), self.shape[1])
        if len(data):
            task = self._task(data, num_threads, 0, out.data_ptr(), 4 * self.shape[1])
            _kernels().run(_kernels().dequantising(self.type_name), task, num_threads)
        return out

    def _task(self, data: torch.Tensor, num_threads: int, inputs: int, outputs: int, outputs_stride: int) -> Any:
        num_rows, row_nbytes = data.shape
        chunk = -(-num_rows // (num_threads * CHUNKS_PER_THREAD))
        blocks = (self._num_blocks, data.data_ptr(), row_nbytes)
        return _kernels().Task(0, num_rows, chunk, *blocks, inputs, 4 * self.shape[1], outputs, outputs_stride)


@functools.cache
def _kernels() -> Any:
    from pipeline.models.blocks import kernels  # a compiler comes with it, some 40 MB that others do without

    return kernels


def compile_products(type_name: str) -> None:
    """All that products with this type may need, so that nobody waits for a compiler later on."""
    kernels = _kernels()
    for count in range(1, kernels.rows_at_once() + 1):
        kernels.multiplying(type_name, count)
    kernels.dequantising(type_name)


def _empty(*shape: int) -> torch.Tensor:
    """float32 on the CPU, whatever torch's defaults are just now."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


class _Product(torch.autograd.Function):
    """`matrix @ x`, with the gradient of x alone, and none of that: tiles do not outlive their turn."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, matrix: BlockMatrix) -> torch.Tensor:
        ctx.matrix = matrix
        return matrix._multiply(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        matrix = ctx.matrix
        rows = gradient.reshape(-1, matrix.shape[0])
        total = _empty(len(rows), matrix.shape[1]).zero_()
        for first, tile in matrix._tiles():
            total.addmm_(rows[:, first : first + len(tile)], tile)
        return total.view(*gradient.shape[:-1], matrix.shape[1]), None
