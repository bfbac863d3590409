"""Marks for tests of many parameters, of which some are enough while something is being changed."""

from collections.abc import Container, Iterable
from typing import Any

import pytest

__all__ = ["slow_but", "slowly"]


def slow_but(quick: Container[Any], values: Iterable[Any]) -> list[Any]:
    """`values` as parameters, those that are not in `quick` with the mark `slow`."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def slowly(*values: Any) -> Any:
    """A set of parameters with the mark `slow`, as `pytest.param` gives."""
    return pytest.param(*values, marks=pytest.mark.slow)
