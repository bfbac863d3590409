"""Configs as they are written: YAML, then command-line flags, then `--set`, into the dataclasses of `schema`.

First step of the flow. A YAML file says only what differs from the defaults. Unknown keys and bad values raise
ConfigError naming key, value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compressors.short_form import did_you_mean, parse_short_form
from compressors.strict_yaml import parse_yaml_value, read_yaml
from compressors.user_files import InputError, check_characters, user_path
from pipeline.config.schema import (
    DRAFTERS,
    ConfigError,
    EvaluationConfig,
    GenerationConfig,
    LinkConfig,
    ModelConfig,
    PartitionConfig,
    RunConfig,
)
from pipeline.config.units import parse_address, parse_duration, parse_rate, parse_size

__all__ = [
    "NO_EMULATION",
    "SECTIONS",
    "find_config",
    "flat_overrides",
    "generation_with",
    "load_config",
    "parse_drafters",
    "parse_override",
    "read_mapping",
    "with_overrides",
]

# What a program sets that times nothing.
NO_EMULATION: tuple[tuple[str, Any], ...] = (("links", dataclasses.asdict(LinkConfig())), ("links_per_link", {}))

MAX_LINK_S = 60.0  # of an emulated link, one way; to the moon it is 1.3 s

# Keys that are sections: set as a whole, they change the keys given and leave the others.
SECTIONS = frozenset(name for name, hint in typing.get_type_hints(RunConfig).items() if dataclasses.is_dataclass(hint))


def find_config(name: str, folder: str = "") -> Path:
    """Path of a YAML file given as a path or as a name in `configs/` or a folder of it. Raises ConfigError."""
    shipped = _configs_folder() / folder
    try:
        path = Path(user_path(name))
    except InputError as e:
        raise ConfigError(f"config {name!r}: {e}") from e
    for candidate in (path, shipped / path):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(p.name for p in shipped.glob("*.yaml")))
    raise ConfigError(f"config {name!r} is neither a file nor in {shipped} (which has: {known})")


def _configs_folder() -> Path:
    """`configs/` of the repository, or its copy in an installed package."""
    package = Path(__file__).resolve().parents[1]
    in_package = package / "configs"
    return in_package if in_package.is_dir() else package.parent / "configs"


def parse_override(text: str) -> tuple[str, Any]:
    """`dataset.stride=256` -> ("dataset.stride", 256). The value is read as YAML."""
    key, separator, value = text.partition("=")
    key = key.strip()
    if not separator or not key:
        raise ConfigError(f"--set {text!r}: write it as KEY=VALUE, for example --set dataset.stride=256")
    try:
        return key, parse_yaml_value(value, f"--set {key}={value}")
    except InputError as e:
        raise ConfigError(str(e)) from e


def load_config(path: Path | None, overrides: Sequence[tuple[str, Any]] = ()) -> RunConfig:
    """Read a YAML file (None: defaults only), apply dotted-key overrides in order, check everything.

    Raises ConfigError for an unreadable file, an unknown key, a value of the wrong type or out of range.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = read_mapping(path, "such as dataset: {name: wikitext}; for the defaults, name no file")
        try:
            _build(RunConfig, tree, "")  # a key at fault here is the file's
        except ConfigError as e:
            raise ConfigError(f"{path}: {e}") from e
    for key, value in flat_overrides(overrides):
        _assign(tree, key, value)
    config = _build(RunConfig, tree, "")
    _check_together(config)
    return config


def read_mapping(path: Path, expected: str) -> dict[str, Any]:
    """The keys of a YAML file. Raises ConfigError for a file that cannot be read or holds something else."""
    try:
        tree = read_yaml(path)
    except InputError as e:
        raise ConfigError(str(e)) from e
    if tree is None:
        raise ConfigError(f"{path} is empty; it must hold keys, {expected}")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, not a mapping of keys, {expected}")
    return tree


def with_overrides(config: RunConfig, overrides: Sequence[tuple[str, Any]]) -> RunConfig:
    """A config with dotted keys set anew, checked as a whole. Raises ConfigError."""
    tree = config.as_dict()
    for key, value in flat_overrides(overrides):
        _assign(tree, key, value)
    changed = _build(RunConfig, tree, "")
    _check_together(changed)
    return changed


