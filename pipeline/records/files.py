"""Files that appear whole or not at all, and what a disk that takes none of it says.

Below all that writes: records, journals, figures, files of importance. What stands in a file is the writer's matter.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["RecordError", "check_writable", "disk_problem", "free_name", "write_figure", "write_json", "write_whole"]


class RecordError(ValueError):
    """A file that is no record of this program, or a folder that records cannot be written to."""


def check_writable(folder: Path) -> None:
    """Create `folder`, write a file in it and lock that, so that a run does not end with nowhere to put its result.

    Raises RecordError.
    """
    problem = "cannot be written to"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            problem = "is on a file system that cannot lock files, as a run must do with its journal"
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        raise RecordError(
            f"the folder of the results, {folder}, {problem}: {disk_problem(e)}, or name another (--exp_dir, --out)"
        ) from e


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, readable for whom the umask says.

    Raises OSError; what was there before is there still, and nothing else. A device or a pipe is not replaced.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file")
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def free_name(path: Path) -> Path:
    """`path`, or the first of `<path>2`, `<path>3`, ... where something has that name."""
    free, number = path, 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}{number}")
    return free


def write_figure(path: Path, figure: Any, *, dpi: int) -> None:
    """Write a matplotlib figure, in the format of the path's suffix or as PNG. Raises RecordError."""
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format=path.suffix.removeprefix(".") or "png")
    try:
        write_whole(path, content.getvalue())
    except OSError as e:
        raise RecordError(f"the figure {path} cannot be written: {disk_problem(e)}, or name another file") from e


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a strict JSON file that appears whole or not at all. Raises RecordError."""
    try:
        write_whole(path, json.dumps(value, indent=1, allow_nan=False).encode())
    except OSError as e:
        raise RecordError(f"{path} cannot be written: {disk_problem(e)}") from e


def disk_problem(error: OSError) -> str:
    """What the system says, and what to do about it."""
    told = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{told}; make room there"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{told}; give this user the right to write there"
    return told
