"""The original benchmark's published points for Qwen3-32B, shipped as qwen3_32b_published.json.

Figures only; sizes are that benchmark's computed ones. Nothing here was measured by this program.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PublishedFigures", "PublishedPoint", "read_published"]

_FILE = Path(__file__).parent / "qwen3_32b_published.json"
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


def read_published() -> PublishedFigures:
    figures = json.loads(_FILE.read_text(encoding="utf-8"))
    rows = [dict(zip(figures["columns"], row, strict=True)) for row in figures["rows"]]
    return PublishedFigures(
        model=figures["model"],
        hidden_size=figures["hidden_size"],
        hardware=figures["hardware"],
        source=figures["source"],
        max_length=figures["protocol"]["max_length"],
        stride=figures["protocol"]["stride"],
        notes=tuple(figures["notes"]),
        points=tuple(
            PublishedPoint(
                method=row["method"],
                dtype=row["dtype"],
                first_k_tokens=row["first_k_tokens"],
                ppl=row["avg_ppl"],
                bytes_per_token=row["bytes_per_token_per_link"],
                bits_per_value=8 * row["bytes_per_token_per_link"] / figures["hidden_size"],
                causal=not row["method"].startswith(_NOT_CAUSAL),
            )
            for row in rows
        ),
    )
