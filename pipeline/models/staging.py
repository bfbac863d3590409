"""Copy named files from a slow directory to a fast one: resumable, verified, and quick when nothing changed.

Called by `source.resolve_model` when `model.stage_to` is set: weights on a network mount or a slow disk
are moved once to local disk, and every later start finds them there. Knows nothing of models.

The copy of `/slow/model` lives in `<stage_to>/model-<digest of the absolute path>/`:

    model.safetensors                 a finished file: its size and every chunk's hash were checked
    model.safetensors.part            a file in the making
    model.safetensors.part.hashes     SHA-256 of each source chunk that was written to it
    thinwire_staging.manifest         what was copied: size and modification time of the source, chunk hashes

A chunk's hash is recorded after the chunk is written, and a resumed copy compares each recorded chunk with
the bytes on the fast disk, so a crash at any moment costs at most one chunk. One process copies, others of
the same machine wait for it. The check at the end reads the copy back through the operating system, which may
answer from its page cache. A source that changes without changing its size or modification time goes
unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout
from tqdm import tqdm

from compressors.user_files import user_path

__all__ = ["FileCopy", "stage_directory", "take_lock"]

logger = logging.getLogger(__name__)

CHUNK_BYTES = 64 << 20
MANIFEST_NAME = "thinwire_staging.manifest"
LOCK_NAME = "thinwire_staging.lock"
_QUIET_WAIT_S = 10.0


def stage_directory(src: Path, stage_to: str, *, files: Sequence[str], show_progress: bool) -> Path:
    """Copy `files` (plain names) of `src` to a subfolder of `stage_to`, or find them already there.

    Symbolic links in `src` are followed. `stage_to` itself is created, its parents are not: a missing parent
    is more often a disk that is not mounted. Returns the subfolder, complete.

    Raises ValueError when a source file is missing, unreadable or changes during the copy, when the
    destination cannot be written, and when its disk is too small (before anything is copied). Whatever was
    copied stays and is used by the next call.
    """
    src = Path(os.path.abspath(src))
    root = Path(user_path(stage_to))
    path_digest = hashlib.sha256(os.fsencode(src)).hexdigest()[:12]
    target = root / f"{src.name}-{path_digest}"
    with _locked_folder(root, target):
        manifest_path = target / MANIFEST_NAME
        manifest = _read_json(manifest_path)
        for name in manifest.keys() - set(files):
            (target / name).unlink(missing_ok=True)
        pending = {}
        for name in sorted(files):
            identity = _identity(src / name)
            if not _is_staged(target / name, identity, manifest.get(name)):
                # Goes first, to make room and so that no file of an older source stays beside new ones.
                (target / name).unlink(missing_ok=True)
                pending[name] = FileCopy(src / name, target / name, identity)
        if pending:
            _check_free_space(src, root, list(pending.values()))
        total_bytes = sum(copy.identity["size"] for copy in pending.values())
        with tqdm(
            total=total_bytes,
            desc=f"staging {src.name}",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            disable=not show_progress or not pending,
        ) as progress:
            for name, copy in pending.items():
                try:
                    copy.run(progress)
                    manifest[name] = copy.record()
                    _write_json(manifest_path, {key: manifest[key] for key in files if key in manifest})
                    copy.hashes.unlink(missing_ok=True)  # an empty file has none
                except OSError as error:
                    raise ValueError(
                        f"staging {src / name} to {target} (model.stage_to) stopped: {error}. What is copied "
                        "stays; remove the cause and start again to continue"
                    ) from error
    return target


class FileCopy:
    """One file on its way: the source, the `.part` file, and the hashes of the chunks written to it."""

    def __init__(self, source: Path, target: Path, identity: dict[str, int]):
        self.source = source
        self.target = target
        self.identity = identity
        self.part = target.with_name(target.name + ".part")
        self.hashes = target.with_name(target.name + ".part.hashes")
        recorded = _read_json(self.hashes)
        self.chunk_sha256 = list(recorded.get("chunk_sha256", []))
        if not self.part.exists() or recorded != self.record():
            self.chunk_sha256 = []
            self.part.unlink(missing_ok=True)

    def record(self) -> dict:
        return {**self.identity, "chunk_bytes": CHUNK_BYTES, "chunk_sha256": self.chunk_sha256}

    def missing_bytes(self) -> int:
        present = self.part.stat().st_size if self.part.exists() else 0
        return max(0, self.identity["size"] - present)

    def run(self, progress: tqdm) -> None:
        """Write the chunks that are missing or damaged, check all of them, move the file to its name."""
        mode = "r+b" if self.part.exists() else "w+b"
        with open(self.source, "rb") as reader, open(self.part, mode) as writer:
            for index, (offset, length) in enumerate(self._chunks()):
                if not self._is_intact(writer, index, offset, length):
                    self.copy_chunk(reader, writer, index, offset, length)
                progress.update(length)
            writer.truncate(self.identity["size"])
            os.fsync(writer.fileno())
            for index, (offset, length) in enumerate(self._chunks()):
                if not self._is_intact(writer, index, offset, length):
                    raise ValueError(
                        f"{self.part}: bytes {offset} to {offset + length} differ from {self.source} "
                        "although they were just written; check that disk, then start again"
                    )
        if _identity(self.source) != self.identity:
            raise ValueError(f"{self.source} changed while it was copied; start again when it is complete")
        os.replace(self.part, self.target)

    def _chunks(self) -> Iterator[tuple[int, int]]:
        size = self.identity["size"]
        for offset in range(0, size, CHUNK_BYTES):
            yield offset, min(CHUNK_BYTES, size - offset)

    def _is_intact(self, writer: IO[bytes], index: int, offset: int, length: int) -> bool:
        if index >= len(self.chunk_sha256):
            return False
        writer.seek(offset)
        return hashlib.sha256(writer.read(length)).hexdigest() == self.chunk_sha256[index]

    def copy_chunk(self, reader: IO[bytes], writer: IO[bytes], index: int, offset: int, length: int) -> None:
        """Write `length` bytes from `offset` on, then take down their hash. Where a disk or a source fails, in life and
        in the tests, it fails here."""
        reader.seek(offset)
        chunk = reader.read(length)
        if len(chunk) != length:
            raise ValueError(
                f"{self.source} ended at byte {offset + len(chunk)} of {self.identity['size']}: it changed "
                "while it was copied; start again when it is complete"
            )
        writer.seek(offset)
        writer.write(chunk)
        writer.flush()
        self.chunk_sha256[index : index + 1] = [hashlib.sha256(chunk).hexdigest()]
        _write_json(self.hashes, self.record())


@contextmanager
def _locked_folder(root: Path, target: Path) -> Iterator[None]:
    """Create `target` below `root` and hold its lock; the system frees the lock of a process that dies."""
    try:
        root.mkdir(exist_ok=True)
        target.mkdir(exist_ok=True)
        lock = take_lock(target / LOCK_NAME)
    except OSError as error:
        raise ValueError(
            f"cannot stage to {root} (model.stage_to): {error}. Name a writable directory, or one whose "
            "parent exists, or leave model.stage_to out"
        ) from error
    try:
        yield
    finally:
        lock.release()


def take_lock(path: Path) -> FileLock:
    """A lock that is held, once other processes have let go of it; says what it waits for when that takes long.

    Raises OSError where it cannot be had, as on a file system that has no locks.
    """
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=_QUIET_WAIT_S)
        except Timeout:
            logger.warning("waiting for another process, which holds %s", path)
            lock.acquire()
    except NotImplementedError as error:  # of older versions of filelock
        raise OSError(f"{path} cannot be locked: {error}") from error
    return lock


def _identity(source: Path) -> dict[str, int]:
    try:
        stat = source.stat()
    except OSError as error:
        raise ValueError(f"cannot read {source} to stage it: {error}") from error
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def _is_staged(target: Path, identity: dict[str, int], record: dict | None) -> bool:
    return (
        record is not None
        and all(record.get(key) == value for key, value in identity.items())
        and target.is_file()
        and target.stat().st_size == identity["size"]
    )


def _check_free_space(src: Path, root: Path, copies: list[FileCopy]) -> None:
    needed_bytes = sum(copy.missing_bytes() for copy in copies)
    free_bytes = shutil.disk_usage(root).free
    if needed_bytes > free_bytes:
        raise ValueError(
            f"staging {src} needs {needed_bytes / 2**30:.3f} GiB more in {root} (model.stage_to), which has "
            f"{free_bytes / 2**30:.3f} GiB free. Free some space there, name another model.stage_to, or "
            "leave it out"
        )


def _read_json(path: Path) -> dict:
    """The object in `path`; empty where there is none or it is damaged, so that the copy starts anew."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(content), encoding="utf-8")
    os.replace(temporary, path)
