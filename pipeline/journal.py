"""Finished micro-batches of a run that has not ended yet, so that `--resume` can go on from there.

One file per run digest, in the folder of the records: a line of JSON per event, appended and handed to the operating
system at once, so that a killed process loses nothing that it finished. A torn last line is dropped on reading. The
file is removed when the record is written.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.record import RecordError

__all__ = ["FinishedMicroBatch", "Journal"]

FORMAT = "thinwire journal 1"


@dataclass(frozen=True)
class FinishedMicroBatch:
    """What one micro-batch contributes to the record.

    `payload_bytes` has one entry per link, `loss` (float32) and `top1` (int32) one per scored token.
    """

    payload_bytes: tuple[int, ...]
    loss: np.ndarray
    top1: np.ndarray


@dataclass
class Journal:
    """An open journal.

    `finished` are micro-batches 0, 1, ...; `interrupted` those that had entered the pipeline when a session ended,
    whose bytes are sent again; `earlier_s` the seconds of earlier sessions up to their last finished micro-batch.
    """

    path: Path
    finished: list[FinishedMicroBatch] = field(default_factory=list)
    interrupted: set[int] = field(default_factory=set)
    num_sessions: int = 1
    earlier_s: float = 0.0

    @classmethod
    def open(cls, folder: Path, digest: str, *, resume: bool) -> Journal:
        """Open the journal of the run with this digest; with `resume`, take over what it holds.

        Raises RecordError when another process has it open or it cannot be written or read.
        """
        path = folder / f"{digest[:16]}.journal"
        try:
            file = open(path, "a+b")
        except OSError as e:
            raise RecordError(f"the journal {path} cannot be written: {e.strerror or e}") from e
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise RecordError(f"{path} belongs to a run with the same config that is still going on") from e
        journal = cls(path)
        journal._num_started = 0
        journal._file = file
        journal._start_s = time.monotonic()
        file.seek(0)
        lines = file.read().split(b"\n")
        if resume:
            kept = journal._replay(lines, digest)
            file.truncate(kept)
        else:
            file.truncate(0)
        if not resume or kept == 0:
            journal._append({"format": FORMAT, "digest": digest})
        else:
            journal._begin_session()
            journal._append({"resumed": len(journal.finished)})
        return journal

    @staticmethod
    def exists(folder: Path, digest: str) -> bool:
        """Whether an unfinished run with this digest has left at least one finished micro-batch."""
        path = folder / f"{digest[:16]}.journal"
        return path.is_file() and b'"finished"' in path.read_bytes()

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
                "loss": base64.b64encode(result.loss.astype("<f4").tobytes()).decode(),
                "top1": base64.b64encode(result.top1.astype("<i4").tobytes()).decode(),
            }
        )
        self.finished.append(result)

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
        self._file.close()

    def _begin_session(self) -> None:
        self.num_sessions += 1
        self.interrupted.update(range(len(self.finished), self._num_started))

    def _append(self, event: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(event).encode() + b"\n")
            self._file.flush()
        except OSError as e:
            raise RecordError(f"the journal {self.path} cannot be written: {e.strerror or e}") from e

    def _replay(self, lines: list[bytes], digest: str) -> int:
        """Take over complete lines; returns how many bytes of the file they fill."""
        kept = 0
        for number, line in enumerate(lines[:-1]):
            try:
                event = json.loads(line)
                if number == 0:
                    if event != {"format": FORMAT, "digest": digest}:
                        raise RecordError(f"{self.path} was written by another version or for another config")
                elif "started" in event:
                    self._num_started = int(event["started"]) + 1
                elif "resumed" in event:
                    self._begin_session()
                else:
                    self._replay_finished(event)
            except (ValueError, KeyError, TypeError, binascii.Error) as e:
                if isinstance(e, RecordError) or number < len(lines) - 2:
                    raise RecordError(f"{self.path}, line {number + 1}: {e}; delete it to start over") from e
                break
            kept += len(line) + 1
        return kept

    def _replay_finished(self, event: dict[str, Any]) -> None:
        if event["finished"] != len(self.finished):
            raise ValueError(f"micro-batch {event['finished']} follows {len(self.finished)} finished ones")
        loss = np.frombuffer(base64.b64decode(event["loss"], validate=True), "<f4")
        top1 = np.frombuffer(base64.b64decode(event["top1"], validate=True), "<i4")
        if len(loss) != len(top1):
            raise ValueError("losses and top-1 ids differ in number")
        self.finished.append(FinishedMicroBatch(tuple(map(int, event["payload_bytes"])), loss, top1))
        self.earlier_s = float(event["elapsed_s"])
