"""The project's Python files and what they consist of, each parsed once, for tests of house rules."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

__all__ = ["ROOT", "nodes_of", "sources"]

ROOT = Path(__file__).resolve().parents[2]


def sources(*folders: str) -> list[Path]:
    """All Python files in these folders of the project, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@functools.cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file's syntax tree, the module first."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
