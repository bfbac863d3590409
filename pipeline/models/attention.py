"""Attention weights of chosen layers, read beside transformers' sdpa kernel without changing what it computes.

A fused kernel never forms the weights, and switching a layer to the eager kernel would take its mask away. This
module therefore registers an attention function, with sdpa's own masks, that returns exactly what sdpa returns and
then lets a reader recompute what it wants from the same queries, keys and mask, a few query rows at a time:

    A_hij = softmax_j(scaling * <q_hi, k_hj> + mask_ij)

in float32, at most `MAX_CHUNK_NBYTES` at once (or one row). A stage switches to it when a reader first asks. Left
out: caches (queries and keys have one length), kernels with logit soft-capping or position biases, gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

__all__ = ["READABLE_SDPA", "Attention", "AttentionError", "AttentionReader", "make_readable"]

READABLE_SDPA = "thinwire_sdpa"
MAX_CHUNK_NBYTES = 8 * 2**20


class AttentionError(ValueError):
    """Attention weights that cannot be read from this kernel."""


@dataclass(frozen=True)
class Attention:
    """One layer's attention, not computed yet.

    `query` [B, heads, T, D], `key` [B, heads / n, T, D] where n query heads share a key head; `mask` [B or 1, heads or
    1, T, T] is boolean (True: seen), additive, or None for plain causal attention.
    """

    query: torch.Tensor
    key: torch.Tensor
    mask: torch.Tensor | None
    scaling: float

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, heads, T)."""
        batch, heads, num_tokens, _ = self.query.shape
        return batch, heads, num_tokens

    def rows_seeing(self) -> torch.Tensor:
        """How many rows see each token, [B or 1, T]: T - j without a sliding window. Heads see alike."""
        num_tokens = self.query.shape[2]
        if self.mask is None:
            return torch.arange(num_tokens, 0, -1, device=self.query.device)[None]
        seen = self.mask if self.mask.dtype == torch.bool else self.mask > torch.finfo(self.mask.dtype).min / 2
        return seen[:, 0].sum(-2)

    @torch.no_grad()
    def chunks(self, first_row: int = 0) -> Iterator[tuple[int, torch.Tensor]]:
        """(i, weights float32 [B, heads, rows, keys]) for rows i, i + 1, ... from `first_row` to T.

        Only the first `keys` <= T columns are formed; the weights of later ones are 0 in all these rows.
        """
        batch, heads, num_tokens = self.shape
        step = max(1, MAX_CHUNK_NBYTES // (4 * max(batch * heads * num_tokens, 1)))
        shared = heads // self.key.shape[1]
        keys = self.key.float().mT
        for start in range(first_row, num_tokens, step):
            end = min(start + step, num_tokens)
            num_keys = end if self.mask is None else num_tokens
            query = self.query[:, :, start:end].float() * self.scaling
            # Query heads that share a key head stand behind one another, so that keys are not repeated.
            grouped = query.reshape(batch, heads // shared, shared * (end - start), -1)
            scores = (grouped @ keys[..., :num_keys]).view(batch, heads, end - start, num_keys)
            if self.mask is None:
                rows = torch.arange(start, end, device=scores.device)
                scores.masked_fill_(torch.arange(num_keys, device=scores.device) > rows[:, None], -torch.inf)
            elif self.mask.dtype == torch.bool:
                scores.masked_fill_(~self.mask[..., start:end, :], -torch.inf)
            else:
                scores += self.mask[..., start:end, :]
            yield start, scores.softmax(-1)


# Called with the layer's index within its stage, while the layer is being computed.
AttentionReader = Callable[[int, Attention], None]


def _sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attention_reader: AttentionReader | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa; `attention_reader` comes down from the decoder's keyword arguments."""
    output = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if attention_reader is not None:
        if kwargs.get("position_bias") is not None or key.shape[2] != query.shape[2]:
            raise AttentionError("attention with position biases or a cache cannot be read")
        if attention_mask is None and not (kwargs.get("is_causal") or module.is_causal):
            raise AttentionError("attention that is not causal cannot be read")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        attention_reader(module.layer_idx, Attention(query, key, attention_mask, scaling))
    return output


def make_readable(decoder: PreTrainedModel) -> None:
    """Let `decoder` take `attention_reader=` in its forward. Raises AttentionError unless it runs on sdpa."""
    kernel = decoder.config._attn_implementation
    if kernel == READABLE_SDPA:
        return
    if kernel != "sdpa" or not decoder._can_set_attn_implementation():
        raise AttentionError(f"attention of {type(decoder).__name__} runs on {kernel}; only that of sdpa can be read")
    decoder.set_attn_implementation(READABLE_SDPA)


AttentionInterface.register(READABLE_SDPA, _sdpa)
AttentionMaskInterface.register(READABLE_SDPA, sdpa_mask)
