"""Random Llama checkpoints of a wanted size, with a byte tokenizer, written a shard at a time, and calibrations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from compressors.klt.calibration_file import LinkCalibration, Origin, write_calibration, write_token_table
from compressors.bitpack import packed_nbytes
from compressors.klt.models import prior_models
from compressors.klt.token_table import TokenTable

__all__ = ["save_random_calibration", "save_random_llama"]


def save_random_llama(
    folder: Path, *, hidden_size: int, num_layers: int, vocab_size: int, dtype: torch.dtype, num_shards: int
) -> int:
    """Write config, tokenizer (one token per byte) and weights; returns the bytes of all tensors.

    Embedding and head are not tied. At most one shard is in memory at a time.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=8 * hidden_size // 3 // 64 * 64,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype=dtype,
        architectures=["LlamaForCausalLM"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    _save_byte_tokenizer(folder)
    shapes = dict(_shapes(config))
    total_nbytes = sum(shape.numel() for shape in shapes.values()) * dtype.itemsize
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def close_shard() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes.items():
        is_norm = len(shape) == 1
        shard[name] = torch.ones(shape, dtype=dtype) if is_norm else torch.empty(shape, dtype=dtype)
        if not is_norm:
            shard[name].normal_(0, 0.02, generator=generator)
        if sum(t.nbytes for t in shard.values()) >= total_nbytes / num_shards:
            close_shard()
    if shard:
        close_shard()
    index = {"metadata": {"total_size": total_nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total_nbytes


def save_random_calibration(
    folder: Path, *, link_names: Iterable[str], hidden_size: int, vocab_size: int, checkpoint: str
) -> None:
    """Files of `klt` as large as real ones, for hidden states as `save_random_llama`'s models have them."""
    folder.mkdir(parents=True, exist_ok=True)
    size, features = hidden_size, min(1024, hidden_size)
    origin = Origin(checkpoint=checkpoint, text_sha256="none")
    zeros, eye = torch.zeros(size), torch.eye(size, dtype=torch.bfloat16)
    calibration = LinkCalibration(
        mean=zeros,
        encode=eye,
        decode=eye.clone(),
        fixed_encode=eye.clone(),
        fixed_decode=eye.clone(),
        fixed_size=torch.ones(size),
        component_eighths=torch.zeros(size, dtype=torch.int32),
        token_out=(torch.randn(features, size) / size).bfloat16(),
        token_bias=zeros.clone(),
        finer=zeros.clone(),
        finer_bias=torch.zeros(2),
        rms_eighths=torch.tensor([-45], dtype=torch.int32),  # 0.02
        side_classes=torch.zeros(2, dtype=torch.int32),
        **prior_models(),
        rate_steps=torch.tensor([0.1, 1.0], dtype=torch.float64),
        rate_bits=torch.tensor([4.0, 1.0], dtype=torch.float64),
    )
    for name in link_names:
        write_calibration(folder, calibration, origin, link_name=name, num_tokens=0)
    table = TokenTable(
        frequent=torch.zeros(0, 0, dtype=torch.uint8),
        rare=torch.randint(0, 256, (vocab_size, packed_nbytes(features, 2)), dtype=torch.uint8),
        rows=torch.arange(vocab_size, dtype=torch.int32),
        group_sizes=torch.tensor([[0] * 8, [0, 0, 0, 0, 0, 0, features, 0]]),
        steps=torch.ones(2, features),
    )
    write_token_table(folder, table, origin)


def _shapes(config: LlamaConfig) -> Iterator[tuple[str, torch.Size]]:
    h, i, v = config.hidden_size, config.intermediate_size, config.vocab_size
    yield "model.embed_tokens.weight", torch.Size((v, h))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{prefix}.self_attn.{name}.weight", torch.Size((h, h))
        yield f"{prefix}.mlp.gate_proj.weight", torch.Size((i, h))
        yield f"{prefix}.mlp.up_proj.weight", torch.Size((i, h))
        yield f"{prefix}.mlp.down_proj.weight", torch.Size((h, i))
        yield f"{prefix}.input_layernorm.weight", torch.Size((h,))
        yield f"{prefix}.post_attention_layernorm.weight", torch.Size((h,))
    yield "model.norm.weight", torch.Size((h,))
    yield "lm_head.weight", torch.Size((v, h))


def _save_byte_tokenizer(folder: Path) -> None:
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
