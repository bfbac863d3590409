"""Modules of blocks in the places of a model's own."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from pipeline.models.blocks.layouts import LAYOUTS
from pipeline.models.blocks.modules import BlockEmbedding, BlockLinear, BlockModule, join
from pipeline.models.blocks.products import compile_products
from pipeline.models.checkpoint import ModelError

__all__ = ["place_blocks", "prepare_blocks"]

# Linear layers of one parent that transformers' families give the same input, one after the other.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def place_blocks(model: nn.Module, types: Mapping[str, str]) -> dict[str, BlockModule]:
    """Put modules of blocks in the places of linear layers and embeddings, by name of their weight.

    `types` are the blocks' types by the same names. Returns what was placed. Raises ModelError for what is neither, or
    of a class that does more than an `nn.Linear` or an `nn.Embedding`, and for rows that are no whole blocks.
    """
    placed: dict[str, BlockModule] = {}
    for name, type_name in types.items():
        path = name.removesuffix(".weight")
        parent_path, _, attribute = path.rpartition(".")
        parent, module = model.get_submodule(parent_path), model.get_submodule(path)
        block = _block_of(module, type_name)
        if block is None:
            raise ModelError(f"{name} has blocks of {type_name}, which a {type(module).__name__} cannot be held as")
        try:
            LAYOUTS[type_name].row_nbytes(block.shape[1])
        except ValueError as error:
            raise ModelError(f"{name}: {error}") from error
        setattr(parent, attribute, block)
        placed[name] = block
    return placed


def prepare_blocks(model: nn.Module) -> None:
    """Once blocks are read: compile products with them, and let linear layers with one input multiply together."""
    for type_name in {module.type_name for module in model.modules() if isinstance(module, BlockModule)}:
        compile_products(type_name)
    for module in list(model.modules()):
        for names in _SAME_INPUT:
            by_type: dict[str, list[BlockLinear]] = {}
            for linear in (getattr(module, name, None) for name in names):
                if isinstance(linear, BlockLinear):
                    by_type.setdefault(linear.type_name, []).append(linear)
            for linears in by_type.values():
                if len(linears) > 1:
                    join(linears)


def _block_of(module: nn.Module, type_name: str) -> BlockModule | None:
    if type(module) is nn.Linear:
        shape = (module.out_features, module.in_features)
        return BlockLinear(shape, type_name, has_bias=module.bias is not None)
    # Gemma 3's scales what it looks up, Gemma's and Gemma 2's models do that themselves.
    scale = getattr(module, "scalar_embed_scale", None)
    if type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and scale is not None):
        return BlockEmbedding((module.num_embeddings, module.embedding_dim), type_name, scale=scale)
    return None
