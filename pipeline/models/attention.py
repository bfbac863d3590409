"""Attention functions of our own, which a stage's decoder runs on for one forward: weights read, keys in slots.

**Reading.** A fused kernel never forms the weights, and switching a layer to the eager kernel would take its mask
away. `READABLE_SDPA` therefore has sdpa's own masks, returns exactly what sdpa returns and then lets a reader recompute
what it wants from the same queries, keys and mask, a few query rows at a time:

    A_hij = softmax_j(scaling * <q_hi, k_hj> + mask_ij)

in float32, at most `MAX_CHUNK_NBYTES` at once (or one row). Left out: caches (queries and keys have one length),
kernels with logit soft-capping or position biases, gradients.

**Slots.** `SLOTS` writes the keys and values of a pass into a `SlotCache` and attends row by row over what each slot
holds: no copies, no padding, and no masks where a row has one token. A row's result does not depend on the other rows.
transformers makes no masks for an attention function that is not in AttentionMaskInterface; which layers have a sliding
window, or cap their logits, they say themselves with each call. What a layer says and this module does not know is an
error. Left out: weights to read, gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.models.cache import SlotPass

__all__ = [
    "READABLE_SDPA",
    "SLOTS",
    "Attention",
    "AttentionError",
    "AttentionReader",
    "attention_function",
    "check_readable",
    "check_slots",
]

READABLE_SDPA = "thinwire_sdpa"
SLOTS = "thinwire_slots"
MAX_CHUNK_NBYTES = 8 * 2**20


class AttentionError(ValueError):
    """Attention that cannot be read, or computed over slots, for this model."""


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
    module: Any,
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


def _over_slots(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    slots: SlotPass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    position_ids: torch.Tensor | None = None,
    use_cache: bool = False,
    **unknown: Any,
) -> tuple[torch.Tensor, None]:
    """Attention [B, T, heads, D] of a pass; `slots` comes down from the decoder's keyword arguments.

    `position_ids` are those of `slots`, and in queries and keys already; `use_cache` is about transformers' own.
    """
    refused = [name for name, value in unknown.items() if value is not None]
    refused += ["attention_mask"] * (attention_mask is not None) + ["dropout"] * (dropout != 0)
    refused += ["is_causal=False"] * (not module.is_causal)
    if refused:
        raise AttentionError(f"{type(module).__name__} asks for {', '.join(refused)}, unknown to attention over slots")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is None:
        own = slots.attend_one_token(module.layer_idx, (query, key, value), sliding_window, scaling)
        if own is not None:
            return own.transpose(1, 2), None
    slots.write(module.layer_idx, key, value)
    attend = scaled_dot_product_attention if softcap is None else partial(_soft_capped, softcap=softcap)
    batch, num_heads, num_tokens, head_dim = query.shape
    num_shared = num_heads // key.shape[1]
    outputs = []
    for row, queries in enumerate(query.split(1)):
        keys, values = slots.seen(module.layer_idx, row, sliding_window)
        if num_tokens == 1:
            # Queries that share a head of keys are the rows of one product.
            queries = queries.reshape(1, -1, num_shared, head_dim)
            output = attend(queries, keys, values, scale=scaling)
        else:
            # Heads of keys become the batch, so that repeating them is a view.
            queries = queries.view(-1, num_shared, num_tokens, head_dim)
            keys, values = (part.transpose(0, 1).expand(-1, num_shared, -1, -1) for part in (keys, values))
            mask = slots.mask(row, sliding_window)
            output = attend(queries, keys, values, attn_mask=mask, is_causal=mask is None, scale=scaling)
        outputs.append(output.reshape(1, num_heads, num_tokens, head_dim))
    output = outputs[0] if batch == 1 else torch.cat(outputs)
    return output.transpose(1, 2).contiguous(), None


def _soft_capped(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    softcap: float,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` with scores capped at +-`softcap`, computed as transformers' eager kernels do."""
    scores = torch.tanh(query @ keys.mT * scale / softcap) * softcap
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill_(later, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights.to(query.dtype) @ values


@contextmanager
def attention_function(decoder: PreTrainedModel, name: str) -> Iterator[None]:
    """Let `decoder` run on `READABLE_SDPA` or `SLOTS`, for which it has been checked, and then as before."""
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = name
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


def check_readable(decoder: PreTrainedModel) -> None:
    """Raise AttentionError unless `decoder` runs on sdpa, so that it can run on `READABLE_SDPA`."""
    kernel = decoder.config._attn_implementation
    if kernel != "sdpa" or not decoder._can_set_attn_implementation():
        raise AttentionError(f"attention of {type(decoder).__name__} runs on {kernel}; only that of sdpa can be read")


def check_slots(decoder: PreTrainedModel, max_length: int) -> None:
    """Raise AttentionError unless `decoder` can run on `SLOTS` with sequences of up to `max_length` positions."""
    name, config = type(decoder).__name__, decoder.config
    if not decoder._can_set_attn_implementation():
        raise AttentionError(f"{name} has attention of its own, which cannot be computed over slots")
    rope = getattr(config, "rope_parameters", None) or {}
    for part in [value for value in rope.values() if isinstance(value, dict)] or [rope]:
        kind, longest = part.get("rope_type"), None
        if kind == "longrope":
            longest = part["original_max_position_embeddings"]
        elif kind == "dynamic":
            longest = config.max_position_embeddings
        if longest is not None and max_length > longest:
            # Beyond it all angles are others, those of the keys that are cached already too.
            raise AttentionError(
                f"{name} has rotary angles that depend on a sequence's length beyond {longest} positions (rope_type "
                f"{kind!r}), so slots of {max_length} positions cannot keep its keys; take slots of at most {longest}"
            )


AttentionInterface.register(READABLE_SDPA, _sdpa)
AttentionMaskInterface.register(READABLE_SDPA, sdpa_mask)
AttentionInterface.register(SLOTS, _over_slots)
