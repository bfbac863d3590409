"""What a stage's weights take once loaded, and which layers cost the same: from the config alone, no file is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from pipeline.models.blocks.modules import BlockLinear
from pipeline.models.families import FAMILIES, cut_config
from pipeline.models.loading import WeightFormat, class_of_stage, config_of_stage
from pipeline.models.matrix_types import matrix_nbytes, matrix_types
from pipeline.partition.plan import StagePlan

__all__ = ["StageWeights", "embedding_bytes", "layer_kinds", "stage_parameter_bytes", "stage_weights"]


@dataclass(frozen=True)
class StageWeights:
    """`nbytes` of all weights; `active` is how many weights a token is multiplied by, `active_bytes` what they take.

    Of experts, that is the share that a token is sent to; an embedding, which is looked up, has none.
    """

    nbytes: int
    active: float
    active_bytes: float


def stage_weights(config: PretrainedConfig, stage: StagePlan, weights: WeightFormat) -> StageWeights:
    """A stage's weights once loaded, from the config alone.

    Matrices held as blocks (`matrix_types`) take these. Linear layers that bitsandbytes quantises take 1 byte a weight
    and 4 a row (8 bits), or half a byte and 4 per block of 64 (4 bits). A tied head on the embedding's node costs
    nothing; `stage` decides only about itself, so a caller that holds both ends subtracts one of the two.
    """
    family = FAMILIES[config.model_type]
    model_class, _ = class_of_stage(config, family, stage, stage.is_last)
    with torch.device("meta"):
        model = model_class(config_of_stage(config, stage, is_tied=config.tie_word_embeddings)).to(weights.dtype)
    linear_weights = {
        id(module.weight)
        for layer in model.base_model.layers
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    }
    head = model.get_output_embeddings() if stage.is_last else None
    looked_up = {id(p) for p in model.get_input_embeddings().parameters()} - {
        id(p) for p in (head.parameters() if head is not None else ())
    }
    total, active, active_bytes = 0, 0.0, 0.0
    for module in model.block_modules.values():
        nbytes = matrix_nbytes(module.shape, module.type_name)
        if isinstance(module, BlockLinear):
            active += module.shape[0] * module.shape[1]
            active_bytes += nbytes
        is_repeated = module is head and stage.is_first and config.tie_word_embeddings
        total += 0 if is_repeated else nbytes
    for parameter in {id(p): p for p in model.parameters()}.values():
        if id(parameter) not in linear_weights or weights.linear_bits is None:
            nbytes = parameter.numel() * weights.dtype.itemsize
        elif weights.linear_bits == 8:
            nbytes = parameter.numel() + 4 * parameter.shape[0]
        else:
            nbytes = parameter.numel() // 2 + 4 * -(-parameter.numel() // 64)
        total += nbytes
        if id(parameter) not in looked_up:
            share = _expert_share(config) if parameter.dim() == 3 else 1.0
            active += share * parameter.numel()
            active_bytes += share * nbytes
    return StageWeights(total, active, active_bytes)


def _expert_share(config: PretrainedConfig) -> float:
    """Of a layer's experts, whose weights are one tensor [experts, ...], the share that a token is sent to."""
    num_experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return config.num_experts_per_tok / num_experts if num_experts else 1.0


def stage_parameter_bytes(config: PretrainedConfig, stage: StagePlan, weights: WeightFormat) -> int:
    """Bytes of `stage_weights`."""
    return stage_weights(config, stage, weights).nbytes


def layer_kinds(config: PretrainedConfig) -> list[int]:
    """For every layer the first one that has its shape and attention, and so its cost."""
    first: dict[str, int] = {}
    return [
        first.setdefault(cut_config(config, index, index + 1).to_json_string(use_diff=False), index)
        for index in range(config.num_hidden_layers)
    ]


def embedding_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the embedding matrix, which a tied head on another node repeats."""
    type_name = matrix_types(config)["embedding"]
    if type_name is not None:
        return matrix_nbytes((config.vocab_size, config.hidden_size), type_name)
    return config.vocab_size * config.hidden_size * dtype.itemsize
