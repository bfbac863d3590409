"""One stage of a Hugging Face causal LM: build it and load its own tensors, nothing else.

With `model_config`, what knows transformers' insides. A stage is the checkpoint's own model class with a config of
fewer layers; embedding, final norm and head become identities where they belong to another stage. Hugging Face's
forward therefore makes the masks and positions, and a stage computes what the whole model would, bit for bit. Weights
are read in parts of a few MiB, cast to the run's dtype; file and mapping are gone before the next part is read, so that
a rank never holds more than its own share.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pipeline.config.schema import ModelConfig
from pipeline.models.attention import check_readable
from pipeline.models.blocks.modules import BlockEmbedding, BlockLinear
from pipeline.models.blocks.placing import place_blocks, prepare_blocks
from pipeline.models.blocks.storage import block_types, random_matrix, read_matrix
from pipeline.models.checkpoint import Checkpoint, ModelError, StoredTensor, read_checkpoint, unused_tensor
from pipeline.models.families import FAMILIES, Family, cut_config
from pipeline.models.matrix_types import matrix_types, types_label
from pipeline.models.model_config import first_layer
from pipeline.models.norms import fuse_norms
from pipeline.partition.plan import StagePlan

__all__ = [
    "TORCH_DTYPES",
    "Head",
    "ModelError",
    "StageModel",
    "WeightFormat",
    "bitsandbytes_config",
    "check_attention_readable",
    "class_of_stage",
    "config_of_stage",
    "load_stage",
    "random_stage",
]

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True, eq=False)
class Head:
    """Hidden states [..., H] to logits [..., V]: the model's own projection, then the cap of `_soft_capped`, if any."""

    projection: Callable[[torch.Tensor], torch.Tensor]
    softcap: float | None

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits = self.projection(hidden_states)
        return logits if self.softcap is None else _soft_capped(logits, self.softcap)

    def cut(self, token_ids: torch.Tensor) -> Head | None:
        """The head of some tokens alone, int64 [K], to logits [..., K], with a copy of their weights.

        None where the projection is of a kind whose rows cannot be taken (quantised).
        """
        projection = self.projection
        bias: torch.Tensor | None = None
        if isinstance(projection, functools.partial):
            weight = projection.keywords["weight"]
            rows = weight[token_ids.to(weight.device)]
        elif isinstance(projection, BlockLinear):
            rows, bias = projection.matrix.rows(token_ids), projection.bias
        elif type(projection) is nn.Linear:
            rows, bias = projection.weight[token_ids.to(projection.weight.device)], projection.bias
        else:
            return None
        bias = None if bias is None else bias[token_ids.to(bias.device)]
        return Head(functools.partial(nn.functional.linear, weight=rows, bias=bias), self.softcap)


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """How weights are held.

    `dtype` is that of hidden states and of all weights that are not quantised. `linear_bits` are bitsandbytes' bits of
    the layers' linear weights, None where these are not quantised either; `outlier_threshold` is of 8 bits
    (`model.load_in_8bit_threshold`).
    """

    dtype: torch.dtype
    linear_bits: Literal[4, 8] | None = None
    outlier_threshold: float = ModelConfig.load_in_8bit_threshold

    @classmethod
    def from_config(cls, model: ModelConfig) -> Self:
        return cls(
            dtype=TORCH_DTYPES[model.dtype],
            linear_bits=8 if model.load_in_8bit else 4 if model.load_in_4bit else None,
            outlier_threshold=model.load_in_8bit_threshold,
        )

    @property
    def mixes_tokens(self) -> bool:
        """Whether 8-bit weights choose their outlier channels over all tokens of a pass, later ones included."""
        return self.linear_bits == 8 and self.outlier_threshold > 0


@dataclass(frozen=True)
class StageModel:
    """Modules of one loaded stage.

    `decoder` maps `input_ids` (first stage) or `inputs_embeds` [B, T, H] to `last_hidden_state` [B, T, H], the last
    stage's after the final norm. `head` maps [..., H] to logits [..., V] and is None elsewhere; `embedding` is the
    first stage's.
    """

    decoder: PreTrainedModel
    head: Head | None
    embedding: nn.Module | None


