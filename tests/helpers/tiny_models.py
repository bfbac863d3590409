"""Tiny random models of every supported architecture, with a byte tokenizer, saved as checkpoints.

Made on first use, once per test session, and removed at its end. Weights depend on the seed alone.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "CAPS_ARE_DROPPED",
    "MODEL_TYPES",
    "VOCAB_SIZE",
    "pass_on_unchanged",
    "save_tiny_model",
    "skip_dropped_caps",
    "tiny_arguments",
    "tiny_model",
    "write_text",
]

MODEL_TYPES = ("llama", "qwen2", "qwen3", "gemma3_text", "gpt_neox")
BOS_ID, EOS_ID = 256, 257
VOCAB_SIZE = 258
MAX_POSITIONS = 512
CAPS_ARE_DROPPED = Version(transformers.__version__) < Version("5.21")

# What an architecture needs beside the sizes that all share.
_GROUPED_QUERIES = {"num_key_value_heads": 2, "head_dim": 16}
_OWN_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED_QUERIES},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {**_GROUPED_QUERIES},
    "gemma3_text": {**_GROUPED_QUERIES, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "gpt_neox": {},
    "gemma": {**_GROUPED_QUERIES},
    "gemma2": {**_GROUPED_QUERIES, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "mistral": {**_GROUPED_QUERIES, "sliding_window": 16},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "olmo2": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2},
    "qwen3_moe": {**_GROUPED_QUERIES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "starcoder2": {"num_key_value_heads": 2},
}


def skip_dropped_caps(model_type: str) -> None:
    """Skip a test of Gemma 2 where transformers leaves out its cap of attention logits, so that it is refused."""
    if model_type == "gemma2" and CAPS_ARE_DROPPED:
        pytest.skip("transformers before 5.21 leaves out the cap of Gemma 2, so it is refused")


def tiny_arguments(exp_dir: Path, *more: str, model_type: str = "llama", num_tokens: int = 700) -> list[str]:
    """Command line of a short run: windows of 64 tokens, stride 32, one thread per rank; `more` overrides."""
    text = _session_folder() / f"text-{num_tokens}"
    if not text.exists():
        write_text(text, num_tokens)
    overrides = ("dataset.name=text", f"dataset.path={text}", "runtime.threads=1")
    return [
        *("--model_name", str(tiny_model(model_type)), "--exp_dir", str(exp_dir)),
        *("--max_length", "64", "--stride", "32"),
        *(word for override in overrides for word in ("--set", override)),
        *more,
    ]


@functools.cache
def tiny_model(model_type: str = "llama", *, num_layers: int = 6, tied: bool = False, **fields: Any) -> Path:
    """Directory of a float32 checkpoint, shared by the session's tests: do not write into it."""
    words = [model_type, str(num_layers), "tied" if tied else "untied"]
    folder = _session_folder() / "-".join(words + [f"{key}={value}" for key, value in fields.items()])
    return save_tiny_model(folder, model_type, num_layers=num_layers, tied=tied, **fields)


def save_tiny_model(
    folder: Path, model_type: str, *, num_layers: int = 6, tied: bool = False, seed: int = 0, **fields: Any
) -> Path:
    """Save a random model (H = 64, V = 258) and its tokenizer to `folder`; `fields` go into its config.

    Every second layer of a Gemma has a sliding window, so that cuts fall between both kinds.
    """
    own = dict(_OWN_FIELDS[model_type])
    if model_type in ("gemma2", "gemma3_text"):
        kinds = ("sliding_attention", "full_attention")
        own["layer_types"] = [kinds[index % 2] for index in range(num_layers)]
    shared = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": None,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
    }
    config = AutoConfig.for_model(model_type, **{**shared, **own, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as constants, which hide mistakes
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    return folder


def pass_on_unchanged(folder: Path, layers: range) -> Path:
    """Let these layers of a saved model (not of `tiny_model`) add nothing to what they get."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for layer in layers:
        for name, parameter in model.base_model.layers[layer].named_parameters():
            if name in ("self_attn.o_proj.weight", "mlp.down_proj.weight"):
                parameter.data.zero_()
    model.save_pretrained(folder)
    return folder


def write_text(path: Path, num_tokens: int) -> Path:
    """An ASCII text that the tiny models' tokenizer turns into `num_tokens` tokens, its BOS included."""
    words = "a stage sends packed bytes to the next one and the last returns a loss per token ".split()
    text = " ".join(words[index * index % len(words)] for index in range(num_tokens))
    path.write_text(text[: num_tokens - 1], encoding="ascii")
    return path


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a BOS in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)} | {"<bos>": BOS_ID, "<eos>": EOS_ID}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS_ID)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


@functools.cache
def _session_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny_models_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
