"""Texts, their digests, and tokenisation in one piece."""

import hashlib
import os
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from pipeline.data.text import Text, _wikitext_rows, ids_digest, load_text, tokenize

WIKITEXT_DIR = Path(
    os.environ.get("THINWIRE_WIKITEXT", Path(__file__).parents[3] / "shared" / "data" / "wikitext-2-raw")
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tokenizer with one token per byte, which adds <s> in front, and a context of 16 tokens."""
    vocabulary = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    directory = tmp_path_factory.mktemp("model")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=16)
    fast.save_pretrained(directory)
    LlamaConfig().save_pretrained(directory)
    return directory


@pytest.fixture
def raw_file(tmp_path):
    path = tmp_path / "wiki.test.raw"
    path.write_bytes(" \n = Title = \n \n Caf\u00e9 , a\r\u2028 line . \n\n \t\n".encode())
    return path


def test_wikitext_rows_of_a_raw_file(raw_file):
    text = load_text(name="wikitext", path=str(raw_file), split="test")
    rows = ["", " = Title = \n", "", " Caf\u00e9 , a\r\u2028 line . \n", "", ""]
    assert text.text == "\n\n".join(rows)
    assert text.description == "WikiText-2 raw, rows of wiki.test.raw"


def test_wikitext_file_without_a_final_newline(tmp_path):
    path = tmp_path / "wiki.raw"
    path.write_text(" a \n b")
    assert load_text(name="wikitext", path=str(path), split="test").text == " a \n\n\n b"


def test_wikitext_through_datasets_gives_the_same_text(raw_file, monkeypatch):
    import datasets

    seen = []

    def load_dataset(*args, **kwargs):
        seen.append((args, kwargs))
        return {"text": ["", " = Title = \n", "", " Caf\u00e9 , a\r\u2028 line . \n", "", ""]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    downloaded = load_text(name="wikitext", path=None, split="validation")
    assert seen == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "validation"})]
    assert downloaded.text == load_text(name="wikitext", path=str(raw_file), split="test").text
    assert downloaded.description == "WikiText-2 raw v1, validation split (Salesforce/wikitext)"


def test_text_file_is_taken_as_it_is(tmp_path):
    content = b"\xef\xbb\xbfone\r\ntwo\n\n\nthree"
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    text = load_text(name="text", path=str(path), split="test")
    assert text.text.encode() == content
    assert text.sha256 == hashlib.sha256(content).hexdigest()
    assert text.description == "text file book.txt"


def test_pydoc_is_the_running_pythons(monkeypatch):
    from pydoc_data import topics

    text = load_text(name="pydoc", path=None, split="test")
    assert text.description == f"pydoc_data.topics of Python {'.'.join(map(str, sys.version_info[:3]))}"
    assert len(text.text) > 100_000
    monkeypatch.setattr(topics, "topics", {"b": "second", "a": "first"})
    assert load_text(name="pydoc", path=None, split="test").text == "first\n\nsecond"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "c4", "path": None}, r"dataset\.name='c4': expected one of wikitext, pydoc, text"),
        ({"name": "text", "path": None}, r"--set dataset\.path=FILE"),
        ({"name": "pydoc", "path": "x.txt"}, r"dataset\.path='x\.txt'.*reads no file"),
        ({"name": "text", "path": "missing.txt"}, r"dataset\.path=missing\.txt cannot be read.*No such file"),
        ({"name": "wikitext", "path": "."}, r"dataset\.path=\. cannot be read.*directory"),
    ],
)
def test_refused_sources(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_text(split="test", **arguments)


@pytest.mark.parametrize("name", ["wikitext", "text"])
def test_refused_contents(tmp_path, name):
    path = tmp_path / "file"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"file is not UTF-8.*0xe9 in position 3"):
        load_text(name=name, path=str(path), split="test")
    path.write_bytes(b" \n\n")
    with pytest.raises(ValueError, match=r"file is empty"):
        load_text(name=name, path=str(path), split="test")


def test_failed_download_names_the_way_out(monkeypatch):
    import datasets

    def offline(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"wikitext-2-raw-v1.*Couldn't reach.*--set dataset\.path=wiki"):
        load_text(name="wikitext", path=None, split="test")


def test_missing_datasets_library_names_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"ModuleNotFoundError.*--set dataset\.path="):
        load_text(name="wikitext", path=None, split="test")


def test_special_tokens_are_added_once_and_nothing_is_cut(model_dir, caplog, capsys):
    ids, bos_token_id = tokenize(Text(text="ab" * 500, description="letters"), model_dir)
    assert bos_token_id == 0
    assert ids[0] == 0 and ids.count(0) == 1
    assert len(ids) == 1001
    assert "longer than" not in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "a"])
def test_too_short_a_text(tmp_path, model_dir, content):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"empty: a test gives {len(content)} token\(s\), and at least 2"):
        tokenize(Text(text=content, description="a test"), tmp_path)


@pytest.mark.parametrize("config", [LlamaConfig(), Qwen3Config()], ids=["raises", "makes an empty one"])
def test_model_without_tokenizer(tmp_path, config):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer loads from"):
        tokenize(Text(text="some text", description="a test"), tmp_path)


def test_ids_digest_is_of_little_endian_int32():
    expected = hashlib.sha256(bytes([1, 0, 0, 0, 0, 1, 0, 0])).hexdigest()
    assert ids_digest([1, 256]) == expected
    assert ids_digest([256, 1]) != expected


@pytest.mark.skipif(
    not (WIKITEXT_DIR / "wiki.test.raw").is_file(),
    reason="no wiki.test.raw; set THINWIRE_WIKITEXT to its directory",
)
def test_the_real_test_split():
    path = WIKITEXT_DIR / "wiki.test.raw"
    assert len(_wikitext_rows(path.read_bytes().decode())) == 4358  # as the hub's dataset card says
    text = load_text(name="wikitext", path=str(path), split="test")
    assert text.sha256 == "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
