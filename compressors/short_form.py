"""`name(option=value, ...)` as people write it on a command line: a name and its options.

Values are YAML scalars, further short forms, which stay text, or lists of either. What names and options there are is
the registries' business, of codecs (`registry`) and of whatever else is named so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from compressors.strict_yaml import MAX_DEPTH, parse_yaml_value
from compressors.user_files import InputError

__all__ = ["did_you_mean", "parse_short_form"]

_SHORT_FORM = re.compile(r"\s*(?P<name>[\w.]+(?::\w+)?)\s*(?:\((?P<arguments>.*)\))?\s*", re.DOTALL)
_NAMED_ARGUMENT = re.compile(r"\s*(?P<key>[A-Za-z_]\w*)\s*=(?P<value>.*)", re.DOTALL)


def parse_short_form(text: str, what: str, *, unnamed: str | None = None) -> tuple[str, dict[str, Any]]:
    """(name, options). An argument without a name is the option `unnamed`, or refused where there is none.

    Raises ValueError, which begins with `what` and the text.
    """
    where = f"{what} {text!r}"
    match = _SHORT_FORM.fullmatch(text)
    if not match:
        raise ValueError(f"{where} is not of the form name or name(option=value, ...)")
    options: dict[str, Any] = {}
    for argument in _split_arguments(match["arguments"] or "", what, text):
        named = _NAMED_ARGUMENT.fullmatch(argument)
        if named is None and unnamed is None:
            raise ValueError(f"{where}: write {argument.strip()!r} as option=value")
        key, value = (named["key"], named["value"]) if named else (str(unnamed), argument)
        if key in options:
            raise ValueError(f"{where}: option {key} is given twice")
        options[key] = _parse_value(value, what, f"{where}: {key}={value.strip()}")
    return match["name"], options


def did_you_mean(close: Sequence[str]) -> str:
    """What to say of names that are like an unknown one (`difflib.get_close_matches`)."""
    return f", did you mean {' or '.join(map(repr, close))}?" if close else ""


def _parse_value(text: str, what: str, where: str) -> Any:
    """A YAML scalar, or a list, whose items may be short forms: YAML alone would cut at their commas."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [_parse_value(item, what, where) for item in _split_arguments(text[1:-1], what, text)]
    return parse_yaml_value(text, where)


def _split_arguments(arguments: str, what: str, text: str) -> list[str]:
    """Cut at the commas that stand outside all brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(arguments):
        depth += (character in "([") - (character in ")]")
        if not 0 <= depth <= MAX_DEPTH:
            break
        if character == "," and depth == 0:
            parts.append(arguments[start:i])
            start = i + 1
    if depth > MAX_DEPTH:
        raise InputError(f"{what} {text[:80]!r}...: nested deeper than {MAX_DEPTH} levels")
    if depth != 0:
        raise ValueError(f"{what} {text!r}: brackets do not match")
    parts.append(arguments[start:])
    if len(parts) == 1 and not parts[0].strip():
        return []
    if not all(part.strip() for part in parts):
        raise ValueError(f"{what} {text!r}: an argument is empty")
    return parts