def load_stage(
    model_dir: Path,
    config: PretrainedConfig,
    stage: StagePlan,
    weights: WeightFormat,
    *,
    device: torch.device,
    embedding: nn.Module | None = None,
) -> StageModel:
    """Load one stage of a model whose `config` is from `load_model_config` onto `device`.

    `embedding` is that of a first stage in the same process: with tied weights the head uses its tensor instead of
    a second copy. Raises ModelError when the checkpoint lacks a tensor of the stage or has one of another shape.
    """
    types = {} if types_label(config) is None else block_types(model_dir)
    checkpoint = read_checkpoint(model_dir, config, types)
    shares_head = stage.is_last and not stage.is_first and checkpoint.is_tied and embedding is not None
    with_head = stage.is_last and not shares_head
    family = FAMILIES[config.model_type]
    model_class, head_name = class_of_stage(config, family, stage, with_head)
    state_dict = _stage_tensors(checkpoint, family, stage, weights.dtype, head_name if with_head else None)
    stage_config = config_of_stage(config, stage, is_tied=checkpoint.is_tied)
    if weights.dtype == torch.float64:
        stage_config._experts_implementation = "eager"  # the others' matrix products stop at float32
    in_blocks = _check_shapes(model_dir, model_class, stage_config, state_dict)
    blocks = {name: state_dict.pop(name) for name in in_blocks if name in state_dict}
    uses_embedding = with_head and stage.is_first and checkpoint.is_tied  # the embedding's blocks are the head's
    if lacking := sorted(set(in_blocks) - blocks.keys() - ({f"{head_name}.weight"} if uses_embedding else set())):
        raise ModelError(_lacks(model_dir, stage, lacking))
    options = _load_options(weights, device)
    model = _load(model_dir, stage, model_class, stage_config, state_dict, options)
    for name, stored in blocks.items():
        model.block_modules[name].matrix = read_matrix(model_dir, stored, model.block_modules[name].type_name)
    prepare_blocks(model)
    fuse_norms(model)
    projection = None
    if shares_head:
        assert embedding is not None
        projection = _tied_projection(embedding)
    elif uses_embedding:
        projection = _tied_projection(model.get_input_embeddings())
    elif with_head:
        projection = model.get_output_embeddings()
    return StageModel(
        decoder=model.base_model,
        head=None if projection is None else Head(projection, _softcap(family, config)),
        embedding=getattr(model.base_model, family.embedding) if stage.is_first else None,
    )


def _tied_projection(embedding: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    if isinstance(embedding, BlockEmbedding):
        return BlockLinear.of(embedding.matrix)
    return functools.partial(nn.functional.linear, weight=embedding.get_parameter("weight"))


def random_stage(
    config: PretrainedConfig, stage: StagePlan, weights: WeightFormat, *, device: torch.device
) -> StageModel:
    """A stage as `load_stage` makes it, with random weights and a head of its own, to be timed. Reads no checkpoint."""
    family = FAMILIES[config.model_type]
    model_class, _ = class_of_stage(config, family, stage, stage.is_last)
    stage_config = config_of_stage(config, stage, is_tied=False)
    if weights.dtype == torch.float64:
        stage_config._experts_implementation = "eager"
    with torch.device("meta"):
        expected = model_class(copy.deepcopy(stage_config)).state_dict()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator).mul_(0.02).to(weights.dtype)
        for name, tensor in expected.items()
    }
    if stage.num_layers == 0:  # embedding and head stay as they are
        weights = WeightFormat(dtype=weights.dtype)
    options = _load_options(weights, device)
    model = _load(Path("random weights"), stage, model_class, stage_config, tensors, options)
    for module in model.block_modules.values():
        module.matrix = random_matrix(module.shape, module.type_name, generator)
    prepare_blocks(model)
    fuse_norms(model)
    return StageModel(
        decoder=model.base_model,
        head=Head(model.get_output_embeddings(), _softcap(family, config)) if stage.is_last else None,
        embedding=getattr(model.base_model, family.embedding) if stage.is_first else None,
    )


def _load_options(weights: WeightFormat, device: torch.device) -> dict[str, Any]:
    """Options of from_pretrained."""
    options: dict[str, Any] = {"dtype": weights.dtype}
    if weights.linear_bits is not None:
        options["quantization_config"] = bitsandbytes_config(weights)
    if device.type == "cuda" or weights.linear_bits is not None:
        options["device_map"] = {"": device}
    return options


def bitsandbytes_config(weights: WeightFormat) -> BitsAndBytesConfig:
    """What transformers needs to know to quantise linear weights. Silences the library."""
    _quiet_bitsandbytes()
    return BitsAndBytesConfig(
        load_in_8bit=weights.linear_bits == 8,
        llm_int8_threshold=weights.outlier_threshold,
        load_in_4bit=weights.linear_bits == 4,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=weights.dtype,
    )


def _quiet_bitsandbytes() -> None:
    """It warns at every 8-bit linear layer of every micro-batch that the inputs are not float16, and on some CPUs, when
    it is imported, that a kernel for 4 bits could be downloaded."""
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _load(
    model_dir: Path,
    stage: StagePlan,
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    tensors: Mapping[str, StoredTensor] | Mapping[str, torch.Tensor],
    options: Mapping[str, Any],
) -> PreTrainedModel:
    """A stage's model with its tensors; `options` are those of from_pretrained.

    Raises ModelError for a tensor that is missing or of no use: transformers would make one up, or leave it out.
    """
    transformers_logging.disable_progress_bar()  # every rank would draw one
    try:
        model, info = model_class.from_pretrained(
            None, config=config, state_dict=dict(tensors), output_loading_info=True, **options
        )
    except RuntimeError as e:
        raise ModelError(f"{model_dir}: layers [{stage.start}, {stage.end}) cannot be loaded: {e}") from e
    if info["missing_keys"]:
        raise ModelError(_lacks(model_dir, stage, sorted(info["missing_keys"])))
    if info["unexpected_keys"]:
        name = min(info["unexpected_keys"])
        stored = getattr(tensors.get(name), "name", None) or name
        raise ModelError(unused_tensor(model_dir, stored, config.model_type))
    return model.eval().requires_grad_(False)


