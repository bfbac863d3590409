"""Checks of codec options: a ValueError names the codec, the option, what it got and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

__all__ = ["check_choice", "check_int", "option_error"]


def option_error(codec: str, option: str, got: Any, allowed: str) -> ValueError:
    """The error for option `option` of `codec`."""
    return ValueError(f"compressor {codec!r}: {option} is {got!r}, allowed: {allowed}")


def check_choice(codec: str, option: str, got: Any, allowed: Iterable[Any]) -> Any:
    """`got` if it equals one of `allowed`, of the same type (so True is not 1)."""
    choices = list(allowed)
    if not any(type(got) is type(choice) and got == choice for choice in choices):
        raise option_error(codec, option, got, ", ".join(map(str, choices)))
    return got


def check_int(codec: str, option: str, got: Any, low: int, high: int) -> int:
    """`got` if it is an int in [low, high]."""
    if isinstance(got, bool) or not isinstance(got, int) or not low <= got <= high:
        raise option_error(codec, option, got, f"an integer from {low} to {high}")
    return got
