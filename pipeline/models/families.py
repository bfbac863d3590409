"""What each model family needs beside Hugging Face's own classes to be cut into stages: one row per model type.

The only table of its kind; a type that is not here is refused. A new row needs the equality tests of
tests/unit/test_hf_model.py, which run for every row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["FAMILIES", "TELLING_FIELDS", "Family", "RelevanceParts", "cut_config", "has_experts"]


@dataclass(frozen=True, kw_only=True)
class RelevanceParts:
    """Names of a decoder layer's parts; gradient factors of a projection's query, key and value dimensions in turn."""

    attention: str = "self_attn"
    projections: Mapping[str, tuple[float, ...]]
    heads_out: str = "o_proj"
    activation: str = "act_fn"
    gated_out: str | None = "down_proj"  # what takes gate times up, where there is a gate


# Cuts the fields of a config that depend on the layer to layers [start, end), in place.
CutFields = Callable[[Any, int, int], None]


def _cut_layer_types(config: Any, start: int, end: int) -> None:
    config.layer_types = list(config.layer_types[start:end])


def _cut_dense_layers(config: Any, start: int, end: int) -> None:
    """Which layers have no experts follows from their index, their list and a step; afterwards from the list alone."""
    dense = [
        layer - start
        for layer in range(start, end)
        if layer in config.mlp_only_layers or config.num_experts == 0 or (layer + 1) % config.decoder_sparse_step
    ]
    config.mlp_only_layers, config.decoder_sparse_step = dense, 1


@dataclass(frozen=True, kw_only=True)
class Family:
    """Names in the module tree and in checkpoints, and what depends on a layer's index or comes behind the head.

    `stored_heads` are the names that the head's weight has in checkpoints, `harmless` regular expressions of stored
    tensors that the model makes itself. `reads` are those of `TELLING_FIELDS` that the model reads; where some depend
    on the layer, `cut_fields` cuts them. `caps_logits`: the model applies `final_logit_softcapping`.
    """

    decoder: str = "model"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    stored_heads: tuple[str, ...] = ("lm_head.weight",)
    harmless: tuple[str, ...] = (r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$",)
    reads: tuple[str, ...] = ()
    cut_fields: CutFields | None = None
    caps_logits: bool = False
    relevance: RelevanceParts | None = None


_GATED = RelevanceParts(projections={"q_proj": (1 / 4,), "k_proj": (1 / 4,), "v_proj": (1 / 2,)})

FAMILIES: dict[str, Family] = {
    "llama": Family(relevance=_GATED),
    "qwen2": Family(reads=("layer_types",), cut_fields=_cut_layer_types, relevance=_GATED),
    "qwen3": Family(reads=("layer_types",), cut_fields=_cut_layer_types, relevance=_GATED),
    "gemma3_text": Family(
        reads=("layer_types", "final_logit_softcapping"), cut_fields=_cut_layer_types, caps_logits=True
    ),
    "gpt_neox": Family(
        decoder="gpt_neox",
        embedding="embed_in",
        norm="final_layer_norm",
        stored_heads=("lm_head.weight", "embed_out.weight"),
        harmless=(r"\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
        relevance=RelevanceParts(
            attention="attention",
            projections={"query_key_value": (1 / 4, 1 / 4, 1 / 2)},
            heads_out="dense",
            activation="act",
            gated_out=None,
        ),
    ),
    "gemma": Family(),
    "gemma2": Family(
        reads=("layer_types", "final_logit_softcapping", "attn_logit_softcapping"),
        cut_fields=_cut_layer_types,
        caps_logits=True,
    ),
    "mistral": Family(),
    "mixtral": Family(),
    "olmo2": Family(),
    "phi3": Family(),
    "qwen3_moe": Family(reads=("mlp_only_layers", "decoder_sparse_step"), cut_fields=_cut_dense_layers),
    "starcoder2": Family(),
}

# Fields that change what some model type computes, by layer or in all. A config may have one that its own type does
# not read.
TELLING_FIELDS = (
    *("layer_types", "mlp_layer_types", "mlp_only_layers", "decoder_sparse_step", "first_k_dense_replace"),
    *("moe_layer_freq", "no_rope_layers", "no_rope_layer_interval", "num_kv_shared_layers", "attn_layer_period"),
    *("global_attn_every_n_layers", "attention_layers", "full_attn_idxs", "scale_attn_by_inverse_layer_idx"),
    *("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling", "embedding_multiplier"),
    *("residual_multiplier", "attention_multiplier", "scale_emb", "scale_depth", "dim_model_base", "clip_qkv"),
    *("rope_interleaved", "qk_layernorm", "use_qk_norm"),
)


def has_experts(config: Any) -> bool:
    """Whether layers have experts, whose weights transformers keeps in one parameter of three dimensions."""
    return any(getattr(config, key, None) for key in ("num_experts", "num_local_experts"))


def cut_config(config: Any, start: int, end: int) -> Any:
    """A copy of a config of one of `FAMILIES`, cut to layers [start, end)."""
    family, cut = FAMILIES[config.model_type], copy.deepcopy(config)
    if family.cut_fields is not None:
        family.cut_fields(cut, start, end)
    elif getattr(cut, "layer_types", None) is not None:
        _cut_layer_types(cut, start, end)  # not read, but its length is checked
    if getattr(cut, "matrix_types", None) is not None:
        cut.matrix_types["layers"] = cut.matrix_types["layers"][start:end]
    cut.num_hidden_layers = end - start
    cut.use_cache = False
    return cut
