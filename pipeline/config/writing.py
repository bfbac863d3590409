"""A config as YAML that `reading` makes the same config of: only what differs from the defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from compressors.strict_yaml import parse_yaml_value
from compressors.user_files import InputError
from pipeline.config.schema import RunConfig

__all__ = ["config_yaml"]


def config_yaml(config: RunConfig) -> str:
    """Text of a file for `--config`."""
    changed = _changes(config.as_dict(), RunConfig().as_dict())
    nodes = [
        _changes(dataclasses.asdict(node), dataclasses.asdict(type(node)())) or {} for node in config.partition.nodes
    ]
    if nodes:
        changed["partition"]["nodes"] = nodes
    return yaml.dump(
        _lists(changed), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )


class _Dumper(yaml.SafeDumper):
    """With quotes around text that `strict_yaml` would read as something else."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    try:
        is_plain = parse_yaml_value(text, "text") == text
    except InputError:
        is_plain = False
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


_Dumper.add_representer(str, _represent_text)


def _changes(tree: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """Keys whose values are others than by default; of sections, the keys within."""
    found = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and isinstance(default.get(key), Mapping) and default[key]:
            value = _changes(value, default[key])
            if value:
                found[key] = value
        elif value != default.get(key):
            found[key] = value
    return found


def _lists(value: Any) -> Any:
    """YAML has no tuples."""
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
