"""Finished answers on disk, a JSON line each, so that a command that was interrupted goes on with the others."""

from __future__ import annotations

import fcntl
import json
import logging
import os
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
        """The file with what is done in it, open at its end and locked; at no time has another file its name."""
        file = self._locked()
        file.seek(0)
        content = file.read()
        if resume:
            if not content:
                folder = self.path.parent
                logger.warning("nothing to resume: %s has no answers to these prompts with this config", folder)
            self.done = _read(content, self.path)
            write_whole(self.path, b"".join(map(_line, self.done.values())))
            with file:  # whoever waits to see it closed finds that it has lost its name
                return self._locked()
        if content:
            old = free_name(self.path.with_name(f"{self.path.name}.old"))
            write_whole(old, content)
            file.truncate(0)
            logger.warning("answers of an earlier run with this config and these prompts are set aside: %s", old)
        return file

    def _locked(self) -> BinaryIO:
        """The file, new where there is none. Raises RecordError where another process has it."""
        file = open(self.path, "a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_own = os.path.samestat(os.fstat(file.fileno()), os.stat(self.path))
        except BlockingIOError:
            is_own = False
        if not is_own:
            file.close()
            raise RecordError(
                f"{self.path} belongs to a run with the same config and prompts that is still going on: wait for its "
                "end, or end it"
            )
        return file


def _line(answer: Mapping[str, Any]) -> bytes:
    return json.dumps(answer, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _read(content: bytes, path: Path) -> dict[int, dict[str, Any]]:
    """Whole lines without an error; the last may be torn. Raises RecordError for a file of another kind."""
    done: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            answer = json.loads(line)
            if answer["error"] is not None:
                continue
            if type(answer["line"]) is not int or answer["line"] in done:
                raise ValueError(f"its line is {answer['line']!r}, which is no number or was there before")
            if not isinstance(answer["text"], str):
                raise ValueError(f"its text is {answer['text']!r}")
            _line(answer)
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise RecordError(
                f"{path}, line {number}, is no answer ({type(e).__name__}: {e}); delete the file to start over"
            ) from e
        done[answer["line"]] = answer
    return done
