"""One stage of a Hugging Face causal LM: build it and load its own tensors, nothing else.

The only file that knows transformers' insides. A stage is the checkpoint's own model class with a config of fewer
layers; embedding, final norm and head become identities where they belong to another stage. Hugging Face's forward
therefore makes the masks and positions, and a stage computes what the whole model would, bit for bit. Weights are
read in parts of a few MiB, cast to the run's dtype; file and mapping are gone before the next part is read, so that a
rank never holds more than its own share.
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
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pipeline.config.schema import ModelConfig
from pipeline.models.attention import check_readable
from pipeline.models.blocks.modules import BlockEmbedding, BlockLinear
from pipeline.models.blocks.placing import place_blocks
from pipeline.models.blocks.storage import random_matrix, read_matrix
from pipeline.models.checkpoint import Checkpoint, ModelError, StoredTensor, read_checkpoint, unused_tensor
from pipeline.models.families import FAMILIES, Family, cut_config
from pipeline.models.matrix_types import matrix_nbytes, matrix_types
from pipeline.partition.plan import StagePlan

__all__ = [
    "TORCH_DTYPES",
    "Head",
    "ModelError",
    "StageModel",
    "StageWeights",
    "WeightFormat",
    "bitsandbytes_config",
    "check_attention_readable",
    "embedding_bytes",
    "layer_kinds",
    "load_model_config",
    "load_stage",
    "random_stage",
    "stage_parameter_bytes",
    "stage_weights",
]

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}

# Model types whose stages the tests compare with the unsplit model, bit for bit.
VERIFIED_MODEL_TYPES = tuple(FAMILIES)


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


def load_model_config(
    model_dir: Path | None, architecture: Mapping[str, Any], *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Config from a checkpoint's directory, or from `architecture` alone when `model_dir` is None.

    Raises ModelError when neither says enough, when the two disagree, when transformers cannot make the model of it,
    or when it is not of a family that can be cut.
    """
    if model_dir is None:
        where = "model.architecture"
        if "model_type" not in architecture:
            raise ModelError(
                "model.architecture is missing or has no model_type; without the checkpoint it must give the "
                "fields of the model's config.json"
            )
    else:
        where = f"{model_dir / 'config.json'}"
    # Whatever is wrong with a field shows as an error of some type, in the config's class or in the model's.
    try:
        if model_dir is None:
            config = AutoConfig.for_model(**architecture)
        else:
            config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except Exception as e:
        if model_dir is None:
            raise ModelError(f"model.architecture is not a transformers config: {_cause(e)}") from e
        raise ModelError(f"{where} cannot be used ({_cause(e)}); correct it, or fetch the model again") from e
    _check_config(config, where)
    if model_dir is not None:
        _check_architecture(config, architecture)
    try:
        model = _first_layer(config, trust_remote_code)
    except Exception as e:
        raise ModelError(
            f"{where} describes no model of type {config.model_type!r} that transformers can make ({_cause(e)}); "
            "correct it, or fetch the model again"
        ) from e
    if not type(model).__module__.startswith("transformers."):
        raise ModelError(
            f"{where} names modelling code of its own (auto_map), with which stages are not tested to compute what "
            "the whole model does; set model.trust_remote_code=false, or take a checkpoint without it"
        )
    caps_attention = "attn_logit_softcapping" in FAMILIES[config.model_type].reads
    if caps_attention and config.attn_logit_softcapping is not None and model.config._attn_implementation == "sdpa":
        # The kernel takes no cap and does not say so.
        raise ModelError(
            f"transformers {transformers.__version__} runs model type {config.model_type!r} on an attention kernel "
            f"that leaves out attn_logit_softcapping ({where}), so its numbers are another model's; install "
            "transformers 5.21 or newer"
        )
    return config


def _check_config(config: PretrainedConfig, where: str) -> None:
    """Raise ModelError for what cannot be cut into stages that compute what the whole model does."""
    if getattr(config, "is_heterogeneous", False):
        raise ModelError(f"{where} has a per_layer_config; layers of different shapes cannot be cut into stages yet")
    if any(getattr(config, key, None) is not None for key in ("quantization_config", "compression_config")):
        raise ModelError(
            f"the checkpoint's weights are quantised already ({where} has a quantization_config), which stages "
            "cannot be cut from; take the unquantised checkpoint, with model.load_in_8bit or load_in_4bit"
        )
    if not hasattr(config, "num_hidden_layers") or not hasattr(config, "hidden_size"):
        raise ModelError(
            f"{where}: model type {config.model_type!r} is not a plain decoder: it has no num_hidden_layers"
        )
    if config.model_type not in FAMILIES:
        # Many others would run, some of them wrongly and without a word: scaled embeddings or logits, say.
        raise ModelError(
            f"{where}: model type {config.model_type!r} is not among those whose stages are tested to compute what "
            f"the whole model does: {', '.join(VERIFIED_MODEL_TYPES)}. To add one, extend FAMILIES in "
            "pipeline/models/families.py and the equality tests"
        )
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads"):
        value = getattr(config, key)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{where}: {key} is {value!r}; it must be an integer of at least 1")
    for key, causal in (("use_bidirectional_attention", False), ("is_causal", True)):
        if bool(getattr(config, key, causal)) is not causal and getattr(config, key, causal) is not None:
            raise ModelError(
                f"{where}: {key} is {getattr(config, key)!r}: every token would see those that it is scored on, so "
                "a perplexity means nothing. Take a causal model"
            )


