"""Finished micro-batches of a run that has not ended yet, so that `--resume` can go on from there.

One file per run digest, in the folder of the records: a line per event, a CRC-32 and JSON, appended and
handed to the operating system at once, so that a killed process loses nothing that it finished. A torn end is
dropped on reading; damage before intact lines is an error. The file is removed when the record is written.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from pipeline.records.environment import Environment
from pipeline.records.files import RecordError, disk_problem, free_name

__all__ = ["FinishedMicroBatch", "Journal"]

FORMAT = "thinwire journal 1"


@dataclass(frozen=True)
class FinishedMicroBatch:
    """What one micro-batch contributes to the record.

    `payload_bytes` has one entry per link, `loss` (float32) and `top1` (int32) one per scored token.
    `squared_error`, where it was measured, has (sum of (x - x')^2, sum of x^2) per link. A micro-batch that crosses as
    several frames says how many, and their `header_bytes` per link.
    """

    payload_bytes: tuple[int, ...]
    loss: np.ndarray
    top1: np.ndarray
    squared_error: tuple[tuple[float, float], ...] | None = None
    num_frames: int = 1
    header_bytes: tuple[int, ...] | None = None


@dataclass
class Journal:
    """An open journal.

    `finished` are micro-batches 0, 1, ...; `interrupted` those that were in the pipeline when a session
    ended, whose bytes are sent again, once per such session; `sessions` has the first micro-batch of each session and
    what it ran on, as far as that is known; `earlier_s` the seconds of earlier sessions up
    to their last finished micro-batch.
    """

    path: Path
    _file: BinaryIO
    finished: list[FinishedMicroBatch] = field(default_factory=list)
    interrupted: list[int] = field(default_factory=list)
    sessions: list[tuple[int, Environment | None]] = field(default_factory=list)
    earlier_s: float = 0.0
    _num_started: int = 0
    _start_s: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, folder: Path, digest: str, *, resume: bool, environment: Environment | None = None) -> Journal:
        """Open the journal of the run with this digest; with `resume`, take over what it holds.

        Without, an unfinished run's journal is set aside as `.journal.old`, with a number where that is taken. Renamed
        back, it can be resumed.
        `environment` is what this session runs on. Raises RecordError when another process has it open or it cannot be
        written or read.
        """
        path = _path(folder, digest)
        file = _open_locked(path, "a+b")
        journal = cls(path, file)
        try:
            kept = 0
            if resume:
                file.seek(0)
                kept = journal._replay(file.read(), digest)
            elif cls.exists(folder, digest):
                journal._set_aside()
            try:
                file.truncate(kept)
            except OSError as e:
                raise RecordError(f"the journal {path} cannot be written: {disk_problem(e)}") from e
            if kept:
                journal._begin_session(environment)
                journal._append({"resumed": len(journal.finished), "environment": environment})
            else:
                journal.sessions = [(0, environment)]
                journal._append({"format": FORMAT, "digest": digest, "environment": environment})
        except RecordError:
            journal.close()
            raise
        return journal

    @classmethod
    def check(cls, folder: Path, digest: str, *, resume: bool) -> None:
        """Whether `open` would find a journal in its way, which can be known before weights load. Changes nothing.

        Raises RecordError.
        """
        path = _path(folder, digest)
        if not os.path.lexists(path):
            return
        file = _open_locked(path, "r+b")
        journal = cls(path, file)
        try:
            if resume:
                journal._replay(file.read(), digest)
        finally:
            journal.close()

    @staticmethod
    def exists(folder: Path, digest: str) -> bool:
        """Whether an unfinished run with this digest has left at least one finished micro-batch.

        Raises RecordError for a file that cannot be read.
        """
        path = _path(folder, digest)
        try:
            return path.is_file() and b'"finished"' in path.read_bytes()
        except OSError as e:
            raise RecordError(f"the journal {path} cannot be read: {e.strerror or e}; move it away") from e

    def start(self, microbatch_index: int) -> None:
        """Note that a micro-batch enters the pipeline; they do so in order."""
        self._num_started = microbatch_index + 1
        self._append({"started": microbatch_index})

    def finish(self, result: FinishedMicroBatch) -> None:
        """Note the result of the next micro-batch in order."""
        self._append(
            {
                "finished": len(self.finished),
                "elapsed_s": self.elapsed_s,
                "payload_bytes": result.payload_bytes,
                "squared_error": result.squared_error,
                "loss": base64.b64encode(result.loss.astype("<f4").tobytes()).decode(),
                "top1": base64.b64encode(result.top1.astype("<i4").tobytes()).decode(),
                **({"frames": [result.num_frames, *result.header_bytes]} if result.header_bytes is not None else {}),
            }
        )
        self.finished.append(result)

    @property
    def num_sessions(self) -> int:
        return len(self.sessions)

    @property
    def elapsed_s(self) -> float:
        """Seconds of all sessions, up to the last finished micro-batch of the earlier ones."""
        return self.earlier_s + time.monotonic() - self._start_s

    def restart_clock(self) -> None:
        """The run proper begins now; what went before was loading."""
        self._start_s = time.monotonic()

    def remove(self) -> None:
        """The record is written; nothing is left to resume."""
        self.path.unlink()
        self.close()

    def close(self) -> None:
        """Leave the journal to another session."""
        with contextlib.suppress(OSError):  # what a full disk did not take was told when it was appended
            self._file.close()

    def _set_aside(self) -> None:
        old = free_name(self.path.with_suffix(".journal.old"))
        try:
            shutil.copyfile(self.path, old)
        except OSError as e:
            raise RecordError(f"the unfinished run's journal cannot be copied to {old}: {disk_problem(e)}") from e

    def _begin_session(self, environment: Environment | None) -> None:
        self.sessions.append((len(self.finished), environment))
        self.interrupted.extend(range(len(self.finished), self._num_started))
        self._num_started = len(self.finished)

    def _append(self, event: dict[str, Any]) -> None:
        text = json.dumps(event).encode()
        try:
            self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
            self._file.flush()
        except OSError as e:
            raise RecordError(f"the journal {self.path} cannot be written: {disk_problem(e)}") from e

    def _replay(self, data: bytes, digest: str) -> int:
        """Take over the events; returns how many bytes of the file they fill."""
        lines = data.split(b"\n")[:-1]  # what stands behind the last newline is torn
        texts = [_intact(line) for line in lines]
        while texts and texts[-1] is None:
            texts.pop()
        for number, text in enumerate(texts, start=1):
            if text is None:
                raise RecordError(f"{self.path}, line {number}, is damaged; delete the file to start over")
            event = json.loads(text)
            if number == 1:
                if (event.get("format"), event.get("digest")) != (FORMAT, digest):
                    raise RecordError(f"{self.path} was written by another version or for another config; move it away")
                self.sessions = [(0, event.get("environment"))]
            elif "started" in event:
                self._num_started = event["started"] + 1
            elif "resumed" in event:
                self._begin_session(event.get("environment"))
            else:
                self._replay_finished(event)
        return sum(len(line) + 1 for line in lines[: len(texts)])

    def _replay_finished(self, event: dict[str, Any]) -> None:
        if event["finished"] != len(self.finished):
            raise RecordError(
                f"{self.path}: micro-batch {event['finished']} stands where {len(self.finished)} is due; "
                "delete the file to start over"
            )
        loss = np.frombuffer(base64.b64decode(event["loss"]), "<f4")
        top1 = np.frombuffer(base64.b64decode(event["top1"]), "<i4")
        measured = event.get("squared_error")
        squared_error = None if measured is None else tuple(map(tuple, measured))
        num_frames, *header_bytes = event.get("frames", [1])
        self.finished.append(
            FinishedMicroBatch(
                tuple(event["payload_bytes"]),
                loss,
                top1,
                squared_error,
                num_frames,
                tuple(header_bytes) if "frames" in event else None,
            )
        )
        self.earlier_s = event["elapsed_s"]


def _path(folder: Path, digest: str) -> Path:
    return folder / f"{digest[:16]}.journal"


def _open_locked(path: Path, mode: Literal["a+b", "r+b"]) -> BinaryIO:
    """Raises RecordError."""
    try:
        file = open(path, mode)
    except OSError as e:
        raise RecordError(f"the journal {path} cannot be written: {disk_problem(e)}") from e
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.close()
        raise RecordError(
            f"{path} belongs to a run with the same config that is still going on: wait for its end, or end it"
        ) from e
    except OSError as e:
        file.close()
        raise RecordError(
            f"the journal {path} cannot be locked: {e.strerror or e}; name a folder that can have locks (--exp_dir)"
        ) from e
    return file


def _intact(line: bytes) -> bytes | None:
    """The JSON text of a line, or None unless its checksum is right."""
    checksum, _, text = line.partition(b" ")
    return text if checksum == b"%08x" % zlib.crc32(text) else None