def generation_with(generation: GenerationConfig, overrides: Mapping[str, Any]) -> GenerationConfig:
    """A generation section with keys set anew, checked as a config's are. Raises ConfigError."""
    changed = _build(GenerationConfig, {**dataclasses.asdict(generation), **overrides}, "")
    _check_generation(changed, "")
    return changed


def flat_overrides(overrides: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Overrides with those of a whole section (`dataset={stride: 256}`) as one per key of it."""
    for key, value in overrides:
        if key not in SECTIONS:
            yield key, value
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{name}", item) for name, item in value.items())
        else:
            raise ConfigError(f"{key} must be a mapping of keys, got {value!r}")


def _assign(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one key of a nested mapping. `compressor.x` turns the short name of a codec into a mapping first."""
    *parents, last = _split_key(dotted)
    node = tree
    for name in parents:
        child = node.get(name)
        if name in ("compressor", "compressor_decode") and isinstance(child, str):
            if "(" in child:
                raise ConfigError(f"{dotted}: {name} is {child!r}; give the option inside its brackets")
            child = {"name": child}
        if child is None:
            child = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{dotted}: {name} is {child!r}, not a mapping; it has no key {last!r}")
        node[name] = child
        node = child
    node[last] = value


def _split_key(dotted: str) -> list[str]:
    """Split at dots. Link names hold none, so `compressor_per_link.layer:7:node0->node1` works too."""
    return dotted.split(".")


def _build(cls: type, tree: Any, prefix: str) -> Any:
    """Make dataclass `cls` from a mapping; `prefix` is its dotted key with a trailing dot, for messages."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')} must be a mapping of keys, got {tree!r}")
    hints = _hints(cls)
    unknown = [key for key in tree if key not in hints]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), hints, n=1)
        hint = f"; did you mean {prefix}{close[0]}?" if close else ""
        if "." in str(unknown[0]):
            hint = "; in a file, sections are nested, not dotted."
        raise ConfigError(f"unknown key {prefix}{unknown[0]}{hint} Allowed here: {', '.join(hints)}")
    values = {}
    for f in dataclasses.fields(cls):
        if f.name in tree:
            key = prefix + f.name
            value = tree[f.name]
            if f.metadata.get("one_or_more") and isinstance(value, str):
                value = (value,)
            value = _convert(value, hints[f.name], key)
            _check_limits(value, f.metadata, key)
            values[f.name] = _expand(value, key) if f.metadata.get("path") and value is not None else value
    return cls(**values)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Type hints take a millisecond to resolve, and every prompt's options are checked."""
    return typing.get_type_hints(cls)


def _convert(value: Any, hint: Any, key: str) -> Any:
    """Check `value` against a type hint and return it in that type. YAML lists become tuples."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, {} if value is None else value, key + ".")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        if len(options) == 1:
            return _convert(value, options[0], key)
        if any(isinstance(value, typing.get_origin(a) or a) for a in options):
            return value
        raise ConfigError(f"{key} must be a name or a mapping, got {value!r}")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key} must be a list, got {value!r}")
        inner = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(inner) != len(value):
            raise ConfigError(f"{key} must have {len(inner)} entries, got {value!r}")
        return tuple(_convert(v, a, f"{key}[{i}]") for i, (v, a) in enumerate(zip(value, inner, strict=True)))
    if origin is not None and issubclass(origin, Mapping):
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"{key} must be a mapping, got {value!r}")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{key} must be {_TYPE_WORDS[hint]}, got {value!r}{_cure(value, hint)}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{key} must be a finite number, got {value!r}")
    if hint is str:
        _check_text(value, key)
    return value


_TYPE_WORDS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def _cure(value: Any, hint: type) -> str:
    if hint is str and isinstance(value, (int, float)):
        return "; put it in quotes where it is text"
    if hint is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    return ""


def _check_text(value: str, key: str) -> None:
    try:
        check_characters(value, key)
    except InputError as e:
        raise ConfigError(str(e)) from e


def _expand(path: str, key: str) -> str:
    try:
        return user_path(path)
    except InputError as e:
        raise ConfigError(f"{key}: {e}") from e


def _check_limits(value: Any, limits: Mapping[str, Any], key: str) -> None:
    if value is None:
        return
    if "choices" in limits and value not in limits["choices"]:
        raise ConfigError(f"{key} must be one of {', '.join(limits['choices'])}, got {value!r}")
    if "minimum" in limits and value < limits["minimum"]:
        raise ConfigError(f"{key} must be at least {limits['minimum']}, got {value}")
    if "above" in limits and not value > limits["above"]:
        raise ConfigError(f"{key} must be above {limits['above']}, got {value}")
    if "maximum" in limits and value > limits["maximum"]:
        raise ConfigError(f"{key} must be at most {limits['maximum']:g}, got {value}")


def _check_generation(generation: GenerationConfig, prefix: str) -> None:
    """Rules between keys of the section, whose dotted key with a trailing dot is `prefix`."""
    if "" in generation.stop:
        raise ConfigError(f"{prefix}stop holds an empty string, which every answer begins with; leave it out")
    if generation.max_new_tokens == 0 and not (generation.echo and generation.logprobs is not None):
        raise ConfigError(
            f"{prefix}max_new_tokens is 0, which leaves nothing to tell; for the log-probabilities of prompts set "
            f"{prefix}echo to true and {prefix}logprobs to a number"
        )
    if 0 < generation.max_length <= generation.max_new_tokens:
        raise ConfigError(
            f"{prefix}max_length is {generation.max_length} and {prefix}max_new_tokens {generation.max_new_tokens}, "
            "which leaves no position for a prompt"
        )
    parse_drafters(generation.draft, f"{prefix}draft")


def parse_drafters(specs: Sequence[str], key: str = "generation.draft") -> list[tuple[str, dict[str, Any]]]:
    """(name, options) of each drafter that `key` has. Which options there are, the drafters know.

    Raises ConfigError for a spec that cannot be read, a name that there is not, and one that stands twice.
    """
    parsed: list[tuple[str, dict[str, Any]]] = []
    for spec in specs:
        try:
            name, options = parse_short_form(spec, "drafter")
        except ValueError as e:
            raise ConfigError(f"{key}: {e}") from e
        if name not in DRAFTERS and ":" not in name:
            hint = did_you_mean(difflib.get_close_matches(name, DRAFTERS, n=1))
            raise ConfigError(
                f"{key}: unknown drafter {name!r}{hint}; built-in: {', '.join(DRAFTERS)}; a class of your own is "
                "written package.module:Class"
            )
        if any(name == other for other, _ in parsed):
            raise ConfigError(f"{key}: drafter {name!r} is named twice; its figures could not be told apart")
        parsed.append((name, options))
    return parsed


def _check_link(link: LinkConfig, key: str) -> None:
    """A rate and times that can be read; `key` is the section's."""
    named: list[tuple[str, str | None, Callable[[str], float]]] = [
        ("rate", link.rate, parse_rate),
        ("delay", link.delay, parse_duration),
        ("jitter", link.jitter, parse_duration),
    ]
    for name, text, parse in named:
        try:
            value = 0.0 if text is None else parse(text)
        except ConfigError as e:
            raise ConfigError(f"{key}.{name}: {e}") from e
        if name != "rate" and value > MAX_LINK_S:
            raise ConfigError(f"{key}.{name} must be at most {MAX_LINK_S:g} s, got {text!r}")


def _check_together(config: RunConfig) -> None:
    """Rules between keys."""
    model, dataset, partition = config.model, config.dataset, config.partition
    if model.load_in_8bit and model.load_in_4bit:
        raise ConfigError("model.load_in_8bit and model.load_in_4bit are both true; choose one")
    if model.load_in_8bit_threshold != ModelConfig.load_in_8bit_threshold and not model.load_in_8bit:
        raise ConfigError(
            f"model.load_in_8bit_threshold is {model.load_in_8bit_threshold:g}, but model.load_in_8bit is false: "
            "the threshold belongs to 8-bit weights"
        )
    if model.weights != ModelConfig.weights and (model.dtype != "fp32" or model.load_in_8bit or model.load_in_4bit):
        raise ConfigError(
            f"model.weights is {model.weights}, which goes with model.dtype fp32 and without bitsandbytes' weights; "
            "leave out the one or the other"
        )
    if dataset.name == "pydoc" and dataset.path is not None:
        raise ConfigError(
            f"dataset.path is {dataset.path!r}, but dataset.name is pydoc, which reads no file; "
            "set dataset.name to wikitext (WikiText's raw format) or text (any UTF-8 file)"
        )
    if dataset.name == "text" and dataset.path is None:
        raise ConfigError("dataset.name is text, which needs dataset.path")
    if dataset.first_k_tokens == 1:
        raise ConfigError("dataset.first_k_tokens is 1: at least 2 tokens are needed to score one (0 means all)")
    if config.evaluation.decode_chunk != EvaluationConfig.decode_chunk and config.evaluation.mode != "decode":
        raise ConfigError(
            f"evaluation.decode_chunk is {config.evaluation.decode_chunk}, but evaluation.mode is "
            f"{config.evaluation.mode}: chunks belong to mode decode"
        )
    _check_generation(config.generation, "generation.")
    try:
        parse_address(config.serving.address)
    except ConfigError as e:
        raise ConfigError(f"serving.address: {e}") from e
    _check_link(config.links, "links")
    for name, own in config.links_per_link.items():
        key = f"links_per_link.{name}"
        _build(LinkConfig, own, f"{key}.")
        _check_link(config.link_of(name), key)
    layers = config.importance.layers
    if layers not in ("last", "all") and (
        isinstance(layers, str) or not layers or not all(type(n) is int and n >= 0 for n in layers)
    ):
        raise ConfigError(f"importance.layers must be last, all or a list of layer numbers, got {layers!r}")
    longest_stride = dataset.max_length - (1 if dataset.bos == "window" else 0)
    if dataset.stride > longest_stride:
        raise ConfigError(
            f"dataset.stride must be at most {longest_stride} (dataset.max_length {dataset.max_length}"
            f"{' less the window BOS' if dataset.bos == 'window' else ''}), got {dataset.stride}: "
            "tokens between windows would be skipped"
        )
    if config.runtime.rejoin_s and config.runtime.backend == "nccl":
        raise ConfigError("runtime.rejoin_s needs links over Gloo: leave it 0, or set runtime.backend to gloo")
    if partition.nodes and len(partition.nodes) != partition.num_nodes:
        raise ConfigError(
            f"partition.nodes has {len(partition.nodes)} entries, partition.num_nodes is {partition.num_nodes}; "
            "they must agree"
        )
    with_layers = [i for i, node in enumerate(partition.nodes) if node.layers is not None]
    if with_layers and len(with_layers) != partition.num_nodes:
        missing = next(i for i in range(partition.num_nodes) if i not in with_layers)
        raise ConfigError(f"partition.nodes[{missing}].layers is missing: give ranges for every node or for none")
    _check_balance(partition)


def _check_balance(partition: PartitionConfig) -> None:
    """Rules between the keys of a balanced plan."""
    for i, node in enumerate(partition.nodes):
        if node.memory is not None:
            try:
                parse_size(node.memory)
            except ConfigError as e:
                raise ConfigError(f"partition.nodes[{i}].memory: {e}") from e
        if partition.plan == "balanced" and node.layers is not None:
            raise ConfigError(
                f"partition.nodes[{i}].layers is given, but partition.plan is balanced, which chooses them; set "
                "partition.plan=default or leave the layers out"
            )
        for key in ("speed", "memory"):
            if partition.plan != "balanced" and getattr(node, key) is not None:
                raise ConfigError(
                    f"partition.nodes[{i}].{key} is {getattr(node, key)!r}, but partition.plan is {partition.plan}, "
                    "which does not look at it; set partition.plan=balanced"
                )
    if partition.objective != PartitionConfig.objective and partition.plan != "balanced":
        raise ConfigError(
            f"partition.objective is {partition.objective}, but partition.plan is {partition.plan}: objectives belong "
            "to balanced plans"
        )