def _lacks(model_dir: Path, stage: StagePlan, names: Sequence[str]) -> str:
    return (
        f"{model_dir} lacks {len(names)} tensors of layers [{stage.start}, {stage.end}), counted from the stage's "
        f"first layer: {', '.join(names[:3])}"
    )


def _softcap(family: Family, config: PretrainedConfig) -> float | None:
    """The cap on logits that Gemma's classes apply behind the head."""
    return config.final_logit_softcapping if family.caps_logits else None


def _soft_capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """Gemma's cap, in place where no gradients are recorded: logits are the largest tensors of a stage."""
    if logits.requires_grad:
        return torch.tanh(logits / softcap) * softcap
    return logits.div_(softcap).tanh_().mul_(softcap)


def check_attention_readable(config: PretrainedConfig) -> None:
    """Raise AttentionError unless `attention` can read the layers' weights. Loads nothing."""
    check_readable(first_layer(config).base_model)


def config_of_stage(config: PretrainedConfig, stage: StagePlan, *, is_tied: bool) -> PretrainedConfig:
    """The model's config, cut to the stage's layers; head and embedding are one where both are the stage's."""
    cut = cut_config(config, stage.start, stage.end)
    is_block = matrix_types(cut)["embedding"] is not None  # which transformers has nothing to tie of
    cut.tie_word_embeddings = is_tied and stage.is_first and stage.is_last and not is_block
    return cut


def class_of_stage(
    config: PretrainedConfig, family: Family, stage: StagePlan, with_head: bool
) -> tuple[type[PreTrainedModel], str]:
    """The model's own class with identities for what belongs to other stages, and the name of its head.

    transformers builds models on the meta device before it loads them, so parts that are replaced here never take
    memory. The class keeps its name, by which transformers finds its conversion rules.
    """
    whole = first_layer(config)
    base: Any = type(whole)
    head_name = next(name for name, module in whole.named_children() if module is whole.get_output_embeddings())

    class Stage(base):
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            if not stage.is_first:
                setattr(self.base_model, family.embedding, nn.Identity())
            if not stage.is_last:
                setattr(self.base_model, family.norm, nn.Identity())
            if not with_head:
                setattr(self, head_name, nn.Identity())
            self.block_modules = place_blocks(self, block_names(config))

    def block_names(config: PretrainedConfig) -> dict[str, str]:
        types = matrix_types(config)
        names = {
            f"{family.decoder}.layers.{index}.{name}": type_name
            for index, layer in enumerate(types["layers"])
            for name, type_name in layer.items()
        }
        ends = {f"{family.decoder}.{family.embedding}": (stage.is_first, "embedding"), head_name: (with_head, "head")}
        return names | {
            f"{name}.weight": types[end] for name, (is_here, end) in ends.items() if is_here and types[end] is not None
        }

    Stage.__name__ = Stage.__qualname__ = base.__name__
    return Stage, head_name


def _check_shapes(
    model_dir: Path, model_class: type[PreTrainedModel], config: PretrainedConfig, tensors: Mapping[str, StoredTensor]
) -> list[str]:
    """Names of the matrices that the model holds as blocks.

    Raises ModelError for a tensor of another shape than the model's; bitsandbytes would take it as it is.
    """
    with torch.device("meta"):
        model: Any = model_class(copy.deepcopy(config))
    in_blocks = {name: module.shape for name, module in model.block_modules.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} | in_blocks
    for name in tensors.keys() & expected.keys():
        shape = expected[name]
        if tensors[name].shape != shape:
            raise ModelError(
                f"{model_dir}: {tensors[name].name} has shape {list(tensors[name].shape)}, and by config.json it has "
                f"{list(shape)}; take the config.json that belongs to the weights"
            )
    return list(in_blocks)


def _stage_tensors(
    checkpoint: Checkpoint, family: Family, stage: StagePlan, dtype: torch.dtype, head_name: str | None
) -> dict[str, StoredTensor]:
    """The stage's tensors under the names that its cut model has in a checkpoint: layers count from 0.

    `head_name` is the name of the head's module where the stage has one of its own.
    """
    wanted: dict[str, StoredTensor] = {}
    for index, layer in enumerate(checkpoint.layers[stage.start : stage.end]):
        wanted |= {f"{family.decoder}.layers.{index}.{name}": tensor for name, tensor in layer.items()}
    if stage.is_first:
        wanted[f"{family.decoder}.{family.embedding}.weight"] = checkpoint.embedding
    if stage.is_last:
        wanted |= {f"{family.decoder}.{name}": tensor for name, tensor in checkpoint.norm.items()}
    if head_name is not None and not (stage.is_first and checkpoint.is_tied):
        wanted[f"{head_name}.weight"] = checkpoint.head
    return {name: replace(tensor, dtype=dtype) for name, tensor in wanted.items()}
