"""Standard input and output of a command: closed, full, or with a reader that has gone.

Every program's last line calls `run_command`. It stands here because `python -m compressors.check` is one of them.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

__all__ = ["EXIT_READER_GONE", "run_command", "show"]

EXIT_READER_GONE = 141  # as shells tell of a program that SIGPIPE ended


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run `main` and exit with the status that it returns.

    Where the reader of standard output has gone (`| head`), the exit is a quiet one with status 141, and where it
    cannot be written otherwise, one with a message and status 1.
    """
    _replace_closed_streams()
    status: int | str | None
    try:
        status = _status_of(main)
        sys.stdout.flush()
    except BrokenPipeError:
        status = EXIT_READER_GONE
        _drop_output()
    except OSError as e:
        if e.errno != errno.ENOSPC or e.filename is not None:
            raise
        status = 1
        _drop_output()
        print(f"error: standard output cannot be written: {e.strerror}", file=sys.stderr)
    sys.exit(status)


def _status_of(main: Callable[[], int]) -> int | str | None:
    """argparse exits by itself, with its help still in the buffer."""
    try:
        return main()
    except SystemExit as e:
        return e.code


def show(text: str) -> None:
    """Write to standard output, as it is and at once. Raises ValueError where that cannot be."""
    try:
        print(text, end="", flush=True)
    except OSError as e:
        raise ValueError(f"standard output cannot be written: {e.strerror}; it must last until the end") from e


def _replace_closed_streams() -> None:
    """Or a file or connection that is opened later would be 1 or 2, and take what is meant for a terminal.

    `sys.stdin` stays None, by which commands know that nobody can have written there.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)
    sys.stderr = sys.stderr or open(2, "w", closefd=False)


def _drop_output() -> None:
    """What is still in the buffer would be written, and fail, at the interpreter's exit."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
    os.close(descriptor)
