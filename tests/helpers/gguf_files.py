"""Small GGUF files: a Llama's weights in blocks of any type, and the parts of which files of others are written."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig

__all__ = [
    "DRAWN_TYPES",
    "HEAD_DIM",
    "HIDDEN_SIZE",
    "NUM_HEADS",
    "NUM_KV_HEADS",
    "VOCABULARY",
    "draw_blocks",
    "finish",
    "gguf_tensors",
    "split_rope",
    "tiny_config",
    "write_gguf",
    "write_keys",
    "write_sizes",
    "write_vocabulary",
]

HIDDEN_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 64, 4, 2, 16
VOCABULARY = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "cd"]

# Types that the gguf package cannot make: where in a block its fp16 scales are, and what their values are below, which
# keeps weights below 0.2.
DRAWN_TYPES = {
    "Q2_K": ((80, 82), 2.0**-8),
    "Q3_K": ((108,), 2.0**-10),
    "Q4_K": ((0, 2), 2.0**-13),
    "Q5_K": ((0, 2), 2.0**-14),
    "Q6_K": ((208,), 2.0**-15),
}


def tiny_config(**fields: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**sizes, **fields})


def interleave_rope(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The row order that GGUF stores query and key projections of Llama in."""
    half = len(weight) // num_heads // 2
    return weight.reshape(num_heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def split_rope(weight: np.ndarray, num_heads: int) -> np.ndarray:
    half = len(weight) // num_heads // 2
    return weight.reshape(num_heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, tuple[str, np.ndarray]]:
    """GGUF name -> (Hugging Face name, values in GGUF's row order). A tied head is no tensor of its own."""
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(model.config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts.items()}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if "q_proj" in name:
            values = interleave_rope(values, model.config.num_attention_heads)
        elif "k_proj" in name:
            values = interleave_rope(values, model.config.num_key_value_heads)
        tensors[names[name.removesuffix(".weight")] + ".weight"] = (name, values)
    return tensors


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    without: str | None = None,
    keys: dict | None = None,
    more: dict | None = None,
    types: Mapping[str, str] | None = None,
) -> None:
    """Write `model`, but for the tensor `without`; `keys` of the architecture and `more` tensors beside.

    Matrices are of type Q4_1, or of those of `types`, by the tensor's name or by `""` for all others.
    """
    writer = gguf.GGUFWriter(path, "llama")
    write_keys(writer, "llama", keys or {})
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    write_sizes(writer, model.config)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    write_vocabulary(writer)
    types = {"": "Q4_1", **(types or {})}
    for name, (_, values) in gguf_tensors(model).items():
        type_name = types.get(name, types[""])
        if name == without:
            continue
        if values.ndim == 1 or type_name == "F32":
            writer.add_tensor(name, values)
        elif type_name == "F16":
            writer.add_tensor(name, values.astype(np.float16))
        else:
            quantised_type = GGMLQuantizationType[type_name]
            if type_name in DRAWN_TYPES:
                blocks = draw_blocks(values.shape, type_name, seed=zlib.crc32(name.encode()))
            else:
                blocks = gguf.quants.quantize(values, quantised_type)
            writer.add_tensor(name, blocks, raw_dtype=quantised_type)
    finish(writer)


def draw_blocks(shape: tuple[int, ...], type_name: str, seed: int) -> np.ndarray:
    """uint8 [N, bytes of a row] of one of `DRAWN_TYPES`: any bytes, but for the scales."""
    num_weights, nbytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(256, size=(shape[0] * shape[1] // num_weights, nbytes), dtype=np.uint8)
    places, largest = DRAWN_TYPES[type_name]
    for place in places:
        scales = generator.uniform(0.5 * largest, largest, size=(len(blocks), 1))
        blocks[:, place : place + 2] = scales.astype(np.float16).view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write_keys(writer: gguf.GGUFWriter, architecture: str, keys: dict) -> None:
    """Keys of the architecture, or of the file where they stand between exclamation marks."""
    add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
    for key, value in keys.items():
        add[type(value)](key.strip("!") if "!" in key else f"{architecture}.{key}", value)


def write_sizes(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(128)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)


def write_vocabulary(writer: gguf.GGUFWriter) -> None:
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([3] + [1] * (len(VOCABULARY) - 1))
    writer.add_token_merges(["a b", "c d"])  # transformers 5.17 reads a list of one as the string in it
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
