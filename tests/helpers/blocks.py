"""Drawn blocks of every type that GGUF's matrices are kept as, and their weights as the gguf package has them."""

import gguf
import numpy as np
import torch

from pipeline.models.blocks.layouts import LAYOUTS

# Where a block has fp16 values: its scale, and its least weight or what those are multiplied with.
HALVES = {
    "BF16": (), "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q4_K": (0, 2),
    "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip


def draw_blocks(name, num_outputs, num_blocks, halves="ordinary", seed=0):
    """uint8 [num_outputs, bytes of a row], of any codes.

    `halves` are "ordinary" fp16 values of both signs, "subnormal" ones or "zero", of both signs, too; of BF16, whose
    weights have none, these are the weights.
    """
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (num_outputs, num_blocks, LAYOUTS[name].nbytes), dtype=np.uint8)
    places = range(0, 32, 2) if name == "BF16" else HALVES[name]
    least, most = {"ordinary": (1, 16), "subnormal": (0, 1), "zero": (0, 0)}[halves]
    mantissa_bits, bias = (7, 110) if name == "BF16" else (10, 0)
    for place in places:
        shape = (num_outputs, num_blocks, 1)
        bits = generator.integers(least << mantissa_bits, (most << mantissa_bits) + (halves == "zero"), shape)
        bits += bias << mantissa_bits if halves == "ordinary" else 0
        bits |= generator.integers(0, 2, shape) << 15
        blocks[..., place : place + 2] = bits.astype(np.uint16).view(np.uint8)
    return torch.from_numpy(blocks.reshape(num_outputs, -1))


def weights_of(blocks, name):
    """float32 [num_outputs, weights of a row]."""
    return torch.from_numpy(gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name]))
