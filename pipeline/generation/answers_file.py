"""Finished answers on disk, a JSON line each, so that a command that was interrupted goes on with the others."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.records.files import RecordError, disk_problem, write_whole

__all__ = ["AnswersFile"]

logger = logging.getLogger(__name__)


class AnswersFile:
    """`answers-<digest>.jsonl` in the folder of the records; `digest` is of all that decides over the answers.

    With `resume`, `done` has the lines of requests that need not be answered again, by their line. Raises RecordError
    where the folder cannot be written to.
    """

    def __init__(self, folder: Path, digest: str, *, resume: bool) -> None:
        self.path = folder / f"answers-{digest[:16]}.jsonl"
        self.done: dict[int, dict[str, Any]] = {}
        if self.path.exists():
            if resume:
                self.done = _read(self.path)
            else:
                old = self.path.with_suffix(".jsonl.old")
                self.path.replace(old)
                logger.warning("answers of an earlier run with this config and these prompts are set aside: %s", old)
        elif resume:
            logger.warning("nothing to resume: %s has no answers to these prompts with this config", folder)
        try:
            write_whole(self.path, b"".join(map(_line, self.done.values())))
            self._file = open(self.path, "ab")
        except OSError as e:
            raise RecordError(f"{self.path} cannot be written: {disk_problem(e)}") from e

    def add(self, answer: Mapping[str, Any]) -> None:
        """Hand a line to the operating system at once. Raises RecordError."""
        try:
            self._file.write(_line(answer))
            self._file.flush()  # all of it: without a buffer, a disk that fills up takes a part and says nothing
        except OSError as e:
            raise RecordError(f"{self.path} cannot be written: {disk_problem(e)}") from e

    def close(self) -> None:
        self._file.close()


def _line(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _read(path: Path) -> dict[int, dict[str, Any]]:
    """Whole lines without an error; the last may be torn. Raises RecordError for a file of another kind."""
    done = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            answer = json.loads(line)
            if answer["error"] is None:
                done[int(answer["line"])] = answer
        except (ValueError, TypeError, KeyError) as e:
            raise RecordError(
                f"{path}, line {number}, is no answer ({type(e).__name__}: {e}); delete the file to start over"
            ) from e
    return done
