"""The evaluation text and its token ids, each with a digest for the record.

Rank 0 loads the text, tokenises it in one piece and broadcasts the ids. The WikiText-2 text is made as in
Hugging Face's perplexity guide: the rows of the raw split joined by blank lines. Cutting the ids into windows
is `windows`' part, as is a beginning-of-sequence token for every window.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

__all__ = ["DATASET_NAMES", "Text", "ids_digest", "load_text", "tokenize"]

DATASET_NAMES = ("wikitext", "pydoc", "text")

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
    * `pydoc`: the help topics of the running Python's standard library, always at hand but different from one
      Python version to the next.
    * `text`: the UTF-8 file at `path`, as it is.

    Raises ValueError for an unknown name, a file that is missing, empty or not UTF-8, and a failed download.
    """
    if name not in DATASET_NAMES:
        raise ValueError(f"dataset.name={name!r}: expected one of {', '.join(DATASET_NAMES)}")
    if name == "pydoc":
        if path is not None:
            raise ValueError(
                f"dataset.path={path!r}: dataset.name=pydoc reads no file; use dataset.name=text, or leave the path out"
            )
        return _load_pydoc()
    if name == "wikitext" and path is None:
        text = "\n\n".join(_download_wikitext_rows(split))
        return Text(text=text, description=f"WikiText-2 raw v1, {split} split ({_WIKITEXT_HUB_ID[0]})")
    if path is None:
        raise ValueError("dataset.name=text needs a file: --set dataset.path=FILE")
    content = _read_utf8(Path(path).expanduser())
    if name == "wikitext":
        text, kind = "\n\n".join(_wikitext_rows(content)), "WikiText-2 raw, rows of"
    else:
        text, kind = content, "text file"
    return Text(text=text, description=f"{kind} {Path(path).name}")


def tokenize(text: Text, model_dir: Path, *, trust_remote_code: bool = False) -> tuple[list[int], int | None]:
    """Token ids of the whole text, with the special tokens that the model's tokenizer adds, once.

    Returns the ids and the tokenizer's `bos_token_id` (None where it has none). Raises ValueError when
    `model_dir` has no tokenizer that loads, and for a text of 0 or 1 token: there is nothing to predict in
    it.
    """
    from transformers import AutoTokenizer  # seconds to import, and only rank 0 tokenises

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many types here
        raise ValueError(f"no tokenizer loads from {model_dir}: {type(error).__name__}: {error}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes of no files
        raise ValueError(f"no tokenizer loads from {model_dir}: its vocabulary is missing; copy it again")
    # Not verbose: else it warns that the text is longer than the model's context, which windows take care of.
    ids = tokenizer(text.text, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise ValueError(
            f"the dataset is empty: {text.description} gives {len(ids)} token(s), and at least 2 are needed "
            "to score one; check dataset.name and dataset.path"
        )
    return ids, tokenizer.bos_token_id


def ids_digest(ids: Sequence[int]) -> str:
    """SHA-256 (hex) of the token ids as little-endian int32."""
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()


def _read_utf8(path: Path) -> str:
    try:
        content = path.read_bytes().decode("utf-8")  # as bytes: opening as text would translate line ends
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset.path={path} is not UTF-8: {error}; convert it, e.g. with iconv") from error
    except OSError as error:
        raise ValueError(f"dataset.path={path} cannot be read: {error}") from error
    if not content.strip():
        raise ValueError(f"dataset.path={path} is empty; expected a text to evaluate on")
    return content


def _wikitext_rows(content: str) -> list[str]:
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


def _load_pydoc() -> Text:
    from pydoc_data.topics import topics

    return Text(
        text="\n\n".join(topics[key] for key in sorted(topics)),
        description=f"pydoc_data.topics of Python {platform.python_version()}",
    )
