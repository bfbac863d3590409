"""The evaluation text and its token ids, each with a digest for the record.

Rank 0 loads the text, tokenises it in one piece and broadcasts the ids. The WikiText-2 text is made as in
Hugging Face's perplexity guide: the rows of the raw split joined by blank lines. Cutting the ids into windows
is `windows`' part, as is a beginning-of-sequence token for every window.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import logging
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compressors.user_files import read_text, unified_line_ends, user_path

__all__ = [
    "DATASET_NAMES",
    "Text",
    "check_vocabulary",
    "encode",
    "ids_digest",
    "load_text",
    "load_tokenizer",
    "tokenize",
]

logger = logging.getLogger(__name__)

DATASET_NAMES = ("wikitext", "pydoc", "text")

_TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_WIKITEXT_HUB_ID = ("Salesforce/wikitext", "wikitext-2-raw-v1")


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text, what it is (for the record), and the SHA-256 (hex) of its UTF-8 bytes."""

    text: str
    description: str
    sha256: str = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "sha256", hashlib.sha256(self.text.encode("utf-8")).hexdigest())


def load_text(*, name: str, path: str | None, split: str) -> Text:
    """Load an evaluation text.

    `name` is one of

    * `wikitext`: WikiText-2 raw v1. Without `path`, the hub's `split` (`train`, `validation` or `test`)
      through `datasets`; with it, a raw file such as `wiki.test.raw`, whose rows are made as `datasets` does.
    * `pydoc`: always at hand, but different from one Python version to the next. `test` is the help topics of the
      running Python's standard library; `validation` is the docstrings of its modules, to calibrate on, since the
      topics repeat one another.
    * `text`: the UTF-8 file at `path`.

    Line ends are `\\n` in all of them, and a byte-order mark is no text. `split` matters for pydoc and the hub's text.

    Raises ValueError for an unknown name, a file that is missing, empty or not UTF-8, and a failed download.
    """
    if name not in DATASET_NAMES:
        raise ValueError(f"dataset.name={name!r}: expected one of {', '.join(DATASET_NAMES)}")
    if split != "test" and path is not None:
        logger.warning("dataset.split=%s has no meaning for a file: dataset.path=%s is read as a whole", split, path)
    if name == "pydoc":
        if path is not None:
            raise ValueError(
                f"dataset.path={path!r}: dataset.name=pydoc reads no file; use dataset.name=text, or leave the path out"
            )
        return _load_pydoc(split)
    if name == "wikitext" and path is None:
        text = "\n\n".join(_download_wikitext_rows(split))
        description = f"WikiText-2 raw v1, {split} split ({_WIKITEXT_HUB_ID[0]})"
        return Text(text=unified_line_ends(text), description=description)
    if path is None:
        raise ValueError("dataset.name=text needs a file: --set dataset.path=FILE")
    content = read_text(Path(user_path(path)), f"dataset.path={path}")
    if not content.strip():
        raise ValueError(f"dataset.path={path} is empty; expected a text to evaluate on")
    if name == "wikitext":
        text, kind = "\n\n".join(wikitext_rows(content)), "WikiText-2 raw, rows of"
    else:
        text, kind = content, "text file"
    return Text(text=text, description=f"{kind} {Path(path).name}")


def tokenize(
    text: Text,
    model_dir: Path,
    *,
    trust_remote_code: bool = False,
    first_k_tokens: int = 0,
    vocab_size: int | None = None,
) -> tuple[list[int], int | None]:
    """Token ids of the text, made of the whole with the special tokens that the tokenizer adds, then cut (0: not).

    Returns the ids and the tokenizer's `bos_token_id` (None where it has none). Raises ValueError when `model_dir` has
    no tokenizer that loads, for a text of 0 or 1 token, since there is nothing to predict in it, and for an id that
    has no row in an embedding of `vocab_size` rows.
    """
    tokenizer = load_tokenizer(model_dir, trust_remote_code=trust_remote_code)
    ids = encode(tokenizer, text.text, f"the tokenizer in {model_dir} fails on {text.description}")
    if len(ids) < first_k_tokens:
        logger.warning("dataset.first_k_tokens is %d, %s has %d", first_k_tokens, text.description, len(ids))
    ids = ids[: first_k_tokens or None]
    bos_id = tokenizer.bos_token_id
    if len(ids) < 2:
        raise ValueError(
            f"the dataset is empty: {text.description} gives {len(ids)} token(s), and at least 2 are needed "
            "to score one; check dataset.name and dataset.path"
        )
    if vocab_size is not None:
        check_vocabulary(tokenizer, ids, text.description, vocab_size=vocab_size)
        check_vocabulary(tokenizer, [] if bos_id is None else [bos_id], "the BOS token", vocab_size=vocab_size)
    return ids, bos_id


