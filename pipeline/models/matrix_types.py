"""Which matrices of a model are held as blocks, and of which type: `matrix_types` of its config.

A model's config carries it as transformers' quantised models carry their `quantization_config`, so that what reckons
with sizes needs no file: `{"layers": [{name: type} of each layer], "embedding": type, "head": type}`, with names as
checkpoints have them behind the layer's number, None for an embedding or head that is no blocks, and None in the place
of all where nothing is. `families.cut_config` cuts it with the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pipeline.config.schema import ModelConfig
from pipeline.models.blocks.layouts import LAYOUTS
from pipeline.models.checkpoint import Checkpoint, ModelError
from pipeline.models.families import has_experts
from pipeline.models.model_config import first_layer
from pipeline.models.processor import has_fused_multiply_add

__all__ = [
    "MADE_AT_LOAD",
    "choose_matrix_types",
    "matrix_nbytes",
    "matrix_types",
    "stored_types",
    "types_label",
    "types_or_none",
]

MADE_AT_LOAD = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_1"}  # by `model.weights`


def choose_matrix_types(
    model: ModelConfig, config: Any, stored: Callable[[], dict[str, Any] | None], *, on_cpu: bool
) -> dict[str, Any] | None:
    """What `model.weights` comes to for a model of this config; `stored` gives the types of the checkpoint's own blocks
    and is called only where these count.

    Raises ModelError where blocks are asked for and cannot be had: on a GPU, for experts, for rows that are too short.
    """
    wanted = model.weights
    if wanted == "fp32" or model.dtype != "fp32" or model.load_in_8bit or model.load_in_4bit:
        return None
    if wanted == "auto":
        return None if has_experts(config) or not on_cpu or not has_fused_multiply_add() else stored()
    if not on_cpu:
        raise ModelError(
            f"model.weights is {wanted}, which is for CPUs, and a node computes on a GPU; take model.load_in_8bit, "
            "load_in_4bit or model.dtype there"
        )
    if has_experts(config):
        raise ModelError(
            f"model.weights is {wanted}, but models of type {config.model_type!r} have experts, whose weights are held "
            "as they are loaded; leave it out"
        )
    types = _made_types(config, MADE_AT_LOAD[wanted])
    if types is None:
        raise ModelError(
            f"model.weights is {wanted}, but no matrix of this model has rows of whole blocks of "
            f"{LAYOUTS[MADE_AT_LOAD[wanted]].num_weights} weights; leave it out"
        )
    return types


def stored_types(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Of the blocks that lie beside a checkpoint."""
    layers = [{name: t.block_type for name, t in layer.items() if t.block_type} for layer in checkpoint.layers]
    return types_or_none(layers, checkpoint.embedding.block_type, checkpoint.head.block_type)


def types_or_none(layers: list[dict[str, str]], embedding: str | None, head: str | None) -> dict[str, Any] | None:
    """As a config has them: None where nothing is blocks."""
    return {"layers": layers, "embedding": embedding, "head": head} if any(layers) or embedding or head else None


def _made_types(config: Any, type_name: str) -> dict[str, Any] | None:
    """One type for all matrices whose rows are whole blocks."""
    model, layout = first_layer(config), LAYOUTS[type_name]
    names = [
        f"{name}.weight"
        for name, module in model.base_model.layers[0].named_modules()
        if type(module) is nn.Linear and module.in_features % layout.num_weights == 0
    ]
    end = type_name if config.hidden_size % layout.num_weights == 0 else None
    return types_or_none([dict.fromkeys(names, type_name) for _ in range(config.num_hidden_layers)], end, end)


def matrix_types(config: Any) -> dict[str, Any]:
    """Of a model's or a stage's config."""
    return getattr(config, "matrix_types", None) or {
        "layers": [{}] * config.num_hidden_layers,
        "embedding": None,
        "head": None,
    }


def types_label(config: Any) -> str | None:
    """The types of blocks in words, `Q4_1, Q8_0`; None where weights are in `model.dtype` or bitsandbytes'."""
    types = matrix_types(config)
    found = {type_name for layer in types["layers"] for type_name in layer.values()}
    found |= {types["embedding"], types["head"]} - {None}
    return ", ".join(sorted(found)) or None


def matrix_nbytes(shape: tuple[int, int], type_name: str) -> int:
    """Of a matrix held as blocks."""
    return shape[0] * LAYOUTS[type_name].row_nbytes(shape[1])
