"""The map of the drafter `shortcut`: one safetensors file in a calibration's folder.

Written by `analysis.shortcut_calibration`, read once on rank 0. Its metadata name the format, the model's checkpoint,
the layers that the map leads past, the text and its tokens; a file of another checkpoint or other layers is refused.
Which node holds the layers between makes no difference to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from compressors.user_files import user_path
from pipeline.partition.plan import Plan

__all__ = ["FILE", "FORMAT", "ShortcutMap", "check_plan", "read_shortcut", "skipped_layers", "write_shortcut"]

FORMAT = "thinwire shortcut 1"
FILE = "shortcut.safetensors"  # no link's name comes to this
_MADE_BY = "python -m pipeline.calibrate --shortcut"


@dataclass(frozen=True, kw_only=True, eq=False)
class ShortcutMap:
    """y_t = [x_t, e_t, y_{t-1}] @ weights + bias, in the words of `drafting.shortcut`.

    `weights` float32 [3 H, H], `bias` float32 [H]; `likely_ids` int32 [K], rising, are the tokens to choose from.
    """

    weights: torch.Tensor
    bias: torch.Tensor
    likely_ids: torch.Tensor


def check_plan(plan: Plan) -> None:
    """Raise ValueError for a plan without a shortcut: node 0 must have both ends, and others be between."""
    if not plan.links:
        raise ValueError("one node has all layers, so there is nothing to cut short; set partition.num_nodes above 1")
    if plan.last_node != 0:
        raise ValueError(
            f"the last layers are on node {plan.last_node}, and a shortcut leads to last layers on node 0; take a plan "
            "with partition.wrap=true, or one whose nodes[0] has both ends"
        )


def skipped_layers(plan: Plan) -> str:
    """The layers that the map leads past, half-open: `3-26`."""
    return f"{plan.stages[0].end}-{plan.stages[-1].start}"


def write_shortcut(
    folder: Path, content: ShortcutMap, plan: Plan, *, checkpoint: str, text_sha256: str, num_tokens: int
) -> Path:
    """Write the file; returns its path. Raises ValueError where the disk does not take it."""
    facts = {
        "format": FORMAT,
        "checkpoint": checkpoint,
        "skipped_layers": skipped_layers(plan),
        "text_sha256": text_sha256,
        "num_tokens": str(num_tokens),
    }
    path = folder / FILE
    unfinished = path.with_suffix(".tmp")
    try:
        # Written here, not by safetensors: its files can be read by their owner alone.
        unfinished.write_bytes(save({f.name: getattr(content, f.name) for f in dataclasses.fields(content)}, facts))
        unfinished.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise ValueError(f"{path} cannot be written: {e.strerror or e}; make room there, or name another folder") from e
    return path


def read_shortcut(folder: str, plan: Plan, *, checkpoint: str, hidden_size: int, vocab_size: int) -> ShortcutMap:
    """The map in `folder` for a model and a plan.

    Raises ValueError for a file that is missing, damaged, or of another checkpoint, other layers or sizes.
    """
    if not isinstance(folder, str):  # a name of digits is a number in YAML
        raise ValueError(f"calibration is {folder!r}, expected a folder; write its name in quotes")
    path = Path(user_path(folder)) / FILE
    expected = {"format": FORMAT, "checkpoint": checkpoint, "skipped_layers": skipped_layers(plan)}
    shapes = {"weights": [3 * hidden_size, hidden_size], "bias": [hidden_size]}
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            for key, value in expected.items():
                if facts.get(key) != value:
                    raise ValueError(
                        f"{path} has {key} {facts.get(key)!r}, this run {value!r}; make it anew with {_MADE_BY}"
                    )
            found = {name: file.get_slice(name) for name in file.keys()}  # which reads nothing yet
            sizes = {name: part.get_shape() for name, part in found.items()}
            kinds = {name: part.get_dtype() for name, part in found.items()}
            num_ids = (sizes.get("likely_ids") or [0])[0]
            whole = sizes == shapes | {"likely_ids": [num_ids]} and 1 <= num_ids <= vocab_size
            if not whole or kinds != dict.fromkeys(shapes, "F32") | {"likely_ids": "I32"}:
                raise _damaged(path, f"tensors {sizes} for hidden size {hidden_size} and {vocab_size} tokens")
            content = ShortcutMap(**{name: file.get_tensor(name).clone() for name in found})
    except (OSError, SafetensorError) as e:
        if not path.is_file():
            raise ValueError(f"there is no file {path}; make it with {_MADE_BY}") from e
        raise _damaged(path, str(e)) from e
    if not (content.weights.isfinite().all() and content.bias.isfinite().all()):
        raise _damaged(path, "the map is not finite")
    ids = content.likely_ids
    if ids[0] < 0 or ids[-1] >= vocab_size or (ids.diff() < 1).any():
        raise _damaged(path, "likely_ids are no rising token ids of the model")
    return content


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} is no whole file of format {FORMAT!r} ({what}); make it anew with {_MADE_BY}")
