"""One stage of a Hugging Face causal LM: build it and load its own tensors, nothing else.

The only file that knows transformers' insides. A stage is the checkpoint's own model class with a config of fewer
layers; embedding, final norm and head become identities where they belong to another stage. Hugging Face's forward
therefore makes the masks and positions, and a stage computes what the whole model would, bit for bit. Weights are
read in parts of a few MiB, cast to the run's dtype; file and mapping are gone before the next part is read, so that a
rank never holds more than its own share.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from pipeline.models.attention import make_readable
from pipeline.models.source import weight_files
from pipeline.partition.plan import StagePlan

__all__ = [
    "TORCH_DTYPES",
    "ModelError",
    "StageModel",
    "check_attention_readable",
    "embedding_bytes",
    "load_model_config",
    "load_stage",
    "stage_parameter_bytes",
]

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Model types whose stages the tests compare with the unsplit model, bit for bit.
VERIFIED_MODEL_TYPES = (
    *("llama", "qwen2", "qwen3", "gemma3_text", "gpt_neox"),
    *("gemma", "gemma2", "mistral", "mixtral", "olmo2", "phi3", "qwen3_moe", "starcoder2"),
)


class ModelError(ValueError):
    """A checkpoint or architecture that cannot be cut into stages."""


@dataclass(frozen=True)
class _Layout:
    """Names of a decoder's parts, in the module tree and in checkpoints."""

    decoder: str = "model"
    embedding: str = "embed_tokens"
    norm: str = "norm"


_LAYOUTS = {"gpt_neox": _Layout("gpt_neox", "embed_in", "final_layer_norm")}

# GPT-NeoX checkpoints store the head under another name than today's module has.
_STORED_HEADS = ("lm_head.weight", "embed_out.weight")


# Of a stored tensor, at most so much (or one row) is mapped beside its copy in memory.
MAX_MAPPED_NBYTES = 16 * 2**20

Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class StageModel:
    """Modules of one loaded stage.

    `decoder` maps `input_ids` (first stage) or `inputs_embeds` [B, T, H] to `last_hidden_state` [B, T, H], the last
    stage's after the final norm. `head` maps [..., H] to logits [..., V] and is None elsewhere; `embedding` is the
    first stage's.
    """

    decoder: nn.Module
    head: Head | None
    embedding: nn.Module | None


