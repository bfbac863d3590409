"""Drafters by name: those that are shipped and `package.module:Class`, with options in brackets as codecs have them.

A spec's name and form are checked when the config is read (`config.reading`); classes are imported here, when first
asked for. The drafter `name` is the class `Name` of the module `pipeline.drafting.name`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from compressors.plugins import check_options, import_named
from pipeline.config.reading import parse_drafters
from pipeline.config.schema import DRAFTERS, ConfigError
from pipeline.drafting.drafter import Drafter, DrafterContext

__all__ = ["check_drafters", "make_drafters"]


def check_drafters(specs: Sequence[str]) -> None:
    """Raise ConfigError for what can be wrong with `generation.draft` before there is a model: names and options."""
    _load_all(specs)


def make_drafters(specs: Sequence[str], context: DrafterContext) -> list[Drafter]:
    """The drafters of `generation.draft`, in its order.

    Raises ConfigError for an unknown name or option, a bad value, a class that is no drafter, or two of one name; it
    names the drafter, the option, what was given and what is allowed.
    """
    drafters = []
    for name, cls, options in _load_all(specs):
        try:
            drafters.append(cls(context=context, **options))
        except (ValueError, OSError) as e:
            raise ConfigError(f"generation.draft: drafter {name!r}: {e}") from e
    names = [drafter.name for drafter in drafters]
    if len(set(names)) < len(names):
        raise ConfigError(f"generation.draft: two drafters call themselves the same: {', '.join(names)}")
    return drafters


def _load_all(specs: Sequence[str]) -> list[tuple[str, Any, dict[str, Any]]]:
    """(name, class, options) of each."""
    loaded: list[tuple[str, Any, dict[str, Any]]] = []
    for name, options in parse_drafters(specs):
        try:
            cls = _load_plugin(name) if ":" in name else _load(name)
            check_options(f"drafter {name!r}", cls, options, _option_names(cls))
        except ValueError as e:
            raise ConfigError(f"generation.draft: {e}") from e
        if any(cls.name == other.name for _, other, _ in loaded):
            raise ConfigError(f"generation.draft: two drafters are called {cls.name!r}; each needs a name of its own")
        loaded.append((name, cls, options))
    return loaded


def _load(name: str) -> Any:
    return getattr(importlib.import_module(f"pipeline.drafting.{name}"), name.capitalize())


def _load_plugin(name: str) -> Any:
    class_name = name.partition(":")[2]
    cls = import_named(f"drafter {name!r}", name)
    if not isinstance(cls, type) or not callable(getattr(cls, "draft", None)):
        raise ValueError(f"drafter {name!r}: {class_name} is not a class with a method draft(slot, ids)")
    own = getattr(cls, "name", None)
    if not isinstance(own, str):
        raise ValueError(f"drafter {name!r}: {class_name} has no class attribute `name`")
    if own in DRAFTERS:
        raise ValueError(f"drafter {name!r}: {class_name}.name is {own!r}, which is a shipped one's; choose another")
    if "context" not in inspect.signature(cls).parameters:
        raise ValueError(f"drafter {name!r}: {class_name}.__init__ must take the keyword argument context")
    return cls


def _option_names(cls: Any) -> list[str]:
    unnamed = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(cls).parameters
    return [key for key, p in parameters.items() if key != "context" and p.kind not in unnamed]
