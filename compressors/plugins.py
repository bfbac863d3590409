"""Classes that users name, `package.module:Class`, and the options that they are made with.

For the registries, of codecs (`registry`) and of whatever else has plug-ins; what a class must be is theirs to check.
`where` begins each message: `compressor 'my_codecs:Mine'`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from compressors.short_form import did_you_mean

__all__ = ["check_options", "import_named"]


def import_named(where: str, name: str) -> Any:
    """What `package.module:Class` names. Raises ValueError."""
    module_name, _, class_name = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except ImportError as e:
        raise ValueError(f"{where}: cannot import module {module_name!r}: {e}") from e
    except AttributeError as e:
        raise ValueError(f"{where}: module {module_name!r} has no {class_name!r}") from e


def check_options(where: str, cls: Any, options: Mapping[str, Any], allowed: Sequence[str]) -> None:
    """Raise ValueError for an option that is not among the keyword arguments `allowed`, or lacks and has no default."""
    listed = ", ".join(allowed) or "none"
    for option, value in options.items():
        if option not in allowed:
            hint = did_you_mean(difflib.get_close_matches(option, allowed, n=1))
            raise ValueError(f"{where} has no option {option!r} (got {value!r}){hint}; allowed: {listed}")
    parameters = inspect.signature(cls).parameters
    for option in allowed:
        if option not in options and parameters[option].default is inspect.Parameter.empty:
            raise ValueError(f"{where} needs option {option!r}; its options: {listed}")
