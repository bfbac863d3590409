"""What a GGUF file's header tells before the file is converted: of which types the model's blocks will be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.models.blocks.layouts import LAYOUTS
from pipeline.models.families import FAMILIES
from pipeline.models.gguf_conversion import tensor_names
from pipeline.models.matrix_types import types_or_none
from pipeline.models.model_config import first_layer

__all__ = ["header_types"]


def header_types(gguf: Path, config: Any) -> dict[str, Any] | None:
    """`matrix_types` of a model of this config once the file is converted, None where no matrix is in known blocks.

    A matrix whose rows transformers changes stays float32, which only the conversion finds out. Raises ValueError for
    a file that cannot be read.
    """
    from gguf import GGUFReader  # imported here as in the conversion: few runs need it

    try:
        reader = GGUFReader(gguf)
        names = tensor_names(reader, config.num_hidden_layers)
    except Exception as error:  # of many types, for damaged files and for architectures it does not know
        raise ValueError(f"{gguf} cannot be read as GGUF: {type(error).__name__}: {error}") from error
    stored = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) == 2}
    family, model = FAMILIES[config.model_type], first_layer(config)
    _check_shapes(gguf, reader, names, model, config)

    def type_of(name: str) -> str | None:
        type_name = stored.get(names(name) or "")
        return type_name if type_name in LAYOUTS else None

    own = [name for name, weight in model.base_model.layers[0].named_parameters() if weight.dim() == 2]
    in_front = [f"{family.decoder}.layers.{layer}." for layer in range(config.num_hidden_layers)]
    layers = [{name: known for name in own if (known := type_of(start + name))} for start in in_front]
    embedding = type_of(f"{family.decoder}.{family.embedding}.weight")
    has_head = any(names(name) in stored for name in family.stored_heads)
    head = next(filter(None, map(type_of, family.stored_heads)), None) if has_head else embedding
    return types_or_none(layers, embedding, head)


def _check_shapes(gguf: Path, reader: Any, names: Any, model: Any, config: Any) -> None:
    """Raise ValueError where the file's first layer, or their number, is another than the config's."""
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    last = f"blk.{config.num_hidden_layers}."
    if any(name.startswith(last) for name in shapes):
        raise ValueError(
            f"{gguf} has more layers than model.architecture.num_hidden_layers, {config.num_hidden_layers}; take the "
            "architecture that belongs to the file"
        )
    for name, weight in model.named_parameters():
        found = shapes.get(names(name) or "")
        if weight.dim() == 2 and found is not None and found != tuple(weight.shape):
            raise ValueError(
                f"{gguf}: {names(name)} has shape {list(found)}, and by model.architecture it has "
                f"{list(weight.shape)}; take the architecture that belongs to the file"
            )
