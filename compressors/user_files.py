"""Paths and text files as people name and write them. Every path option and every text goes through here.

`~` is expanded, and nothing else. Text is UTF-8; neither its line ends nor a byte-order mark change what is read.
Here rather than in `pipeline`, since codecs read calibration files.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["InputError", "decode_text", "read_text", "unified_line_ends", "user_path"]

# UTF-32's little-endian mark begins with UTF-16's, so it stands first.
_OTHER_MARKS = {
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_LINE_END = re.compile(r"\r+\n|\r")


class InputError(ValueError):
    """A path, text or value that cannot be read in one way only. The message says where it stands and the cure."""


def user_path(path: str | os.PathLike[str]) -> str:
    """`path` with a home folder (`~`, `~user`) at its front written out. Raises InputError for what names no file."""
    path = os.fspath(path)
    if not path:
        raise InputError("the path is empty; name a file or folder, or leave the option out")
    check_characters(path, "the path")
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        home = path.partition("/")[0]
        raise InputError(f"{path!r}: {home} is nobody's home folder here; write the path in full, or ./{path} if it is")
    return expanded


def check_characters(text: str, what: str) -> None:
    """Raise InputError where `text` can stand neither in a file's name nor in a record."""
    if "\0" in text:
        raise InputError(f"{what} holds a NUL character: {text!r}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise InputError(f"{what} is not UTF-8: {text!r}, character {e.start}; rename the file or type it anew") from e


def read_text(path: Path, where: str) -> str:
    """Text of a UTF-8 file, without byte-order mark and with `\\n` for every line end.

    Raises InputError, which begins with `where` (a key and its value, say), for a file that cannot be read or is not
    UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as e:
        raise InputError(f"{where} cannot be read: {e}") from e
    return decode_text(content, where)


def decode_text(content: bytes, where: str) -> str:
    """The text of a file's bytes; see `read_text`."""
    for mark, encoding in _OTHER_MARKS.items():
        if content.startswith(mark):
            raise InputError(
                f"{where} is {encoding}, by its byte-order mark, not UTF-8; convert it: "
                f"iconv -f {encoding} -t UTF-8 OLD > NEW"
            )
    nul = content.find(b"\0")
    if nul >= 0:
        raise InputError(
            f"{where} has a NUL byte {_place(content, nul)}: it is no text, or UTF-16 without a byte-order mark "
            "(then convert it: iconv -f UTF-16LE -t UTF-8 OLD > NEW)"
        )
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(
            f"{where} is not UTF-8: {e} ({_place(content, e.start)}); convert it, for example: "
            "iconv -f LATIN1 -t UTF-8 OLD > NEW"
        ) from e
    return unified_line_ends(text.lstrip("\ufeff"))


def unified_line_ends(text: str) -> str:
    """`text` with `\\n` for CR LF and lone CR, as Python's text files have it; CR CR LF, made twice, is one end."""
    return _LINE_END.sub("\n", text) if "\r" in text else text


def _place(content: bytes, offset: int) -> str:
    line = content.count(b"\n", 0, offset) + 1
    return f"at byte {offset}, line {line}"
