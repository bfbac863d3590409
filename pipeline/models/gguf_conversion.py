"""A GGUF file's config, tokenizer and weights, as transformers reads them, to a checkpoint's directory.

Called by `gguf.convert_gguf_once`. transformers reads and dequantises the file; what it gives is stored as float32
safetensors, value for value, and beside it the file's own blocks. transformers passes over keys and tensors that it
does not know, scaled positions among them. So each key of the architecture must reappear in the config, where it is put
if transformers left it out, and each tensor in the model; what does not is an error that names it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from pipeline.models.blocks.storage import write_blocks
from pipeline.models.families import FAMILIES, has_experts

__all__ = ["CONVERSION_VERSION", "complete_config", "convert", "tensor_names"]

CONVERSION_VERSION = 4  # raised when this file writes something else

# Keys of an architecture -> the config's field with the same value.
_FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "norm_epsilon",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
# Keys that change nothing when they have this value, with any value where it is None.
_NEUTRAL = {
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.finetuned": None,
    "rope.scaling.original_context_length": None,  # for types of scaling that are refused
    "expert_count": 0,
    "expert_used_count": 0,
    "leading_dense_block_count": 0,
}
_ROPE_FREQS = "rope_freqs.weight"


def convert(gguf: Path, out: Path) -> None:
    """Write config, tokenizer and float32 weights, exactly as transformers dequantises them, to `out`."""
    # Imported here: seconds to import, and needed once per model.
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging as transformers_logging

    print(f"converting {gguf.name} to float32, once; it will lie in {out.parent}", file=sys.stderr, flush=True)
    transformers_logging.disable_progress_bar()
    try:
        reader = GGUFReader(gguf)
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # of many types, for damaged files and for architectures it does not know
        raise ValueError(f"transformers cannot load {gguf}: {type(error).__name__}: {error}") from error
    complete_config(gguf, reader, config)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that cannot be switched off
            model, report = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                config=config,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
            )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:
        raise ValueError(f"transformers cannot load {gguf}: {type(error).__name__}: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:  # transformers only warns, and fills what is missing with random values
            raise ValueError(
                f"{gguf} does not fit its architecture {model.config.model_type!r}: {problem} "
                f"{sorted(map(str, report[problem]))[:4]}"
            )
    by_name = _check_tensors(gguf, reader, model)
    # In a process group transformers writes weights on its rank 0 alone, whatever `is_main_process` says; here any rank
    # may be the one that converts. The parts of save_pretrained that undo what loading did to names and experts have no
    # public names. A process of its own would have to be ended whenever this one is, and a rank ends by os._exit. So
    # the group is hidden meanwhile. Nobody else asks for it: links are opened later, and the watch's threads only talk
    # to their store.
    with mock.patch("torch.distributed.is_initialized", return_value=False):
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    del model
    if not (out / "config.json").is_file() or not any(out.glob("*.safetensors")):
        raise ValueError(
            f"transformers {importlib.metadata.version('transformers')} wrote no config or no weights of {gguf}, only "
            f"{sorted(path.name for path in out.iterdir())}; install a version that setup.cfg names"
        )
    for sentence in () if has_experts(config) else write_blocks(out, by_name):
        print(f"held as float32: {sentence}", file=sys.stderr, flush=True)


def complete_config(gguf: Path, reader: Any, config: Any) -> None:
    """Put into `config` what transformers left out of the file's keys, and refuse what has no place there."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{gguf} is of model type {config.model_type!r}, whose stages are not tested to compute what the whole "
            f"model does; take one of {', '.join(FAMILIES)}"
        )
    contents = {name: field.contents() for name, field in reader.fields.items()}
    for name, wanted in (("general.type", "model"), ("split.count", 1)):
        if contents.get(name, wanted) not in (wanted, 0):
            raise ValueError(f"{gguf} has {name} {contents[name]!r}: it is no whole model; take a file with all of it")
    prefix = f"{contents['general.architecture']}."
    keys = {name.removeprefix(prefix): value for name, value in contents.items() if name.startswith(prefix)}
    by_layer = "layer_types" in FAMILIES[config.model_type].reads
    if not by_layer and getattr(config, "sliding_window", None) is not None:
        config.sliding_window = keys.get("attention.sliding_window")  # a class's default is not the file's
    for key, value in keys.items():
        field = _FIELDS.get(key)
        if key == "attention.value_length":
            continue  # the keys' length, or else refused
        # Where layers differ in kind, a window that transformers left out would have to know which they are.
        if field is not None and hasattr(config, field) and not (field == "sliding_window" and by_layer):
            setattr(config, field, value)
    unused = {
        key: value
        for key, value in keys.items()
        if not (key in _FIELDS and _value(config, _FIELDS[key]) == value)
        and not (key in _NEUTRAL and _NEUTRAL[key] in (None, value))
    }
    _take_positions(gguf, reader, config, unused)
    pattern = unused.get("attention.sliding_window_pattern")  # every how many layers all is seen, or which slide
    if by_layer and pattern is not None:
        slide = [kind == "sliding_attention" for kind in config.layer_types]
        told = [bool((layer + 1) % pattern) for layer in range(len(slide))] if isinstance(pattern, int) else pattern
        if list(map(bool, told)) == slide:
            del unused["attention.sliding_window_pattern"]
    if unused:
        named = ", ".join(f"{prefix}{key} = {str(value)[:60]}" for key, value in list(unused.items())[:4])
        raise ValueError(
            f"{gguf} has {named}, which its conversion to {config.model_type!r} would leave out: it would be another "
            "model. Take the model as safetensors, or a GGUF file without it"
        )
    head_dim = _value(config, "head_dim")
    if getattr(config, "query_pre_attn_scalar", head_dim) != head_dim:
        raise ValueError(
            f"{gguf} does not say by what its attention is scaled, and {config.model_type!r} with heads of "
            f"{head_dim} dimensions may differ from the usual {config.query_pre_attn_scalar}; take the model "
            "as safetensors"
        )


