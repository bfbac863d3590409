"""Texts of many kinds, to calibrate on beside the config's own text, and how they are put together.

What the model makes of one kind of text says little of another: other scripts, code and records have other tokens and
other hidden states. The kinds are files of the folder `mixture`, written for this project, and Python source, which is
the running interpreter's own.
"""

from __future__ import annotations

import itertools
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

__all__ = ["PYTHON_MODULES", "apportion", "load_kinds", "mix"]

PIECE_TOKENS = 256
PYTHON_MODULES = ("calendar", "csv", "fractions", "heapq", "queue", "sched", "statistics", "textwrap")

_FOLDER = Path(__file__).parent / "mixture"


def load_kinds() -> dict[str, str]:
    """Texts by kind, those with the file's name first. Raises ValueError where the standard library has no source."""
    kinds = {path.stem: path.read_text(encoding="utf-8") for path in sorted(_FOLDER.glob("*.txt"))}
    return kinds | {"python": _python_source()}


def apportion(num_tokens: int, available: Sequence[int]) -> list[int]:
    """How many tokens each kind gives: as many as the others, or all of its own where these are fewer.

    They sum to `num_tokens`, or to all that is available.
    """
    given = [0] * len(available)
    left = num_tokens
    poorest_first = sorted(range(len(available)), key=lambda kind: available[kind])
    for rank, kind in enumerate(poorest_first):
        given[kind] = min(available[kind], left // (len(available) - rank))
        left -= given[kind]
    return given


def mix(kinds: Sequence[np.ndarray], held_out: np.ndarray) -> np.ndarray:
    """All tokens of all kinds, int64 [num_tokens], such that each kind has its share of what is held out.

    `held_out`, bool [num_tokens], says of each place whether it is. Here and there, pieces of at most `PIECE_TOKENS`
    alternate, each kind spread evenly over the whole. A kind's last tokens are those held out, so that no paragraph is
    on both sides; the first token of the first kind comes first.
    """
    num_tokens, num_held_out = len(held_out), int(held_out.sum())
    ends = np.cumsum([len(ids) for ids in kinds])
    counts = np.diff(ends * num_held_out // num_tokens, prepend=0)
    mixed = np.empty(num_tokens, dtype=np.int64)
    mixed[~held_out] = _interleaved([ids[: len(ids) - n] for ids, n in zip(kinds, counts, strict=True)])
    mixed[held_out] = _interleaved([ids[len(ids) - n :] for ids, n in zip(kinds, counts, strict=True)])
    return mixed


def _interleaved(kinds: Sequence[np.ndarray]) -> np.ndarray:
    placed = []
    for kind, ids in enumerate(kinds):
        pieces = [ids[start : start + PIECE_TOKENS] for start in range(0, len(ids), PIECE_TOKENS)]
        offset = (kind + 0.5) / len(kinds)
        placed += [((number + offset) / len(pieces), kind, piece) for number, piece in enumerate(pieces)]
    placed.sort(key=lambda place: place[:2])
    return np.concatenate([np.empty(0, dtype=np.int64), *(piece for _, _, piece in placed)])


def _python_source() -> str:
    """Top-level blocks of the modules in turn, so that the first few are not all of one module."""
    folder = Path(sysconfig.get_path("stdlib"))
    blocks = []
    for name in PYTHON_MODULES:
        path = folder / f"{name}.py"
        try:
            blocks.append(path.read_text(encoding="utf-8").strip().split("\n\n\n"))
        except OSError as e:
            raise ValueError(
                f"{path} cannot be read ({e.strerror}): the calibration's mixture takes Python source from the "
                "standard library; install it whole, or calibrate with --mixture 0"
            ) from e
    turns = itertools.chain.from_iterable(itertools.zip_longest(*blocks))
    return "\n\n\n".join(block for block in turns if block is not None)
