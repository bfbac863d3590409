"""Importance that was computed beforehand: two kinds of safetensors files, written and read back with checks.

* token importance: a float32 tensor per link, named as the link, with one value per input token of every window
  (BOS included where windows have one), windows in order. It holds for one model, text and sliding window.
* head relevance: "head_relevance", float32 [layers of the model, heads], none negative. It holds for one model.

The metadata says what a file belongs to, and reading refuses any other deployment. Runs identify a file by its
content, so that its path may change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from pipeline.config.schema import DatasetConfig
from pipeline.records.files import disk_problem, write_whole

__all__ = [
    "ImportanceFileError",
    "TokenOwner",
    "file_digest",
    "read_head_relevance",
    "read_token_importance",
    "write_head_relevance",
    "write_token_importance",
]

TOKEN_IMPORTANCE = "thinwire token importance"
HEAD_RELEVANCE = "thinwire head relevance"
FORMAT_VERSION = "1"


class ImportanceFileError(ValueError):
    """A file that is damaged, of another kind, or made for another model, text or protocol."""


@dataclass(frozen=True, kw_only=True)
class TokenOwner:
    """Which runs a file of token importance is made for: their model, text and windows (`dataset.max_length`, ...)."""

    checkpoint_fingerprint: str
    ids_sha256: str
    max_length: int
    stride: int
    bos: str

    @classmethod
    def of(cls, dataset: DatasetConfig, checkpoint_fingerprint: str, ids_sha256: str) -> TokenOwner:
        """Of runs of this model that cut the text with these ids as `dataset` says."""
        return cls(
            checkpoint_fingerprint=checkpoint_fingerprint,
            ids_sha256=ids_sha256,
            max_length=dataset.max_length,
            stride=dataset.stride,
            bos=dataset.bos,
        )

    def metadata(self) -> dict[str, str]:
        return {key: str(value) for key, value in asdict(self).items()}


def write_token_importance(
    path: Path,
    by_link: Mapping[str, torch.Tensor],
    owner: TokenOwner,
    *,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write float32 [num tokens of all windows] per link name; `notes` are kept and not compared.

    Raises ValueError unless all tensors are 1-D float32 without NaN, and of one length, and where the disk does not
    take it.
    """
    for link, values in by_link.items():
        if values.dim() != 1 or values.dtype != torch.float32 or values.isnan().any():
            got = f"{values.dtype} {tuple(values.shape)}"
            raise ValueError(f"importance on {link} must be 1-D float32 without NaN, got {got}")
    lengths = {link: values.numel() for link, values in by_link.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"importance must have as many values on every link, got {lengths}")
    _write(path, TOKEN_IMPORTANCE, by_link, owner.metadata(), notes)


def read_token_importance(path: Path, link: str, owner: TokenOwner) -> torch.Tensor:
    """One link's values, float32 1-D on the CPU. Raises ImportanceFileError where it cannot be this owner's."""
    values = _read(path, TOKEN_IMPORTANCE, link, owner.metadata())
    if values.dim() != 1 or values.isnan().any():
        raise ImportanceFileError(f"{path}: {link} must be a row of numbers, got {tuple(values.shape)} or a NaN")
    return values


def write_head_relevance(
    path: Path, relevance: torch.Tensor, *, checkpoint_fingerprint: str, notes: Mapping[str, str] | None = None
) -> None:
    """Write float32 [layers of the model, heads]; `notes` say how it was made and are not compared.

    Raises ValueError for a value that is negative or not finite, and for a layer without any relevance.
    """
    problem = _relevance_problem(relevance)
    if problem:
        raise ValueError(f"head relevance {problem}")
    owner = {"checkpoint_fingerprint": checkpoint_fingerprint}
    _write(path, HEAD_RELEVANCE, {"head_relevance": relevance}, owner, notes)


def read_head_relevance(path: Path, *, checkpoint_fingerprint: str, num_layers: int, num_heads: int) -> torch.Tensor:
    """float32 [num_layers, num_heads] on the CPU. Raises ImportanceFileError where it cannot be this model's."""
    owner = {"checkpoint_fingerprint": checkpoint_fingerprint}
    relevance = _read(path, HEAD_RELEVANCE, "head_relevance", owner)
    problem = _relevance_problem(relevance)
    if problem or relevance.shape != (num_layers, num_heads):
        problem = problem or f"has shape {tuple(relevance.shape)}, the model has ({num_layers}, {num_heads})"
        raise ImportanceFileError(f"{path}: head relevance {problem}")
    return relevance


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of the content. Raises ImportanceFileError where there is no such file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as e:
        raise ImportanceFileError(f"{path} cannot be read: {e.strerror}") from e


def _relevance_problem(relevance: torch.Tensor) -> str | None:
    if relevance.dim() != 2 or relevance.dtype != torch.float32:
        return f"must be float32 [layers, heads], got {relevance.dtype} {tuple(relevance.shape)}"
    if not relevance.isfinite().all() or (relevance < 0).any():
        return "must be finite and not negative"
    if not (relevance.sum(1) > 0).all():
        return f"is 0 for all heads of layer {int((relevance.sum(1) <= 0).nonzero()[0])}"
    return None


def _write(
    path: Path,
    kind: str,
    tensors: Mapping[str, torch.Tensor],
    owner: Mapping[str, str],
    notes: Mapping[str, str] | None,
) -> None:
    metadata = {**(notes or {}), **owner, "kind": kind, "format_version": FORMAT_VERSION}
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        write_whole(path, save(on_cpu, metadata))
    except OSError as e:
        raise ImportanceFileError(f"{path} cannot be written: {disk_problem(e)}") from e


def _read(path: Path, kind: str, name: str, owner: Mapping[str, str]) -> torch.Tensor:
    """Tensor `name`, float32, of a file of this kind whose metadata agree with `owner`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") != kind or metadata.get("format_version") != FORMAT_VERSION:
                found = f"{metadata.get('kind')!r}, version {metadata.get('format_version')}"
                wanted = f"a {kind!r} file of version {FORMAT_VERSION}"
                raise ImportanceFileError(f"{path} is {found}; {wanted} is needed")
            for key, value in owner.items():
                if metadata.get(key) != value:
                    raise ImportanceFileError(f"{path} was made for {key} {metadata.get(key)}, this run has {value}")
            if name not in file.keys():
                there = ", ".join(sorted(file.keys()))
                raise ImportanceFileError(f"{path} has nothing for {name}, only for: {there}")
            tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as e:
        raise ImportanceFileError(f"{path} cannot be read: {e}") from e
    if tensor.dtype != torch.float32:
        raise ImportanceFileError(f"{path}: {name} must be float32, got {tensor.dtype}")
    return tensor
