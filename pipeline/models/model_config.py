"""A model's config, read and checked: what cannot be cut into stages that compute what the whole model does is refused.

`load_model_config` gives the config that all else of this folder takes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from pipeline.models.checkpoint import ModelError
from pipeline.models.families import FAMILIES, cut_config

__all__ = ["VERIFIED_MODEL_TYPES", "first_layer", "load_model_config"]

# Model types whose stages the tests compare with the unsplit model, bit for bit.
VERIFIED_MODEL_TYPES = tuple(FAMILIES)


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
        model = first_layer(config, trust_remote_code)
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


def first_layer(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The whole model with its first layer alone, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(cut_config(config, 0, 1), trust_remote_code=trust_remote_code)
