"""What a checkpoint stores, tensor by tensor: whose each one is, and whether head and embedding are one.

Between the files and `loading`, which loads a stage's share. Reads headers; values only where two stored tensors
have to be compared. Every stored tensor belongs to the embedding, a layer, the norm or the head, or is known to be
harmless; anything else is an error, since a model that leaves out a stored tensor is another model. Whether a layer
has use for the tensors stored under its number is for transformers to say, which knows their names of all times.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from pipeline.models.families import FAMILIES, TELLING_FIELDS, Family, cut_config
from pipeline.models.weight_files import reading, weight_files

__all__ = ["MAX_MAPPED_NBYTES", "Checkpoint", "ModelError", "StoredTensor", "read_checkpoint"]

# Of a stored tensor, at most so much (or one row) is mapped beside its copy in memory.
MAX_MAPPED_NBYTES = 16 * 2**20

_FLOATS = ("F64", "F32", "F16", "BF16")
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
# What quantisers store beside a weight or in its place; without its config such a model loads as another one.
_QUANTISED = re.compile(
    r"(scale|scales|scale_inv|scale_\d|qweight|qzeros|zeros|zero_point|g_idx|SCB|absmax|quant_map|weight_packed|"
    r"weight_shape|weight_format|nested_absmax|nested_quant_map|quant_state\.\w+|qdata|codebook|codes|_amax)$"
)
_CURE = "take the unquantised checkpoint, with model.load_in_8bit or load_in_4bit"


class ModelError(ValueError):
    """A checkpoint or architecture that cannot be cut into stages."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint file, read and cast when transformers asks for its contents with `[...]`.

    The file is opened for this one tensor, and anew for each part of a large one: pages of a mapping count as
    resident for as long as it exists. Floating-point values are cast to `dtype`, where there is one. `block_type` is
    the type of the blocks that lie beside the checkpoint with the same values, None where none do.
    """

    path: Path
    name: str
    dtype: torch.dtype | None = None
    block_type: str | None = None

    def __getitem__(self, index: Any) -> torch.Tensor:
        with reading(self.path, self.name), safe_open(self.path, framework="pt") as checkpoint:
            stored = checkpoint.get_tensor(self.name)  # a mapping, of which nothing is read yet
            dtype = self.dtype if self.dtype is not None and stored.is_floating_point() else stored.dtype
            tensor = torch.empty(stored.shape, dtype=dtype)
            if stored.nbytes <= MAX_MAPPED_NBYTES:
                return tensor.copy_(stored)[index]
            del stored
        for rows, part in self.parts():
            tensor[rows].copy_(part)
        return tensor[index]

    @property
    def shape(self) -> tuple[int, ...]:
        with reading(self.path, self.name), safe_open(self.path, framework="pt") as checkpoint:
            return tuple(checkpoint.get_slice(self.name).get_shape())

    def parts(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Rows and their values as stored, a mapping of at most `MAX_MAPPED_NBYTES` (or one row) at a time."""
        with reading(self.path, self.name), safe_open(self.path, framework="pt") as checkpoint:
            stored = checkpoint.get_tensor(self.name)
            length = len(stored)
            num_rows = max(1, MAX_MAPPED_NBYTES * length // max(1, stored.nbytes))
            del stored
        for start in range(0, length, num_rows):
            with reading(self.path, self.name), safe_open(self.path, framework="pt") as checkpoint:
                rows = slice(start, start + num_rows)
                yield rows, checkpoint.get_slice(self.name)[rows]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint's tensors under the names that they have in the model's class.

    `layers` has name -> tensor per layer, names without what stands in front of them; `norm` the same of the final
    norm. `embedding` and `head` are one tensor where they are tied. `notes` are sentences that a reader of numbers
    made with this checkpoint must know.
    """

    embedding: StoredTensor
    layers: tuple[dict[str, StoredTensor], ...]
    norm: dict[str, StoredTensor]
    head: StoredTensor
    notes: tuple[str, ...]

    @property
    def is_tied(self) -> bool:
        return self.head is self.embedding


def read_checkpoint(model_dir: Path, config: Any, types: Mapping[str, str] = MappingProxyType({})) -> Checkpoint:
    """Account for every tensor that `model_dir` stores for a model of `config`.

    `types` are those of the blocks that lie beside it (`storage.block_types`), where they are wanted.

    Names are taken with and without the decoder's prefix, as transformers does. Raises ModelError for a tensor that is
    of no use to the model, for weights of integers or with scales beside them, and where whole parts are missing.
    """
    family = FAMILIES[config.model_type]
    num_layers = config.num_hidden_layers
    parts: defaultdict[int | str, dict[str, StoredTensor]] = defaultdict(dict)
    inverse_frequencies: list[StoredTensor] = []
    float8: list[str] = []
    for path, stored, dtype in _stored(model_dir):
        if any(re.search(pattern, f".{stored}") for pattern in family.harmless):
            if stored.endswith("inv_freq"):
                inverse_frequencies.append(StoredTensor(path, stored))
            continue
        place = _place(stored, family)
        if place is None or _QUANTISED.search(stored):
            raise ModelError(unused_tensor(model_dir, stored, config.model_type))
        part, name = place
        if isinstance(part, int) and part >= num_layers:
            raise ModelError(
                f"{model_dir} stores {stored!r}, but its config.json has num_hidden_layers {num_layers}: the "
                "model would lack its last layers. Correct the one or the other"
            )
        if name in parts[part]:
            raise ModelError(f"{model_dir} stores one tensor twice, as {parts[part][name].name!r} and as {stored!r}")
        if dtype in _FLOAT8:
            float8.append(stored)
        elif dtype not in _FLOATS:
            raise ModelError(
                f"{model_dir} stores {stored!r} as {dtype}, and its config.json has no quantization_config that says "
                f"what the numbers stand for; {_CURE}"
            )
        parts[part][name] = StoredTensor(path, stored, block_type=types.get(stored))
    lacking = [index for index in range(num_layers) if index not in parts]
    if lacking:
        raise ModelError(
            f"{model_dir} stores nothing of layer {lacking[0]}; its config.json has num_hidden_layers {num_layers}"
        )
    embedding, head, notes = _ends(model_dir, config, family, parts["ends"])
    if float8:
        notes.append(
            f"{len(float8)} weights ({float8[0]} is the first) are stored in 8-bit floating point without scales, and "
            "taken as they are"
        )
    notes += _rotary_notes(config, inverse_frequencies)
    notes += _config_notes(config, family)
    layers = tuple(parts[index] for index in range(num_layers))
    return Checkpoint(embedding=embedding, layers=layers, norm=parts["norm"], head=head, notes=tuple(notes))


def _place(stored: str, family: Family) -> tuple[int | str, str] | None:
    """A tensor's part of the model (a layer's number, "norm" or "ends") and its name there; None for no part."""
    name = stored.removeprefix(f"{family.decoder}.")
    number, _, rest = name.removeprefix("layers.").partition(".")
    if name.startswith("layers.") and number.isdecimal():
        return int(number), rest
    if name.startswith(f"{family.norm}."):
        return "norm", name
    if name == f"{family.embedding}.weight":
        return "ends", "embedding"
    if name in family.stored_heads:
        return "ends", "head"
    return None


def unused_tensor(model_dir: Path, stored: str, model_type: str) -> str:
    """What to say of a stored tensor that the model has no use for."""
    if _QUANTISED.search(stored):
        return (
            f"{model_dir} stores {stored!r}, so its weights are quantised, and its config.json has no "
            f"quantization_config: without the scales it would be another model; {_CURE}"
        )
    return (
        f"{model_dir} stores {stored!r}, for which a model of type {model_type!r} has no use: without it the result "
        "may be another model's. Take a checkpoint that fits its config.json, or remove the tensor"
    )


def _stored(model_dir: Path) -> Iterator[tuple[Path, str, str]]:
    """File, name and dtype (as safetensors writes it) of every stored tensor."""
    for path in weight_files(model_dir):
        with reading(path, "its header"), safe_open(path, framework="pt") as checkpoint:
            tensors = [(name, checkpoint.get_slice(name).get_dtype()) for name in checkpoint.keys()]
        for name, dtype in tensors:
            yield path, name, dtype


def _ends(
    model_dir: Path, config: Any, family: Family, ends: dict[str, StoredTensor]
) -> tuple[StoredTensor, StoredTensor, list[str]]:
    """Embedding, head and notes. transformers' rule: tied are those that the config ties, unless both are stored and
    differ; where one is stored, it is both."""
    tied = bool(config.tie_word_embeddings)
    if tied and len(ends) == 1:
        (one,) = ends.values()
        return one, one, []
    for end, name in (("embedding", f"{family.decoder}.{family.embedding}.weight"), ("head", family.stored_heads[0])):
        if end not in ends:
            raise ModelError(
                f"{model_dir} lacks {name}, and its config.json has tie_word_embeddings {str(tied).lower()}; fetch the "
                "checkpoint again, or correct the config"
            )
    embedding, head = ends["embedding"], ends["head"]
    if tied and _are_equal(embedding, head):
        return embedding, embedding, []
    notes = [
        f"config.json has tie_word_embeddings true, but {head.name} is stored and differs from {embedding.name}; it is "
        "the head here, as in transformers"
    ]
    return embedding, head, notes if tied else []


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    return all(
        part.shape == other_part.shape and torch.equal(part, other_part)
        for (_, part), (_, other_part) in itertools.zip_longest(
            one.parts(), other.parts(), fillvalue=(None, torch.empty(0))
        )
    )


def _rotary_notes(config: Any, stored: list[StoredTensor]) -> list[str]:
    """Stored inverse frequencies are not used, by transformers either; they may tell of another scaling."""
    if not stored:
        return []
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(cut_config(config, 0, 1))
    expected = getattr(type(model.base_model.rotary_emb)(config), "inv_freq", None)
    if expected is None:
        return []
    for tensor in stored:
        values = tensor[...].float()
        if values.shape != expected.shape or not torch.allclose(values, expected, rtol=0.01, atol=0):
            return [
                f"{tensor.name} is stored and differs from what config.json says of positions; the config is followed, "
                "as in transformers"
            ]
    return []


def _config_notes(config: Any, family: Family) -> list[str]:
    return [
        f"config.json has {field}, which models of type {config.model_type!r} do not read in transformers; it has no "
        "effect"
        for field in TELLING_FIELDS
        if field not in family.reads and getattr(config, field, None) not in (None, False, 0, 1, [], {})
    ]
