"""Sweep files: YAML -> points, each a set of config keys with values. Plain Python; nothing is run here.

    name: quick
    base: {dataset.first_k_tokens: 10000}      # for all points; flags and --set go over it
    points:
      - compressor: none
      - for: {nbits: [4, 3], per: [token, tensor]}  # every combination; {nbits} and {per} are filled in
        compressor: "int{nbits}(granularity={per})"
      - for: {link: links}                     # the names of the plan's links
        compressor_per_link: {"{link}": nf4}

A placeholder that is a whole string takes the value's type, so `batch_size: "{b}"` is a number. Points that come out
equal are one point. What may vary is what a loaded model and its process group can serve one after the other.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.reading import find_config, read_mapping, with_overrides
from pipeline.config.schema import ConfigError, RunConfig

__all__ = ["Point", "Sweep", "find_sweep", "load_sweep"]

SWEPT_KEYS = (
    "batch_size",
    "compressor",
    "compressor_per_link",
    "dataset.first_k_tokens",
    "dataset.max_length",
    "dataset.stride",
    "links_per_link",
)
SWEPT_SECTIONS = ("importance", "links")
LINKS = "links"

MAX_POINTS = 10_000

_NAME = re.compile(r"\w[\w .-]*")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Point:
    """Config keys and the values that this point gives them, in the order of the file."""

    overrides: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Sweep:
    """A checked sweep file. `base` holds what all points share, `entries` what stands under `points`."""

    name: str
    base: tuple[tuple[str, Any], ...]
    entries: tuple[Mapping[str, Any], ...]

    def points(self, link_names: Sequence[str]) -> list[Point]:
        """All points, equal ones once; `link_names` stand for the word `links`. Raises ConfigError without any."""
        points: list[Point] = []
        for entry in self.entries:
            values = {name: link_names if v == LINKS else v for name, v in entry.get("for", {}).items()}
            keys = {key: value for key, value in entry.items() if key != "for"}
            if len(points) + math.prod(map(len, values.values())) > MAX_POINTS:
                raise ConfigError(f"sweep {self.name} has more than {MAX_POINTS} points; make several sweeps of it")
            for combination in itertools.product(*values.values()):
                filled = _fill(keys, dict(zip(values, combination, strict=True)))
                point = Point(tuple(filled.items()))
                if point not in points:
                    points.append(point)
        if not points:
            raise ConfigError(f"sweep {self.name} has no points: the plan has {len(link_names)} links")
        return points

    @staticmethod
    def deployed(config: RunConfig) -> RunConfig:
        """The config to load the model and the text with, once for all points: the whole text, and no codec."""
        return with_overrides(
            config, [("dataset.first_k_tokens", 0), ("compressor", "none"), ("compressor_per_link", {})]
        )


def find_sweep(name: str) -> Path:
    """Path of a sweep given as a path or as a name in `configs/sweeps/`. Raises ConfigError when there is none."""
    return find_config(name, "sweeps")


def load_sweep(path: Path) -> Sweep:
    """Read and check a sweep file. Raises ConfigError naming the entry and key at fault, and what is allowed."""
    tree = read_mapping(path, "with points, a list of mappings")
    if not isinstance(tree.get("points"), list) or not tree["points"]:
        raise ConfigError(f"{path} must be a mapping with `points`, a list of mappings")
    unknown = sorted(map(str, tree.keys() - {"name", "base", "points"}))
    if unknown:
        raise ConfigError(f"{path}: unknown key {unknown[0]}; a sweep has name, base and points")
    name = tree.get("name", path.stem)
    if not isinstance(name, str):
        raise ConfigError(f"{path}: name must be a string, got {name!r}")
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{path}: name becomes a file's: letters, digits, spaces and ._- only, got {name!r}")
    base = {} if tree.get("base") is None else tree["base"]
    _check_keys(base, f"{path}, base")
    for number, entry in enumerate(tree["points"], start=1):
        _check_entry(entry, f"{path}, point {number}")
    return Sweep(name, tuple(base.items()), tuple(tree["points"]))


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} must be a mapping of keys, got {entry!r}")
    keys = {key: value for key, value in entry.items() if key != "for"}
    if not keys:
        raise ConfigError(f"{where} sets no key")
    _check_keys(keys, where)
    values = entry.get("for", {})
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: for must be a mapping of names to lists, got {values!r}")
    for name, choices in values.items():
        if choices != LINKS and (not isinstance(choices, list) or not choices):
            raise ConfigError(f"{where}: for.{name} must be a list of values or the word {LINKS}, got {choices!r}")
    placeholders = set(_placeholders(keys))
    for name in sorted(placeholders - set(values)):
        raise ConfigError(
            f"{where}: {{{name}}} is filled by nothing; for has: {', '.join(map(str, values)) or 'nothing'}"
        )
    for name in values:
        if name not in placeholders:
            raise ConfigError(f"{where}: for.{name} fills nothing; write {{{name}}} where it belongs")


def _check_keys(keys: Any, where: str) -> None:
    if not isinstance(keys, Mapping):
        raise ConfigError(f"{where} must be a mapping of dotted keys, got {keys!r}")
    for key in keys:
        if key not in SWEPT_KEYS and str(key).split(".")[0] not in SWEPT_SECTIONS:
            raise ConfigError(
                f"{where}: {key} cannot vary within a sweep, whose points share one loaded model; allowed: "
                f"{', '.join(SWEPT_KEYS)}, {', '.join(f'{section}.*' for section in SWEPT_SECTIONS)}"
            )


def _placeholders(value: Any) -> list[str]:
    if isinstance(value, str):
        return _PLACEHOLDER.findall(value)
    if isinstance(value, Mapping):
        return [name for item in value.items() for part in item for name in _placeholders(part)]
    if isinstance(value, list):
        return [name for item in value for name in _placeholders(item)]
    return []


def _fill(value: Any, chosen: Mapping[str, Any]) -> Any:
    """`value` with its placeholders replaced."""
    if isinstance(value, str):
        whole = _PLACEHOLDER.fullmatch(value)
        return chosen[whole[1]] if whole else _PLACEHOLDER.sub(lambda match: str(chosen[match[1]]), value)
    if isinstance(value, Mapping):
        filled = {_fill(key, chosen): _fill(item, chosen) for key, item in value.items()}
        if len(filled) < len(value):
            raise ConfigError(f"keys {', '.join(value)} become equal for {dict(chosen)!r}; give each of them once")
        return filled
    if isinstance(value, list):
        return [_fill(item, chosen) for item in value]
    return value
