"""The table of all config keys in docs/configuration.md, made from the dataclasses of `config.schema`.

    python -m pipeline.config.key_table

prints it. A test compares the page with it. Rules between keys are not in it; `schema` checks them.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config.schema import RunConfig

__all__ = ["key_table"]

_WORDS = {str: "string", int: "integer", float: "number", bool: "`true` or `false`", type(None): "`null`"}


def key_table() -> str:
    """A Markdown table with a row per key: its dotted name, type and limits, default, meaning."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    rows += [f"| {' | '.join(cells)} |" for cells in _rows(RunConfig, "")]
    return "\n".join(rows) + "\n"


def _rows(cls: type, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        key, hint = prefix + f.name, hints[f.name]
        if dataclasses.is_dataclass(hint):
            yield from _rows(typing.cast(type, hint), f"{key}.")
            continue
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        shown = default if isinstance(default, str) else json.dumps(default)
        yield f"`{key}`", _type(hint, f.metadata), f"`{shown}`", f.metadata["meaning"]
        for item in typing.get_args(hint):
            if dataclasses.is_dataclass(item):
                yield from _rows(typing.cast(type, item), f"{key}[i].")


def _type(hint: Any, metadata: Mapping[str, Any]) -> str:
    """What a key's value may be, in words."""
    if "choices" in metadata:
        return ", ".join(f"`{choice}`" for choice in metadata["choices"])
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if metadata.get("one_or_more"):
        options = (*typing.get_args(hint)[:1], hint)
    words = [_words(option) for option in options]
    limits = {"minimum": "at least", "above": "above", "maximum": "at most"}
    bounds = [f"{word} {metadata[name]}" for name, word in limits.items() if name in metadata]
    return " or ".join([words[0] + (f" ({', '.join(bounds)})" if bounds else ""), *words[1:]])


def _words(hint: Any) -> str:
    """One type, without limits."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) or (origin is not None and issubclass(origin, Mapping)):
        return "mapping"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"[{', '.join(map(_words, arguments))}]"
    if origin is not None:
        item = _words(arguments[0])
        return f"list of {item}" + "s" * (not item.endswith("]"))
    return _WORDS[hint]


if __name__ == "__main__":
    print(key_table(), end="")
