"""The original benchmark's published points for Qwen3-32B, shipped as qwen3_32b_published.json.

Figures only; sizes are that benchmark's computed ones. Nothing here was measured by this program.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import ValidationError, model_validator

from pipeline.records.base import Amount, Count, Part, Positive, problem_in
from pipeline.records.files import RecordError

__all__ = ["PublishedFigures", "PublishedPoint", "read_published"]

PUBLISHED_FILE = Path(__file__).parent / "qwen3_32b_published.json"
# Means over tiles of several tokens: later tokens reach earlier ones.
_NOT_CAUSAL = "BlockRowColMean"


@dataclass(frozen=True, kw_only=True)
class PublishedPoint:
    """`first_k_tokens` 0 is the whole text."""

    method: str
    dtype: str
    first_k_tokens: int
    ppl: float
    bytes_per_token: float
    bits_per_value: float
    causal: bool


@dataclass(frozen=True, kw_only=True)
class PublishedFigures:
    model: str
    hidden_size: int
    hardware: str
    source: str
    max_length: int
    stride: int
    notes: tuple[str, ...]
    points: tuple[PublishedPoint, ...]


class _Row(NamedTuple):
    """Fields are the file's columns."""

    method: str
    dtype: str
    first_k_tokens: Count
    avg_ppl: Amount
    total_loss_tokens: Count
    bytes_per_token_per_link: Amount
    time_run_s: Amount


class _Protocol(Part):
    max_length: Count
    stride: Count
    batch_windows: Count
    load_in_8bit: bool


class _File(Part):
    model: str
    hidden_size: Positive
    num_hidden_layers: Positive
    num_nodes: Positive
    dataset: str
    hardware: str
    source: str
    protocol: _Protocol
    notes: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[_Row, ...]

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        if self.columns != _Row._fields:
            raise ValueError(f"columns are {', '.join(self.columns)}, expected {', '.join(_Row._fields)}")
        return self


def read_published() -> PublishedFigures:
    """Raises RecordError where the file is damaged."""
    try:
        file = _File.model_validate_json(PUBLISHED_FILE.read_bytes())
    except ValidationError as e:
        raise RecordError(f"{PUBLISHED_FILE} is damaged: {problem_in(e)}; install the package again") from e
    return PublishedFigures(
        model=file.model,
        hidden_size=file.hidden_size,
        hardware=file.hardware,
        source=file.source,
        max_length=file.protocol.max_length,
        stride=file.protocol.stride,
        notes=file.notes,
        points=tuple(
            PublishedPoint(
                method=row.method,
                dtype=row.dtype,
                first_k_tokens=row.first_k_tokens,
                ppl=row.avg_ppl,
                bytes_per_token=row.bytes_per_token_per_link,
                bits_per_value=8 * row.bytes_per_token_per_link / file.hidden_size,
                causal=not row.method.startswith(_NOT_CAUSAL),
            )
            for row in file.rows
        ),
    )