def _take_positions(gguf: Path, reader: Any, config: Any, unused: dict[str, Any]) -> None:
    """Move what `unused` has on rotary positions into `config`: base, linear scaling, and a factor per frequency.

    Dividing each frequency by a factor of its own is what transformers calls longrope, with one list for all lengths.
    """
    nested = config.rope_parameters.get("full_attention")
    rope = config.rope_parameters if nested is None else nested
    rope["rope_theta"] = unused.pop("rope.freq_base", 10000.0)
    if nested is not None:
        local = config.rope_parameters["sliding_attention"]
        local["rope_theta"] = unused.pop("rope.freq_base_swa", local["rope_theta"])
    rotated = int(_value(config, "head_dim") * rope.get("partial_rotary_factor", 1.0))
    if unused.get("rope.dimension_count") == rotated:
        del unused["rope.dimension_count"]
    if unused.get("rope.scaling.type", "linear") in ("none", "linear"):
        is_scaled = unused.pop("rope.scaling.type", "linear") == "linear"
        factors = {unused.pop(key) for key in ("rope.scaling.factor", "rope.scale_linear") if key in unused}
        if is_scaled and len(factors) > 1:
            unused["rope.scaling.factor"] = sorted(factors)
        elif is_scaled and factors - {0.0, 1.0}:
            rope |= {"rope_type": "linear", "factor": factors.pop()}
    (freqs,) = [tensor.data for tensor in reader.tensors if tensor.name == _ROPE_FREQS] or [None]
    if freqs is not None and config.model_type in ("llama", "mistral"):
        if len(freqs) != rotated // 2:
            raise ValueError(f"{gguf} has {len(freqs)} {_ROPE_FREQS} for {rotated // 2} frequencies")
        scale = rope.pop("factor", 1.0)
        by_frequency = [float(value) * scale for value in freqs]
        rope |= {
            "rope_type": "longrope",
            "short_factor": by_frequency,
            "long_factor": by_frequency,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": config.max_position_embeddings,
        }


def _value(config: Any, field: str) -> Any:
    value = getattr(config, field, None)
    return config.hidden_size // config.num_attention_heads if field == "head_dim" and value is None else value


def tensor_names(reader: Any, num_layers: int) -> Callable[[str], str | None]:
    """The name in the file (a GGUFReader's) of a model's parameter; the function gives None for what has none."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = reader.fields["general.architecture"].contents()
    (known,) = [key for key, name in MODEL_ARCH_NAMES.items() if name == architecture]
    names = get_tensor_name_map(known, num_layers)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


def _check_tensors(gguf: Path, reader: Any, model: Any) -> dict[str, Any]:
    """The file's tensors by the names of the model's parameters. Raises ValueError for one that is in none."""
    names = tensor_names(reader, model.config.num_hidden_layers)
    own = {name: names(name) for name in model.state_dict()}
    used = set(own.values())
    if model.config.model_type in ("llama", "mistral"):
        used.add(_ROPE_FREQS)
    for layer in range(model.config.num_hidden_layers):
        if f"blk.{layer}.ffn_down_exps" in used:  # transformers keeps all experts in two parameters without a suffix
            used |= {f"blk.{layer}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")}
    unused = sorted(tensor.name for tensor in reader.tensors if tensor.name not in used)
    if unused:
        raise ValueError(
            f"{gguf} has {len(unused)} tensors that its conversion to {model.config.model_type!r} would leave out, "
            f"{unused[0]!r} the first: it would be another model. Take the model as safetensors"
        )
    stored = {tensor.name: tensor for tensor in reader.tensors}
    return {name: stored[theirs] for name, theirs in own.items() if theirs in stored}