# What older versions of config.json have in the place of rope_parameters.
_OLD_ROPE_FIELDS = (
    *("rope_theta", "rope_scaling", "partial_rotary_factor"),
    *("rotary_emb_base", "rotary_pct", "rope_local_base_freq"),
)


def _check_architecture(config: PretrainedConfig, architecture: Mapping[str, Any]) -> None:
    """Raise ModelError where a field of `architecture`, in the words of any version of config.json, says otherwise.

    A field says otherwise if another config comes of it: each is put into the checkpoint's own and read again.
    """
    own = _comparable(config)
    for key, value in architecture.items():
        if getattr(config, key, None) == value:
            continue
        try:
            read = _comparable(type(config).from_dict({**_spelt_for(config, key), key: copy.deepcopy(value)}))
        except Exception:  # a value that goes with no other config than its own
            read = {}
        if read == own and key != "model_type":
            continue
        changed = [] if key in own else [name for name in own if read and own[name] != read.get(name)]
        name = changed[0] if changed else key
        raise ModelError(
            f"model.architecture.{key} is {value!r}, the checkpoint's config.json has "
            f"{getattr(config, name, None)!r}{f' as {name}' if changed else ''}"
        )


def _comparable(config: PretrainedConfig) -> dict[str, Any]:
    """A config's fields, without those that tell of its history."""
    ignored = ("transformers_version", "_name_or_path", "sliding_window_pattern", "_sliding_window_pattern")
    fields = {key: value for key, value in config.to_dict().items() if key not in ignored}
    for rope in _rope_dicts(fields):
        rope.pop("type", None)  # the old name of rope_type, kept beside it
    return fields


def _rope_dicts(fields: dict[str, Any]) -> list[dict[str, Any]]:
    rope = fields.get("rope_parameters") or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _spelt_for(config: PretrainedConfig, key: str) -> dict[str, Any]:
    """A config's fields, in the words of those versions of config.json that have `key`."""
    fields = config.to_dict()
    if key == "torch_dtype":
        fields.pop("dtype", None)
    elif key == "sliding_window_pattern":
        fields.pop("layer_types", None)
    elif key in _OLD_ROPE_FIELDS:
        rope = fields.pop("rope_parameters", None) or {}
        if "sliding_attention" in rope:
            fields["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            rope = rope["full_attention"]
        rope.pop("type", None)
        theta, part = rope.pop("rope_theta", None), rope.pop("partial_rotary_factor", None)
        old = ("rope_theta", "partial_rotary_factor")
        if config.model_type == "gpt_neox":
            old = ("rotary_emb_base", "rotary_pct")
        fields |= {name: value for name, value in zip(old, (theta, part), strict=True) if value is not None}
        fields["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    return fields


def _cause(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


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
    checkpoint = read_checkpoint(model_dir, config)
    shares_head = stage.is_last and not stage.is_first and checkpoint.is_tied and embedding is not None
    with_head = stage.is_last and not shares_head
    family = FAMILIES[config.model_type]
    model_class, head_name = _stage_class(config, family, stage, with_head)
    state_dict = _stage_tensors(checkpoint, family, stage, weights.dtype, head_name if with_head else None)
    stage_config = _stage_config(config, stage, is_tied=checkpoint.is_tied)
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
    model_class, _ = _stage_class(config, family, stage, stage.is_last)
    stage_config = _stage_config(config, stage, is_tied=False)
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
    check_readable(_first_layer(config).base_model)


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
    model_class, _ = _stage_class(config, family, stage, stage.is_last)
    with torch.device("meta"):
        model = model_class(_stage_config(config, stage, is_tied=config.tie_word_embeddings)).to(weights.dtype)
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


def _stage_config(config: PretrainedConfig, stage: StagePlan, *, is_tied: bool) -> PretrainedConfig:
    """The model's config, cut to the stage's layers; head and embedding are one where both are the stage's."""
    cut = cut_config(config, stage.start, stage.end)
    is_block = matrix_types(cut)["embedding"] is not None  # which transformers has nothing to tie of
    cut.tie_word_embeddings = is_tied and stage.is_first and stage.is_last and not is_block
    return cut


def _stage_class(
    config: PretrainedConfig, family: Family, stage: StagePlan, with_head: bool
) -> tuple[type[PreTrainedModel], str]:
    """The model's own class with identities for what belongs to other stages, and the name of its head.

    transformers builds models on the meta device before it loads them, so parts that are replaced here never take
    memory. The class keeps its name, by which transformers finds its conversion rules.
    """
    whole = _first_layer(config)
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


def _first_layer(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The whole model with its first layer alone, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(cut_config(config, 0, 1), trust_remote_code=trust_remote_code)


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
