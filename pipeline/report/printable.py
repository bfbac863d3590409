"""Text from records of others, for a terminal. Below all of the report that prints."""

from __future__ import annotations

from typing import TextIO

__all__ = ["escape_controls", "printable"]


def escape_controls(text: str) -> str:
    """Without what would move a terminal's cursor or break a line: `\\x1b` in words for an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def printable(text: str, stream: TextIO) -> str:
    """`escape_controls`, and without what the stream's encoding has no sign for."""
    encoding = stream.encoding or "utf-8"
    return escape_controls(text).encode(encoding, "backslashreplace").decode(encoding)
