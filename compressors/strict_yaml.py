"""The one YAML reader: of configs, sweeps, `--set` and the values in a codec's short form.

YAML as people read it. Plain words are numbers only in decimal (`10`, `0.5`, `1e-3`), booleans only as `true` and
`false`, empty only as nothing or `null`; everything else is text: `no`, `on`, dates, link names. What YAML 1.1 or
another reader takes for another number (`010`, `0x10`, `1_000`, `5:30`, `.inf`) is refused, and so are `~` alone, keys
given twice, anchors, aliases, merge keys and tags. Keys are text. Errors name the file, line and column.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compressors.user_files import InputError, check_characters, read_text

__all__ = ["parse_yaml", "parse_yaml_value", "read_yaml"]

MAX_NBYTES = 1 << 18
MAX_DEPTH = 32
MAX_INT = 2**63 - 1

_CONSTANTS = {
    **dict.fromkeys(("", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF|nan|NaN|NAN)")
_OTHER_NUMBER = re.compile(
    r"""[-+]?(
        0[0-9_]+(\.[0-9_]*)?([eE][-+]?[0-9]+)?   # octal, or padded
        | 0[xX][0-9a-fA-F_]+ | 0[bB][01_]+ | 0[oO][0-7_]+
        | [0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?  # with _ between digits: _FLOAT has the others
        | [0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?  # sexagesimal
    )""",
    re.VERBOSE,
)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: dict, list, str, int, float, bool or None. Raises InputError."""
    try:
        nbytes = path.stat().st_size
    except OSError as e:
        raise InputError(f"{path} cannot be read: {e}") from e
    if nbytes > MAX_NBYTES:
        raise InputError(f"{path} has {nbytes} bytes; a YAML file here has at most {MAX_NBYTES}")
    return parse_yaml(read_text(path, str(path)), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text holds. Messages of InputErrors begin with `where`."""
    source = _Source(text, where)
    node = source.compose()
    return None if node is None else source.value(node)


def parse_yaml_value(text: str, where: str) -> Any:
    """One value on a command line or in a codec's short form. A comment there is a mistake, not a comment."""
    source = _Source(text, where, one_value=True)
    node = source.compose()
    rest = text[node.end_mark.index if node else 0 :].strip()
    if rest:
        raise InputError(f"{where}: {_short(rest)} is a comment to YAML; put the whole value in quotes")
    return None if node is None else source.value(node)


@dataclass(frozen=True)
class _Source:
    """A text and what messages call it."""

    text: str
    where: str
    one_value: bool = False

    def compose(self) -> yaml.Node | None:
        if len(self.text) > MAX_NBYTES:
            raise InputError(f"{self.where} has {len(self.text)} characters; YAML here has at most {MAX_NBYTES}")
        fault = " is not a YAML value" if self.one_value else " cannot be read as YAML"
        try:
            return _Composer(self.text).get_single_node()
        except yaml.MarkedYAMLError as e:
            problem = ", ".join(filter(None, (e.context, e.problem))) + _advice(str(e.problem))
            raise self.error(e.problem_mark or e.context_mark, problem, fault) from e
        except yaml.reader.ReaderError as e:
            mark = yaml.Mark("", e.position, *_line_and_column(self.text, e.position), None, None)
            problem = f"the character U+{ord(self.text[e.position]):04X} may not stand there"
            raise self.error(mark, problem, fault) from e

    def error(self, mark: yaml.Mark | None, problem: str, fault: str = "") -> InputError:
        """An error with the line and column, where there are lines."""
        place = ""
        if mark is not None and not (self.one_value and mark.line == 0):
            place = f"line {mark.line + 1}, column {mark.column + 1}: "
        return InputError(f"{self.where}{fault}: {place}{problem}")

    def value(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item) for item in node.value]
        try:
            check_characters(node.value, "the text")
            return _plain_scalar(node.value) if node.style is None else node.value
        except InputError as e:
            raise self.error(node.start_mark, str(e)) from e

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            mark, key = key_node.start_mark, key_node.value
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.error(mark, "a key must be a word, not a list or mapping; put it in quotes")
            if key == "<<" and key_node.style is None:
                raise self.error(mark, "merge keys (<<) are not read; write the keys out")
            if key in values:
                first = f", first in line {lines[key]}" if lines[key] != mark.line + 1 else ""
                raise self.error(mark, f"key {key!r} is given twice{first}; put both together, or take one out")
            values[key], lines[key] = self.value(value_node), mark.line + 1
        return values


class _Composer(yaml.SafeLoader):
    """Nodes of a text, without what would make values depend on other places of it or on Python."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            self._refuse(
                event, f"{sign}{event.anchor}: anchors and aliases are not read; write the value out or quote it"
            )
        if event.tag is not None:
            self._refuse(event, f"{event.tag}: tags are not read; leave it out or quote the value")
        if self.depth >= MAX_DEPTH:
            self._refuse(event, f"nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _refuse(self, event: yaml.Event, problem: str) -> None:
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def _line_and_column(text: str, position: int) -> tuple[int, int]:
    before = text[:position]
    return before.count("\n"), position - before.rfind("\n") - 1


def _advice(problem: str) -> str:
    if r"'\t'" in problem:
        return "; indent with spaces, not tabs"
    if "that cannot start any token" in problem or "expected alphabetic" in problem:
        return "; put the value in quotes"
    if "mapping values are not allowed" in problem:
        return "; put a value with ': ' in quotes, and check the indentation"
    if problem == "but found another document":
        return "; take the line --- out"
    return ""


def _plain_scalar(text: str) -> Any:
    """A scalar without quotes. Raises InputError for what is two things to two readers."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if text == "~":
        raise InputError("~ alone is nothing to YAML and the home folder to a shell; write null, or ~/")
    if _INT.fullmatch(text):
        if len(text) > 20 or abs(int(text)) > MAX_INT:
            raise InputError(f"{_short(text)} does not fit 64 bits; if it is text, put it in quotes")
        return int(text)
    if _FLOAT.fullmatch(text):
        value = float(text)
        if not math.isfinite(value):
            raise InputError(f"{_short(text)} is too large for a number; if it is text, put it in quotes")
        return value
    if _NOT_FINITE.fullmatch(text):
        raise InputError(f"{text} is not a finite number; write one, or put it in quotes if it is text")
    if _OTHER_NUMBER.fullmatch(text):
        raise InputError(
            f"{_short(text)} is one number to some readers and another, or none, to others; write it in plain decimal "
            "digits, or in quotes if it is text"
        )
    return text


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}... ({len(text)} characters)"
