"""block_rowcol_mean: tiles of T tokens x F channels, each replaced by its row means and column means.

    r_t = mean over the tile's channels, c_f = mean over its tokens, m = mean of the r_t
    x'_tf = r_t + c_f - m

the best approximation of the tile, in least squares, by a function of the token plus a function of the channel
(two-way analysis of variance without interaction). T + F bf16 values stand for T * F, 16 (1/T + 1/F) bits a value.

Source: method `BlockRowColMean` of the repository XudongOliverShen/decentralized-inference-exp, reproduced from its
published description and sizes. A tile mixes tokens (of one row of the batch), so this is not causal. Tiles at the
end of a sequence or at the last channels are smaller, but take the bytes of full ones, as there.

`channel_order` reorders channels before tiling, so that channels which behave alike share tiles: a list of all H
indices, which both ends take from the config.

A NaN or an infinity makes its tile NaN. Side information: none besides the means.
Payload: row means [B, T tiles, F tiles, T] and column means [B, T tiles, F tiles, F], bf16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from compressors.base import Compressor, CorruptPayload, LinkInfo, Payload
from compressors.bitpack import Section, sections_nbytes, split_bytes
from compressors.cast import saturating_cast
from compressors.channels import check_channels
from compressors.options import check_int, option_error
from compressors.rows import Scratch

__all__ = ["BlockRowColMean"]


class BlockRowColMean(Compressor):
    """Row and column means of tiles of `block_tokens` x `block_channels`."""

    name = "block_rowcol_mean"
    causal = False
    fixed_size = True

    def __init__(
        self,
        *,
        block_tokens: int,
        block_channels: int,
        channel_order: Sequence[int] | None = None,
        link: LinkInfo | None = None,
    ) -> None:
        super().__init__(link=link)
        self.block_tokens = check_int(self.name, "block_tokens", block_tokens, 2, 65536)
        self.block_channels = check_int(self.name, "block_channels", block_channels, 2, 65536)
        self.channel_order = None
        if channel_order is not None:
            self.channel_order = check_channels(self.name, "channel_order", channel_order, link)
            if sorted(self.channel_order) != list(range(link.hidden_size if link else len(channel_order))):
                raise option_error(self.name, "channel_order", channel_order, "every channel once")
        self._scratch = Scratch()

    def _sections(self, shape: Sequence[int]) -> list[Section]:
        num_tokens, width = shape[-2:]
        tiles = (*shape[:-2], -(-num_tokens // self.block_tokens), -(-width // self.block_channels))
        return [(torch.bfloat16, (*tiles, n)) for n in (self.block_tokens, self.block_channels)]

    def max_nbytes(self, shape: Sequence[int]) -> int:
        return sections_nbytes(*self._sections(shape))

    @torch.no_grad()
    def compress(self, x: torch.Tensor, **side: Any) -> Payload:
        data = self._scratch.get("data", (self.max_nbytes(x.shape),), torch.uint8, x.device)
        row_means, column_means = split_bytes(data, *self._sections(x.shape))
        if x.numel():
            order = self._order(x.shape[-1], x.device)
            tiles = self._tiles(x.float() if order is None else x[..., order].float())
            inside = self._tiles(torch.ones_like(x[:1], dtype=torch.float32))
            # weights first: a sum of finite values could overflow
            row_means.copy_(saturating_cast((tiles * _weights(inside, -1)).sum(-1), torch.bfloat16))
            column_means.copy_(saturating_cast((tiles * _weights(inside, -2)).sum(-2), torch.bfloat16))
        return Payload(data, tuple(x.shape))

    @torch.no_grad()
    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        if payload.meta:
            raise CorruptPayload(f"{self.name} writes no meta, got {dict(payload.meta)}")
        shape = payload.shape
        sections = split_bytes(payload.data.to(device), *self._sections(shape))
        row_means, column_means = (section.float() for section in sections)
        num_tokens, width = shape[-2:]
        ends = (torch.arange(row_means.shape[-3] * self.block_tokens, device=device) < num_tokens).float()
        inside = ends.view(-1, 1, self.block_tokens)
        grand_mean = (row_means * _weights(inside, -1)).sum(-1)
        tiles = (row_means - grand_mean[..., None])[..., None] + column_means[..., None, :]
        limit = torch.finfo(dtype).max
        padded = tiles.clamp_(-limit, limit).to(dtype).transpose(-3, -2).flatten(-2).flatten(-3, -2)
        values = padded[..., :num_tokens, :width]
        order = self._order(width, device)
        return values.contiguous() if order is None else torch.empty_like(values).index_copy_(-1, order, values)

    def _order(self, width: int, device: torch.device) -> torch.Tensor | None:
        if self.channel_order is None:
            return None
        if len(self.channel_order) != width:
            raise option_error(self.name, "channel_order", self.channel_order, f"{width} channels for this width")
        return torch.tensor(self.channel_order, device=device)

    def _tiles(self, x: torch.Tensor) -> torch.Tensor:
        """[..., T, H] as [..., T tiles, F tiles, block_tokens, block_channels], filled up with zeros."""
        fill_tokens, fill_channels = -x.shape[-2] % self.block_tokens, -x.shape[-1] % self.block_channels
        x = torch.nn.functional.pad(x, (0, fill_channels, 0, fill_tokens))
        x = x.unflatten(-1, (-1, self.block_channels)).unflatten(-3, (-1, self.block_tokens))
        return x.transpose(-3, -2)


def _weights(inside: torch.Tensor, dim: int) -> torch.Tensor:
    """Weights that make a sum along `dim` the mean of the values inside; 0 where none is."""
    return inside / inside.sum(dim, keepdim=True).clamp_(min=1)
