"""Checkpoints whose weights blocks have, and stages that hold them as blocks."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from pipeline.config.schema import ModelConfig
from pipeline.models.blocks.layouts import LAYOUTS
from pipeline.models.blocks.storage import write_blocks
from pipeline.models.blocks.storage import block_types
from pipeline.models.checkpoint import read_checkpoint
from pipeline.models.loading import WeightFormat, load_stage
from pipeline.models.matrix_types import choose_matrix_types, stored_types
from pipeline.models.model_config import load_model_config
from pipeline.models.stage import Stage
from pipeline.partition.plan import default_plan
from tests.helpers.gguf_files import DRAWN_TYPES, draw_blocks

__all__ = ["CPU", "K_SIZES", "config_with_blocks", "dequantised_copy", "load_stages", "rows_are_whole"]

CPU = torch.device("cpu")
K_SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}  # of rows of whole blocks of 256


def rows_are_whole(shape: tuple[int, ...], type_name: str) -> bool:
    return len(shape) == 2 and shape[1] % LAYOUTS[type_name].num_weights == 0


def dequantised_copy(folder: Path, out: Path, type_of: Callable[[str], str | None], *, keep: bool = False) -> Path:
    """A checkpoint with the values that its matrices have as blocks of type `type_of(name)`, None for float32.

    Types that gguf cannot quantise to have drawn weights. With `keep` the blocks lie beside, as of a GGUF file.
    """
    shutil.copytree(folder, out)
    stored = load_file(out / "model.safetensors")
    tensors = {}
    for name, values in stored.items():
        type_name = type_of(name)
        if type_name is None or not rows_are_whole(values.shape, type_name):
            continue
        quantised_type = GGMLQuantizationType[type_name]
        if type_name in DRAWN_TYPES:
            blocks = draw_blocks(tuple(values.shape), type_name, seed=zlib.crc32(name.encode()))
        else:
            blocks = gguf.quantize(values.float().numpy(), quantised_type)
        stored[name] = torch.from_numpy(np.ascontiguousarray(gguf.dequantize(blocks, quantised_type)))
        tensors[name] = SimpleNamespace(name=name, data=blocks, tensor_type=quantised_type)
    save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    assert not keep or write_blocks(out, tensors) == []
    return out


def config_with_blocks(folder: Path, weights: str) -> Any:
    """A checkpoint's config with the types that `model.weights` comes to."""
    config = load_model_config(folder, {})
    stored = stored_types(read_checkpoint(folder, config, block_types(folder)))
    model = ModelConfig(name=str(folder), weights=weights)
    config.matrix_types = choose_matrix_types(model, config, lambda: stored, on_cpu=True)
    return config


def load_stages(folder: Path, weights: str, num_nodes: int = 1, *, wrap: bool = False) -> list[Stage]:
    """All stages of a ring, those of node 0 with one embedding."""
    config, embedding, stages = config_with_blocks(folder, weights), None, []
    for plan in default_plan(config.num_hidden_layers, num_nodes, wrap=wrap).stages:
        own = embedding if plan.node == 0 else None
        loaded = load_stage(folder, config, plan, WeightFormat(dtype=torch.float32), device=CPU, embedding=own)
        embedding = loaded.embedding if loaded.embedding is not None else embedding
        stages.append(Stage(plan, loaded, CPU, config.vocab_size))
    return stages
