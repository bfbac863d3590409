"""Convert a GGUF file once to a cached directory that loads like any other checkpoint.

Called by `source.resolve_model`. What is in the file, and what becomes of it, is `gguf_conversion.py`'s business; here
are the cache, its lock, and files that appear only when they are complete. The conversion holds one whole model in
memory, which is the price of `.gguf` sources; every later start only hashes the file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import stat
from pathlib import Path

from safetensors import SafetensorError

from compressors.user_files import user_path
from pipeline.models import gguf_conversion
from pipeline.models.staging import take_lock

__all__ = ["convert_gguf_once"]


def convert_gguf_once(gguf: Path, cache_dir: str | None) -> Path:
    """The directory to which `gguf` was converted, converting it first where that has not been done.

    It lies in `cache_dir` (None: `$XDG_CACHE_HOME/thinwire` or `~/.cache/thinwire`) under a name made of the
    file's name, a digest of its content, and two versions: the conversion's and transformers', whose conversion of
    tokenizers differs from release to release. It appears there only when complete. Several processes may
    call this at once: one converts, the others wait.

    Raises ValueError for a file that is not GGUF or that transformers cannot load in full, and for a cache
    that cannot be written.
    """
    with open(gguf, "rb") as file:
        if (magic := file.read(4)) != b"GGUF":
            raise ValueError(f"{gguf} is not a GGUF file: it starts with {magic!r} instead of b'GGUF'")
        digest = hashlib.sha256(magic)
        while block := file.read(1 << 20):
            digest.update(block)
    if cache_dir is None:
        root = Path(user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "thinwire"
    else:
        root = Path(user_path(cache_dir))
    versions = f"v{gguf_conversion.CONVERSION_VERSION}-transformers{importlib.metadata.version('transformers')}"
    target = root / f"{gguf.stem}-{digest.hexdigest()[:16]}-{versions}"
    if target.is_dir():
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = take_lock(root / f"{target.name}.lock")
        try:
            if not target.is_dir():
                _convert_and_publish(gguf, target)
        finally:
            lock.release()
    except (OSError, SafetensorError) as error:  # the latter for a full disk, too
        raise ValueError(
            f"cannot write the converted model to {root}: {error}. Name a writable directory with space for "
            "the weights in float32: --set model.dir=DIR"
        ) from error
    return target


def _convert_and_publish(gguf: Path, target: Path) -> None:
    prefix = f"{target.name}.tmp-"
    for leftover in [path for path in target.parent.iterdir() if path.name.startswith(prefix)]:
        shutil.rmtree(leftover)  # of a conversion that was killed: the lock is ours
    temporary = target.with_name(f"{prefix}{os.getpid()}")
    temporary.mkdir()
    try:
        gguf_conversion.convert(gguf, temporary)
        plain = temporary / "plain"
        plain.touch()
        mode = stat.S_IMODE(plain.stat().st_mode)
        plain.unlink()
        for path in temporary.iterdir():
            path.chmod(mode)  # safetensors writes files that their owner alone can read
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # else a power cut could leave holes under the final name
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