def load_tokenizer(model_dir: Path, *, trust_remote_code: bool = False) -> Any:
    """transformers' tokenizer of a checkpoint. Raises ValueError where none loads; the message names a damaged file."""
    _check_json(model_dir)
    with _tokenizer_errors(f"no tokenizer loads from {model_dir}"):
        from transformers import AutoTokenizer  # seconds to import, and only rank 0 tokenises

        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code, local_files_only=True)
        is_empty = set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)  # transformers' of no files
    if is_empty:
        raise ValueError(f"no tokenizer loads from {model_dir}: its vocabulary is missing; copy it again")
    return tokenizer


def encode(tokenizer: Any, text: str, failure: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds. ValueErrors begin with `failure`."""
    with _tokenizer_errors(failure):
        # Not verbose: else it warns that the text is longer than the model's context, which others take care of.
        return list(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def check_vocabulary(tokenizer: Any, ids: Sequence[int], what: str, *, vocab_size: int) -> None:
    """Raise ValueError where an id of `what` has no row in an embedding of `vocab_size` rows."""
    highest = max(ids, default=-1)
    if highest < vocab_size:
        return
    place = what if len(ids) == 1 else f"token {ids.index(highest)} of {what}"
    folder = tokenizer.name_or_path
    with _tokenizer_errors(f"the tokenizer in {folder} fails on {what}"):
        token = tokenizer.convert_ids_to_tokens(highest)
    raise ValueError(
        f"{place} is {token!r} with id {highest}, but the model's vocab_size is {vocab_size}, so that its ids end "
        f"at {vocab_size - 1}: the tokenizer in {folder} belongs to another model, or tokens were added to it "
        "without rows in the embedding. Take the tokenizer files that came with the weights"
    )


def ids_digest(ids: Sequence[int] | np.ndarray) -> str:
    """SHA-256 (hex) of the token ids as little-endian int32."""
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()


def _check_json(model_dir: Path) -> None:
    """Name the file that is no JSON; the libraries say only where in it."""
    for name in _TOKENIZER_JSON:
        path = model_dir / name
        if path.is_file():
            try:
                content = json.loads(path.read_bytes())
            except (OSError, ValueError, RecursionError) as e:
                raise ValueError(f"no tokenizer loads from {path}: it is damaged ({e}); copy the file again") from e
            if not isinstance(content, dict):
                raise ValueError(f"no tokenizer loads from {path}: it holds a {type(content).__name__}, not an object")


@contextlib.contextmanager
def _tokenizer_errors(what: str) -> Iterator[None]:
    """transformers and tokenizers raise many types, and the latter's Rust panics are no Exceptions."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as e:
        raise ValueError(
            f"{what}: {type(e).__name__}: {e}. Copy the model's tokenizer files "
            f"({', '.join(_TOKENIZER_JSON)}, ...) again, or take another copy of the model"
        ) from e


def wikitext_rows(content: str) -> list[str]:
    """Rows as `datasets` makes them of the raw file: a line with its newline, a blank line as nothing."""
    lines = content.split("\n")
    rows = [line + "\n" if line.strip() else "" for line in lines[:-1]]
    if lines[-1]:
        rows.append(lines[-1] if lines[-1].strip() else "")
    return rows


def _download_wikitext_rows(split: str) -> list[str]:
    try:
        from datasets import load_dataset

        return list(load_dataset(*_WIKITEXT_HUB_ID, split=split)["text"])
    except Exception as error:  # datasets, the hub library, pyarrow and the system each raise their own
        raise ValueError(
            f"dataset.name=wikitext, dataset.split={split}: loading {'/'.join(_WIKITEXT_HUB_ID)} through "
            f"datasets failed ({type(error).__name__}: {error}). Without a network, name the raw file: "
            "--set dataset.path=wiki.test.raw, or use --set dataset.name=pydoc"
        ) from error


def _load_pydoc(split: str) -> Text:
    if split == "test":
        from pydoc_data.topics import topics

        pieces, kind = [topics[key] for key in sorted(topics)], "pydoc_data.topics"
    elif split == "validation":
        pieces, kind = _module_docstrings(), "docstrings of the standard library's modules"
    else:
        raise ValueError(f"dataset.split={split!r}: dataset.name=pydoc has the splits test and validation")
    return Text(text="\n\n".join(pieces), description=f"{kind} of Python {platform.python_version()}")


def _module_docstrings() -> list[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    found = [ast.get_docstring(ast.parse(path.read_bytes())) for path in sorted(folder.glob("*.py"))]
    if not any(found):
        raise ValueError(
            f"dataset.split='validation': {folder} has no modules with docstrings; name a file instead: "
            "--set dataset.name=text --set dataset.path=FILE"
        )
    return [docstring for docstring in found if docstring]
