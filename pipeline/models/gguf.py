"""Convert a GGUF file once to a cached directory that loads like any other checkpoint.

Called by `model_source.resolve_model`. transformers reads and dequantises the file, weights and tokenizer;
what it gives is stored as float32 safetensors, value for value. Nothing of the format is parsed here. The
conversion holds one whole model in memory, which is the price of `.gguf` sources; every later start only
hashes the file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import stat
import sys
from pathlib import Path
from unittest import mock

from safetensors import SafetensorError

from pipeline.models.staging import take_lock

from compressors.user_files import user_path

__all__ = ["convert_gguf_once"]

CONVERSION_VERSION = 2  # raised when this file writes something else; 1 could be published without weights


def convert_gguf_once(gguf: Path, cache_dir: str | None) -> Path:
    """The directory to which `gguf` was converted, converting it first where that has not been done.

    It lies in `cache_dir` (None: `$XDG_CACHE_HOME/thinwire` or `~/.cache/thinwire`) under a name made of the
    file's name, a digest of its content, and two versions: this file's and transformers', whose conversion of
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
    versions = f"v{CONVERSION_VERSION}-transformers{importlib.metadata.version('transformers')}"
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
        _convert(gguf, temporary)
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


def _convert(gguf: Path, out: Path) -> None:
    """Write config, tokenizer and float32 weights, exactly as transformers dequantises them, to `out`."""
    # Imported here: seconds to import, and needed once per model.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"converting {gguf.name} to float32, once; it will lie in {out.parent}", file=sys.stderr, flush=True)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except Exception as error:  # of many types, for damaged files and for architectures it does not know
        raise ValueError(f"transformers cannot load {gguf}: {type(error).__name__}: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:  # transformers only warns, and fills what is missing with random values
            raise ValueError(
                f"{gguf} does not fit its architecture {model.config.model_type!r}: {problem} "
                f"{sorted(map(str, report[problem]))[:4]}"
            )
    # In a process group transformers writes weights on its rank 0 alone; here any rank may be the one that converts.
    with mock.patch("torch.distributed.is_initialized", return_value=False):
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    if not (out / "config.json").is_file() or not any(out.glob("*.safetensors")):
        raise ValueError(
            f"transformers {importlib.metadata.version('transformers')} wrote no config or no weights of {gguf}, only "
            f"{sorted(path.name for path in out.iterdir())}; install a version that setup.cfg names"
        )
