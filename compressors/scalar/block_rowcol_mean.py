"""block_rowcol_mean: tiles of T tokens x F channels, each replaced by its row means and column means.

    r_t = mean over the tile's channels, c_f = mean over its tokens, m = mean of the r_t
    x'_tf = r_t + c_f - m

the best approximation of the tile, in least squares, by a function of the token plus a function of the
channel (two-way analysis of variance without interaction). T + F bf16 values stand for T * F, 16 (1/T + 1/F)
bits a value.

Source: method `BlockRowColMean` of the repository XudongOliverShen/decentralized-inference-exp, reproduced
from its published description and sizes. A tile mixes tokens (of one row of the batch), so this is not
causal. Tiles at the end of a sequence or at the last channels are smaller, but take the bytes of full ones,
as there.

`channel_order` reorders channels before tiling, so that channels which behave alike share tiles: a list of
all H indices, which both ends take from the config.

A NaN or an infinity makes its tile NaN. Side information: none besides the means.

Payload: row means [B, tokens, F tiles] and column means [B, T tiles, channels], bf16, with tokens and
channels filled up to whole tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compressors.base import Compressor, LinkInfo, Payload
from compressors.bitpack import Section, sections_nbytes, split_bytes
from compressors.channels import check_channels
from compressors.options import check_int, option_error
from compressors.rows import Scratch
from compressors.saturation import saturating_copy_

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
        num_blocks, num_groups = -(-num_tokens // self.block_tokens), -(-width // self.block_channels)
        row_means = (*shape[:-2], num_blocks * self.block_tokens, num_groups)
        column_means = (*shape[:-2], num_blocks, num_groups * self.block_channels)
        return [(torch.bfloat16, row_means), (torch.bfloat16, column_means)]

    def max_nbytes(self, shape: Sequence[int]) -> int:
        return sections_nbytes(*self._sections(shape))

    @torch.no_grad()
    def compress(self, x: torch.Tensor, **side: Any) -> Payload:
        data = self._scratch.get("data", (self.max_nbytes(x.shape),), torch.uint8, x.device)
        row_means, column_means = split_bytes(data, *self._sections(x.shape))
        order = self._order(x.shape[-1], x.device)
        values = x.float() if order is None else x[..., order].float()
        # weights first: a sum of finite values could overflow
        fill = (0, -x.shape[-1] % self.block_channels, 0, -x.shape[-2] % self.block_tokens)
        by_channel = values * _weights(x.shape[-1], self.block_channels, x.device)
        by_channel = torch.nn.functional.pad(by_channel, fill).unflatten(-1, (-1, self.block_channels))
        saturating_copy_(row_means, by_channel.sum(-1))
        by_token = values * _weights(x.shape[-2], self.block_tokens, x.device)[:, None]
        by_token = torch.nn.functional.pad(by_token, fill).unflatten(-2, (column_means.shape[-2], self.block_tokens))
        saturating_copy_(column_means, by_token.sum(-2))
        return Payload(data, tuple(x.shape))

    @torch.no_grad()
    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype, **side: Any) -> torch.Tensor:
        num_tokens, width = payload.shape[-2:]
        sections = split_bytes(self._data_without_meta(payload).to(device), *self._sections(payload.shape))
        row_means, column_means = (section.float() for section in sections)
        row_means = row_means.unflatten(-2, (column_means.shape[-2], self.block_tokens))
        weights = _weights(num_tokens, self.block_tokens, device)
        weights = torch.nn.functional.pad(weights, (0, -num_tokens % self.block_tokens))
        grand_mean = (row_means * weights.view(-1, self.block_tokens, 1)).sum(-2, keepdim=True)
        columns = column_means.unflatten(-1, (row_means.shape[-1], self.block_channels)).unsqueeze(-3)
        limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        tiles = (row_means - grand_mean)[..., None].add(columns).clamp_(-limit, limit)
        values = tiles.to(dtype).flatten(-2).flatten(-3, -2)[..., :num_tokens, :width].contiguous()
        order = self._order(width, device)
        return values if order is None else torch.empty_like(values).index_copy_(-1, order, values)

    def _order(self, width: int, device: torch.device) -> torch.Tensor | None:
        if self.channel_order is None:
            return None
        if len(self.channel_order) != width:
            raise option_error(self.name, "channel_order", self.channel_order, f"{width} channels for this width")
        return self._scratch.constant("order", torch.tensor(self.channel_order), device)


def _weights(length: int, block: int, device: torch.device) -> torch.Tensor:
    """[length]: 1 over the size of the block that an element is in; the last block may be smaller."""
    starts = torch.arange(length, device=device) // block * block
    return 1.0 / (length - starts).clamp_(max=block)