def load_model_config(
    model_dir: Path | None, architecture: Mapping[str, Any], *, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Config from a checkpoint's directory, or from `architecture` alone when `model_dir` is None.

    Raises ModelError when neither says enough, when the two disagree, or when the model is no plain decoder.
    """
    if model_dir is None:
        fields = dict(architecture)
        if "model_type" not in fields:
            raise ModelError(
                "model.architecture is missing or has no model_type; without the checkpoint it must give the "
                "fields of the model's config.json"
            )
        try:
            config = AutoConfig.for_model(**fields)
        except (ValueError, TypeError) as e:
            raise ModelError(f"model.architecture is not a transformers config: {e}") from e
    else:
        try:
            config = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as e:
            raise ModelError(f"{model_dir}: config.json cannot be used: {e}") from e
        for key, value in architecture.items():
            found = getattr(config, key, None)
            if found != value:
                raise ModelError(f"model.architecture.{key} is {value!r}, the checkpoint's config.json has {found!r}")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            "the checkpoint's weights are quantised already (config.json has a quantization_config), which stages "
            "cannot be cut from; take the unquantised checkpoint, with model.load_in_8bit or load_in_4bit"
        )
    if not hasattr(config, "num_hidden_layers") or not hasattr(config, "hidden_size"):
        raise ModelError(f"model type {config.model_type!r} is not a plain decoder: it has no num_hidden_layers")
    if config.model_type not in VERIFIED_MODEL_TYPES:
        # Many others would run, some of them wrongly and without a word: scaled embeddings or logits, say.
        raise ModelError(
            f"model type {config.model_type!r} is not among those whose stages are tested to compute what the whole "
            f"model does: {', '.join(VERIFIED_MODEL_TYPES)}. To add one, extend VERIFIED_MODEL_TYPES in "
            "pipeline/models/loading.py and the equality tests"
        )
    return config


def load_stage(
    model_dir: Path,
    config: PretrainedConfig,
    stage: StagePlan,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_in_8bit: bool = False,
    load_in_8bit_threshold: float = 6.0,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    embedding: nn.Module | None = None,
) -> StageModel:
    """Load one stage onto `device`.

    `embedding` is that of a first stage in the same process: with tied weights the head uses its tensor instead of
    a second copy. Raises ModelError when the checkpoint lacks a tensor of the stage or has one of another shape.
    """
    shares_head = stage.is_last and not stage.is_first and _is_tied(config) and embedding is not None
    with_head = stage.is_last and not shares_head
    layout = _layout(config)
    model_class, head_name = _stage_class(config, layout, stage, with_head, trust_remote_code)
    state_dict = _stage_tensors(model_dir, config, layout, stage, dtype, head_name if with_head else None)
    options: dict[str, Any] = {}
    if load_in_8bit or load_in_4bit:
        # It warns at every 8-bit linear layer of every micro-batch that the inputs are not float16.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=load_in_8bit,
            llm_int8_threshold=load_in_8bit_threshold,
            load_in_4bit=load_in_4bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    if device.type == "cuda" or options:
        options["device_map"] = {"": device}
    transformers_logging.disable_progress_bar()  # every rank would draw one
    try:
        model, info = model_class.from_pretrained(
            None,
            config=_stage_config(config, stage),
            state_dict=state_dict,
            dtype=dtype,
            output_loading_info=True,
            **options,
        )
    except RuntimeError as e:
        raise ModelError(f"{model_dir}: layers [{stage.start}, {stage.end}) cannot be loaded: {e}") from e
    if info["missing_keys"]:
        lacking = sorted(info["missing_keys"])
        raise ModelError(
            f"{model_dir} lacks {len(lacking)} tensors of layers [{stage.start}, {stage.end}), "
            f"counted from the stage's first layer: {', '.join(lacking[:3])}"
        )
    model.eval().requires_grad_(False)
    head: Head | None = None
    if shares_head:
        weight = embedding.weight
        head = lambda hidden: nn.functional.linear(hidden, weight)
    elif with_head:
        head = model.get_output_embeddings()
    softcap = getattr(config, "final_logit_softcapping", None)
    if head is not None and softcap is not None:
        projection = head
        head = lambda hidden: _soft_capped(projection(hidden), softcap)
    return StageModel(
        decoder=model.base_model,
        head=head,
        embedding=getattr(model.base_model, layout.embedding) if stage.is_first else None,
    )


def _soft_capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """Gemma's cap, in place where no gradients are recorded: logits are the largest tensors of a stage."""
    if logits.requires_grad:
        return torch.tanh(logits / softcap) * softcap
    return logits.div_(softcap).tanh_().mul_(softcap)


def check_attention_readable(config: PretrainedConfig, *, trust_remote_code: bool = False) -> None:
    """Raise AttentionError unless `attention` can read the layers' weights. Loads nothing."""
    end = min(1, config.num_hidden_layers)
    first_layer = StagePlan(stage_index=0, node=0, start=0, end=end, is_first=True, is_last=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            _stage_config(config, first_layer), trust_remote_code=trust_remote_code
        )
    make_readable(model.base_model)


def stage_parameter_bytes(
    config: PretrainedConfig, stage: StagePlan, *, dtype: torch.dtype, load_in_8bit: bool, load_in_4bit: bool
) -> int:
    """Bytes of a stage's weights once loaded, from the config alone.

    Quantised linear layers take 1 byte a weight and 4 a row (8 bits), or half a byte and 4 per block of 64 (4
    bits). A tied head on the embedding's node costs nothing; `stage` decides only about itself, so a caller that
    holds both ends subtracts one of the two.
    """
    layout = _layout(config)
    with torch.device("meta"):
        model_class, _ = _stage_class(config, layout, stage, stage.is_last, trust_remote_code=False)
        model = model_class(_stage_config(config, stage)).to(dtype)
    linear_weights = {
        id(module.weight)
        for layer in model.base_model.layers
        for module in layer.modules()
        if isinstance(module, nn.Linear)
    }
    total = 0
    for parameter in {id(p): p for p in model.parameters()}.values():
        if id(parameter) not in linear_weights or not (load_in_8bit or load_in_4bit):
            total += parameter.numel() * dtype.itemsize
        elif load_in_8bit:
            total += parameter.numel() + 4 * parameter.shape[0]
        else:
            total += parameter.numel() // 2 + 4 * -(-parameter.numel() // 64)
    return total


def embedding_bytes(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of the embedding matrix, which a tied head on another node repeats."""
    return config.vocab_size * config.hidden_size * dtype.itemsize


def _layout(config: PretrainedConfig) -> _Layout:
    return _LAYOUTS.get(config.model_type, _Layout())


def _is_tied(config: PretrainedConfig) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


def _stage_config(config: PretrainedConfig, stage: StagePlan) -> PretrainedConfig:
    """The model's config, cut to the stage's layers. Per-layer lists must be cut along with the count."""
    cut = copy.deepcopy(config)
    if getattr(config, "layer_types", None) is not None:
        cut.layer_types = list(config.layer_types[stage.start : stage.end])
    cut.num_hidden_layers = stage.num_layers
    cut.tie_word_embeddings = _is_tied(config) and stage.is_first and stage.is_last
    cut.use_cache = False
    return cut


def _stage_class(
    config: PretrainedConfig, layout: _Layout, stage: StagePlan, with_head: bool, trust_remote_code: bool
) -> tuple[type[PreTrainedModel], str]:
    """The model's own class with identities for what belongs to other stages, and the name of its head.

    transformers builds models on the meta device before it loads them, so parts that are replaced here never take
    memory. The class keeps its name, by which transformers finds its conversion rules.
    """
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(
            _stage_config(config, replace(stage, start=0, end=min(1, config.num_hidden_layers))),
            trust_remote_code=trust_remote_code,
        )
    base = type(whole)
    decoder = getattr(whole, layout.decoder, None)
    for part in (layout.embedding, "layers", layout.norm):
        if not hasattr(decoder, part):
            raise ModelError(
                f"model type {config.model_type!r} has no {layout.decoder}.{part}; its stages cannot be cut. "
                f"Tested model types: {', '.join(VERIFIED_MODEL_TYPES)}"
            )
    head_name = next(name for name, module in whole.named_children() if module is whole.get_output_embeddings())

    class Stage(base):
        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            if not stage.is_first:
                setattr(self.base_model, layout.embedding, nn.Identity())
            if not stage.is_last:
                setattr(self.base_model, layout.norm, nn.Identity())
            if not with_head:
                setattr(self, head_name, nn.Identity())

    Stage.__name__ = Stage.__qualname__ = base.__name__
    return Stage, head_name


class _StoredTensor:
    """A tensor of a checkpoint file, read and cast when transformers asks for its contents with `[...]`.

    The file is opened for this one tensor, and anew for each part of a large one: pages of a mapping count as
    resident for as long as it exists.
    """

    def __init__(self, path: Path, name: str, dtype: torch.dtype) -> None:
        self._path, self._name, self._dtype = path, name, dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        with safe_open(self._path, framework="pt") as checkpoint:
            stored = checkpoint.get_tensor(self._name)  # a mapping, of which nothing is read yet
            tensor = torch.empty(stored.shape, dtype=self._dtype if stored.is_floating_point() else stored.dtype)
            if stored.nbytes <= MAX_MAPPED_NBYTES:
                return tensor.copy_(stored)[index]
            num_rows = max(1, MAX_MAPPED_NBYTES * len(stored) // stored.nbytes)
            del stored
        for start in range(0, len(tensor), num_rows):
            with safe_open(self._path, framework="pt") as checkpoint:
                rows = slice(start, start + num_rows)
                tensor[rows].copy_(checkpoint.get_slice(self._name)[rows])
        return tensor[index]


def _stage_tensors(
    model_dir: Path,
    config: PretrainedConfig,
    layout: _Layout,
    stage: StagePlan,
    dtype: torch.dtype,
    head_name: str | None,
) -> dict[str, _StoredTensor]:
    """The stage's tensors under the names that its cut model has in a checkpoint: layers count from 0.

    `head_name` is the name of the head's module where the stage has one of its own.
    """
    files = _checkpoint_files(model_dir)
    embedding = f"{layout.decoder}.{layout.embedding}.weight"
    layers = f"{layout.decoder}.layers."
    wanted: dict[str, _StoredTensor] = {}

    def take(stored: str, name: str) -> None:
        wanted[name] = _StoredTensor(files[stored], stored, dtype)

    for stored in files:
        if stored.startswith(layers):
            number, _, rest = stored[len(layers) :].partition(".")
            if stage.start <= int(number) < stage.end:
                take(stored, f"{layers}{int(number) - stage.start}.{rest}")
        elif stored.startswith(f"{layout.decoder}.{layout.norm}.") and stage.is_last:
            take(stored, stored)
        elif stored == embedding and stage.is_first:
            take(stored, stored)
        elif stored in _STORED_HEADS and head_name and not _is_tied(config):
            take(stored, f"{head_name}.weight")
    if head_name and _is_tied(config) and not stage.is_first and embedding in files:
        take(embedding, f"{head_name}.weight")
    return wanted


def _checkpoint_files(model_dir: Path) -> dict[str, Path]:
    """Name of every stored tensor -> its safetensors file."""
    files: dict[str, Path] = {}
    for path in weight_files(model_dir):
        with safe_open(path, framework="pt") as checkpoint:
            files |= dict.fromkeys(checkpoint.keys(), path)
    return files
