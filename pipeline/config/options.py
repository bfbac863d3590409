"""The command-line options that all programs share: a config, its keys, and the original benchmark's flags.

Later ones win: the YAML file, what the program itself sets, flags, `--set`. A key that a program has no use for is
refused on its command line and left alone in a file, which may serve several programs.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from compressors.strict_yaml import parse_yaml_value
from compressors.user_files import InputError, user_path
from pipeline.config.reading import find_config, flat_overrides, load_config, parse_override
from pipeline.config.schema import FLAG_KEYS, ConfigError, RunConfig

__all__ = ["OptionParser", "add_config_options", "given_keys", "path_option", "read_config"]

# Values of these are read as those of --set are, so that 010 is refused here too.
_FLAGS: dict[str, dict[str, Any]] = {
    "model_name": {"metavar": "ID|DIR|FILE"},
    "model_dir": {"metavar": "DIR", "help": "cache of downloads and conversions"},
    "dtype": {"choices": ("fp32", "fp16", "bf16", "fp64")},
    "load_in_8bit": {"action": "store_true"},
    "load_in_4bit": {"action": "store_true"},
    "compressor": {"help": "a codec, e.g. nf4 or package.module:Class(option=value)"},
    "batch_size": {"metavar": "N", "help": "windows per micro-batch"},
    "first_k_tokens": {"metavar": "N", "help": "0: all"},
    "max_length": {"metavar": "N"},
    "stride": {"metavar": "N"},
    "exp_dir": {"metavar": "DIR", "help": "where records go"},
    "wandb": {"action": argparse.BooleanOptionalAction},
    "wandb_project": {},
    "wandb_run_name": {},
}
_NUMBERS = ("batch_size", "first_k_tokens", "max_length", "stride")


class OptionParser(argparse.ArgumentParser):
    """argparse without abbreviations, which says what an unknown option may have meant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def parse_args(  # type: ignore[override]  # whose declaration is a list of overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown)
        return arguments

    def _refuse(self, unknown: Sequence[str]) -> NoReturn:
        name = next((word for word in unknown if word.startswith("--")), unknown[0]).partition("=")[0]
        known = [option for option in self._option_string_actions if option.startswith("--")]
        close = difflib.get_close_matches(name.replace("-", "_"), [k.replace("-", "_") for k in known], n=1)
        hint = ""
        if name.startswith("--") and "--set" in known and "." in name:
            hint = f"; keys of the config are written --set {name[2:]}=VALUE"
        elif name.startswith("--") and close:
            hint = f"; did you mean {next(k for k in known if k.replace('-', '_') == close[0])}?"
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def path_option(text: str) -> Path:
    """A path on a command line (argparse's `type`)."""
    try:
        return Path(user_path(text))
    except InputError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def add_config_options(parser: argparse.ArgumentParser, *, more_names: Mapping[str, Sequence[str]] = {}) -> None:
    """`--config`, `--set` and the original benchmark's flags, some of which have further names in a program."""
    parser.add_argument("--config", metavar="YAML", help="a path, or a name in configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="any key of a config"
    )
    original = parser.add_argument_group("flags of the original benchmark")
    for name, options in _FLAGS.items():
        original.add_argument(*more_names.get(name, ()), f"--{name}", dest=name, default=None, **options)


def given_keys(arguments: argparse.Namespace) -> list[tuple[str, Any]]:
    """Config keys and values from the command line: flags, then --set. Raises ConfigError."""
    keys = []
    for flag, key in FLAG_KEYS.items():
        value = getattr(arguments, flag)
        if flag in _NUMBERS and value is not None:
            try:
                value = parse_yaml_value(value, f"--{flag} {value}")
            except InputError as e:
                raise ConfigError(str(e)) from e
        if value is not None:
            keys.append((key, value))
    return list(flat_overrides([*keys, *map(parse_override, arguments.overrides)]))


def read_config(
    arguments: argparse.Namespace, *, own: Iterable[tuple[str, Any]] = (), unused: Mapping[str, str] = {}
) -> RunConfig:
    """The config that a command line asks for. Raises ConfigError.

    `own` are keys that the program sets over the file, `unused` those that it has no use for, each with the reason.
    """
    given = []
    for key, value in given_keys(arguments):
        reason = next((why for name, why in unused.items() if f"{key}.".startswith(f"{name}.")), None)
        if reason is None:
            given.append((key, value))
        elif value != _default(key):
            raise ConfigError(f"{key} is {value!r}, but {reason}")
    path = None if arguments.config is None else find_config(arguments.config)
    return load_config(path, [*own, *given])


def _default(key: str) -> Any:
    value: Any = RunConfig()
    for name in key.split("."):
        value = getattr(value, name, None)
    return value
