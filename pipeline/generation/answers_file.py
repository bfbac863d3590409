"""Finished answers on disk, a JSON line each, so that a command that was interrupted goes on with the others."""

from __future__ import annotations

import fcntl
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.records.files import RecordError, disk_problem, free_name, write_whole

__all__ = ["AnswersFile"]

logger = logging.getLogger(__name__)


class AnswersFile:
    """`answers-<digest>.jsonl` in the folder of the records; `digest` is of all that decides over the answers.

    With `resume`, `done` has the lines of requests that need not be answered again, by their line. Without, answers
    that are there already are set aside as `.old`, none of which replaces another. Raises RecordError where the folder
    cannot be written to, and while another process has the file open.
    """

    def __init__(self, folder: Path, digest: str, *, resume: bool) -> None:
        self.path = folder / f"answers-{digest[:16]}.jsonl"
        self.done: dict[int, dict[str, Any]] = {}
        try:
            self._file = self._take_over(resume=resume)
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

    def _take_over(self, *, resume: bool) -> BinaryIO:
        """The file with what is done in it, open at its end and locked."""
        if not self.path.exists():
            if resume:
                folder = self.path.parent
                logger.warning("nothing to resume: %s has no answers to these prompts with this config", folder)
            return self._begin()
        with open(self.path, "r+b") as before:
            _lock(before, self.path)
            content = before.read()
            if resume:
                self.done = _read(content, self.path)
            elif content:
                old = free_name(self.path.with_name(f"{self.path.name}.old"))
                self.path.replace(old)
                logger.warning("answers of an earlier run with this config and these prompts are set aside: %s", old)
            return self._begin()

    def _begin(self) -> BinaryIO:
        write_whole(self.path, b"".join(map(_line, self.done.values())))
        file = open(self.path, "ab")
        _lock(file, self.path)
        return file


def _lock(file: BinaryIO, path: Path) -> None:
    """Until the file is closed. Raises RecordError where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise RecordError(
            f"{path} belongs to a run with the same config and prompts that is still going on: wait for its end, or "
            "end it"
        ) from e


def _line(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _read(content: bytes, path: Path) -> dict[int, dict[str, Any]]:
    """Whole lines without an error; the last may be torn. Raises RecordError for a file of another kind."""
    done = {}
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            answer = json.loads(line)
            if answer["error"] is None:
                done[int(answer["line"])] = answer
        except (ValueError, TypeError, KeyError) as e:
            raise RecordError(
                f"{path}, line {number}, is no answer ({type(e).__name__}: {e}); delete the file to start over"
            ) from e
    return done
