"""Where blocks come from: a file beside a checkpoint that was converted from GGUF, or float32 weights at load.

The file has for every matrix that the GGUF file keeps in blocks these very blocks, with rows in the checkpoint's order
and under the checkpoint's names. It belongs to one checkpoint, whose fingerprint it has, and is refused beside another.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from pipeline.models.blocks.layouts import LAYOUTS
from pipeline.models.blocks.products import BlockMatrix
from pipeline.models.weight_files import checkpoint_fingerprint, reading, weight_files

__all__ = ["BLOCKS_FILE", "block_types", "random_matrix", "read_matrix", "write_blocks"]

BLOCKS_FILE = "thinwire_blocks.safetensors"
_CHECKPOINT = "checkpoint"  # of the file's metadata; the other keys are names of matrices
_FLOATS = ("F64", "F32", "F16")
_ROWS_AT_ONCE = 4096  # that are compared
_LARGEST = 65504.0  # of an fp16, which a block's least weight is


def write_blocks(directory: Path, tensors: Mapping[str, Any]) -> list[str]:
    """Write beside a float32 checkpoint the blocks of those of its matrices that the GGUF file keeps in blocks.

    `tensors` are GGUFReader's by the checkpoint's names. Returns, in words, which matrices of blocks are left out:
    of a type that is not known here, with values that are not the checkpoint's in any order of rows, or with values
    that are not finite, of which products with blocks would make numbers.
    """
    kept: dict[str, np.ndarray] = {}
    told: dict[str, str] = {}  # type and digest by name
    left: dict[str, list[str]] = {}
    for name, values in _matrices(directory):
        tensor = tensors.get(name)
        if tensor is None or tensor.tensor_type.name in _FLOATS:
            continue
        type_name = tensor.tensor_type.name
        if type_name not in LAYOUTS:
            left.setdefault(f"blocks of type {type_name}, which are not multiplied with", []).append(name)
        elif not np.isfinite(values).all():
            left.setdefault("values that are not finite", []).append(name)
        elif (blocks := _in_order(tensor, values)) is None:
            left.setdefault("other rows than the GGUF file has", []).append(name)
        else:
            kept[name] = np.ascontiguousarray(blocks)
            told[name] = f"{type_name} {hashlib.sha256(kept[name].data).hexdigest()}"
    if kept:
        save_file(kept, directory / BLOCKS_FILE, metadata={**told, _CHECKPOINT: checkpoint_fingerprint(directory)})
    return [f"{len(names)} matrices with {what} ({names[0]} is the first)" for what, names in left.items()]


def _matrices(directory: Path) -> Iterator[tuple[str, np.ndarray]]:
    for path in weight_files(directory):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():
                if len(file.get_slice(name).get_shape()) == 2:
                    yield name, file.get_tensor(name)


def _in_order(tensor: Any, values: np.ndarray) -> np.ndarray | None:
    """A GGUF tensor's blocks in the order in which `values` has its rows; None where it does not have them."""
    from gguf import dequantize

    blocks = np.asarray(tensor.data).view(np.uint8)
    if len(blocks) != len(values):
        return None
    parts = [slice(first, first + _ROWS_AT_ONCE) for first in range(0, len(blocks), _ROWS_AT_ONCE)]
    if all(np.array_equal(dequantize(blocks[part], tensor.tensor_type), values[part]) for part in parts):
        return blocks
    places: dict[bytes, list[int]] = {}
    for part in parts:
        for place, row in enumerate(dequantize(blocks[part], tensor.tensor_type), part.start):
            places.setdefault(row.tobytes(), []).append(place)
    try:
        return blocks[[places[row.tobytes()].pop() for row in values]]
    except (KeyError, IndexError):
        return None


def block_types(directory: Path) -> dict[str, str]:
    """Type by name of the matrices whose blocks lie beside a checkpoint; empty where none do.

    Raises ValueError for a file of blocks that belongs to another checkpoint, or has a type that is not known.
    """
    path = directory / BLOCKS_FILE
    if not path.is_file():
        return {}
    with reading(path, "its header"), safe_open(path, framework="numpy") as file:
        told = dict(file.metadata() or {})
        names = {name for name in file.keys() if file.get_slice(name).get_dtype() == "U8"}
    if told.pop(_CHECKPOINT, None) != checkpoint_fingerprint(directory):
        raise ValueError(
            f"{path} was made for another checkpoint than the one beside it; convert the GGUF file anew, or delete it"
        )
    types = {name: value.partition(" ")[0] for name, value in told.items()}
    unknown = sorted(set(types.values()) - LAYOUTS.keys())
    if unknown or set(types) != names:
        raise ValueError(f"{path} is damaged: types {unknown}, names {sorted(set(types) ^ names)[:3]}; convert anew")
    return types


def read_matrix(directory: Path, stored: Any, type_name: str) -> BlockMatrix:
    """A matrix [N, K] of a checkpoint (`StoredTensor`) as blocks: those beside it, or made of it at load.

    Reads into memory of its own, a few rows at a time. Raises ValueError for blocks of another size than the matrix',
    or other bytes than were written, and for weights that none can be made of.
    """
    num_rows, num_inputs = stored.shape
    layout = LAYOUTS[type_name]
    blocks = torch.empty(num_rows, layout.row_nbytes(num_inputs), dtype=torch.uint8)
    if stored.block_type == type_name:
        kept = dataclasses.replace(stored, path=directory / BLOCKS_FILE)
        if kept.shape != tuple(blocks.shape):
            raise ValueError(
                f"{kept.path}: {stored.name} has {list(kept.shape)} bytes of {type_name}, and the checkpoint's matrix "
                f"{list(blocks.shape)}; convert the GGUF file anew"
            )
        digest = hashlib.sha256()
        for rows, part in kept.parts():
            blocks[rows] = part
            digest.update(blocks[rows].numpy().data)
        with reading(kept.path, "its header"), safe_open(kept.path, framework="numpy") as file:
            told = file.metadata()[stored.name]
        if told != f"{type_name} {digest.hexdigest()}":
            raise ValueError(f"{kept.path}: the blocks of {stored.name} are damaged; convert the GGUF file anew")
    else:
        for rows, part in stored.parts():
            weights = part.float()
            least, largest = weights.aminmax()  # NaN where one is
            if type_name != "BF16" and not -_LARGEST <= least <= largest <= _LARGEST:
                raise ValueError(
                    f"{stored.path}: {stored.name} has weights that are not finite or above {_LARGEST:.0f}, of which "
                    f"{type_name} cannot be made; leave out model.weights, or fetch the file again"
                )
            blocks[rows] = _quantised(weights, type_name)
    return BlockMatrix(blocks, type_name)


def _quantised(weights: torch.Tensor, type_name: str) -> torch.Tensor:
    """uint8 [N, bytes of a row] of float32 [N, K], as ggml quantises."""
    from gguf import GGMLQuantizationType, quantize

    return torch.from_numpy(quantize(weights.contiguous().numpy(), GGMLQuantizationType[type_name]))


def random_matrix(shape: tuple[int, int], type_name: str, generator: torch.Generator) -> BlockMatrix:
    """To be timed. No byte is above 59, so that whatever is read of them as fp16 is between 0 and 1."""
    nbytes = LAYOUTS[type_name].row_nbytes(shape[1])
    blocks = torch.randint(60, (shape[0], nbytes), generator=generator, dtype=torch.uint8)
    return BlockMatrix(blocks, type_name)
