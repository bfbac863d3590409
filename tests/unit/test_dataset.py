"""Texts, their digests, and tokenisation in one piece."""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from pipeline.data.text import Text, ids_digest, load_text, tokenize, wikitext_rows

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
    path.write_bytes(" \n = Title = \n \n Caf\u00e9 , a\u2028\x0b line . \n\n \t\n".encode())
    return path


def test_wikitext_rows_of_a_raw_file(raw_file):
    text = load_text(name="wikitext", path=str(raw_file), split="test")
    rows = ["", " = Title = \n", "", " Caf\u00e9 , a\u2028\x0b line . \n", "", ""]
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
        return {"text": ["", " = Title = \n", "", " Caf\u00e9 , a\u2028\x0b line . \n", "", ""]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    downloaded = load_text(name="wikitext", path=None, split="validation")
    assert seen == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "validation"})]
    assert downloaded.text == load_text(name="wikitext", path=str(raw_file), split="test").text
    assert downloaded.description == "WikiText-2 raw v1, validation split (Salesforce/wikitext)"


def test_text_file_is_taken_as_it_is(tmp_path):
    content = "one\ntwo \n\n\n\u2028thr\u00e9e\ufeff\x0c".encode()
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    text = load_text(name="text", path=str(path), split="test")
    assert text.text.encode() == content
    assert text.sha256 == hashlib.sha256(content).hexdigest()
    assert text.description == "text file book.txt"


OTHER_BYTES = {
    "CR LF": lambda text: text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "CR CR LF, converted twice": lambda text: text.replace("\n", "\r\r\n").encode(),
    "CR, then CR LF, then LF": lambda text: text.replace("\n", "\r", 1).replace("\n", "\r\n", 2).encode(),
    "byte-order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "two byte-order marks": lambda text: 2 * b"\xef\xbb\xbf" + text.encode(),
    "byte-order mark and CR LF": lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
}


@pytest.mark.parametrize("name", ["wikitext", "text"])
@pytest.mark.parametrize("written", OTHER_BYTES.values(), ids=OTHER_BYTES)
def test_line_ends_and_marks_do_not_change_the_text(tmp_path, name, written):
    text = " \n = Title = \n \n Caf\u00e9 \n\n\n last"
    found = {}
    for file, content in (("plain", text.encode()), ("other", written(text))):
        (tmp_path / file).mkdir()
        path = tmp_path / file / "wiki.raw"
        path.write_bytes(content)
        found[file] = load_text(name=name, path=str(path), split="test")
    assert found["other"] == found["plain"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text".encode("utf-16"), "is UTF-16, by its byte-order mark.*iconv -f UTF-16 -t UTF-8"),
        ("text".encode("utf-32"), "is UTF-32, by its byte-order mark.*iconv -f UTF-32 -t UTF-8"),
        (b"\xfe\xff\0t", "is UTF-16, by its byte-order mark"),
        ("a\nb".encode("utf-16-le"), "has a NUL byte at byte 1, line 1: .* UTF-16 without a byte-order mark"),
        (b"one\ntwo\0", "has a NUL byte at byte 7, line 2"),
        (b"one\ncaf\xe9", r"is not UTF-8.*0xe9 in position 7.*\(at byte 7, line 2\); convert it"),
        (b"cut short: \xc3", "is not UTF-8.*position 11"),
        (b"\xed\xa0\x80", "is not UTF-8"),
        (b"", "is empty"),
        (b"\xef\xbb\xbf \r\n", "is empty"),
    ],
)
@pytest.mark.parametrize("name", ["wikitext", "text"])
def test_bytes_that_are_no_text(tmp_path, name, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"dataset\.path=.*file {message}"):
        load_text(name=name, path=str(path), split="test")


def test_a_downloaded_row_keeps_its_text(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"text": ["a\r\n", "b\n"]})
    assert load_text(name="wikitext", path=None, split="test").text == "a\n\n\nb\n"


@pytest.mark.parametrize(("name", "path"), [("text", "book.txt"), ("wikitext", "book.txt")])
def test_a_split_that_is_not_looked_at_is_said(tmp_path, monkeypatch, caplog, name, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("text")
    load_text(name=name, path=path, split="test")
    assert not caplog.records
    load_text(name=name, path=path, split="validation")
    assert re.search(r"dataset.split=validation has no meaning for a file: .* is read as a whole", caplog.text)


def test_pydoc_is_the_running_pythons(monkeypatch):
    from pydoc_data import topics

    text = load_text(name="pydoc", path=None, split="test")
    assert text.description == f"pydoc_data.topics of Python {'.'.join(map(str, sys.version_info[:3]))}"
    assert len(text.text) > 100_000
    monkeypatch.setattr(topics, "topics", {"b": "second", "a": "first"})
    assert load_text(name="pydoc", path=None, split="test").text == "first\n\nsecond"


@pytest.mark.slow
def test_pydocs_validation_split_is_another_text():
    test, validation = (load_text(name="pydoc", path=None, split=split) for split in ("test", "validation"))
    assert validation.description.startswith("docstrings of the standard library's modules of Python 3.")
    assert len(validation.text) > 50_000
    topics = " ".join(test.text.split())
    words = " ".join(validation.text.split())
    chunks = [words[i : i + 60] for i in range(0, len(words), 60)]
    assert sum(chunk in topics for chunk in chunks) < 0.02 * len(chunks)


def test_pydocs_validation_split_needs_modules(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"has no modules with docstrings.*--set dataset\.name=text"):
        load_text(name="pydoc", path=None, split="validation")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "c4", "path": None}, r"dataset\.name='c4': expected one of wikitext, pydoc, text"),
        ({"name": "text", "path": None}, r"--set dataset\.path=FILE"),
        ({"name": "pydoc", "path": None, "split": "train"}, r"dataset\.split='train'.*the splits test and validation"),
        ({"name": "pydoc", "path": "x.txt"}, r"dataset\.path='x\.txt'.*reads no file"),
        ({"name": "text", "path": "missing.txt"}, r"dataset\.path=missing\.txt cannot be read.*No such file"),
        ({"name": "wikitext", "path": "."}, r"dataset\.path=\. cannot be read.*directory"),
    ],
)
def test_refused_sources(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_text(**{"split": "test"} | arguments)


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


DAMAGE = {
    "not JSON": ("tokenizer.json", "{", r"tokenizer\.json: it is damaged \(Expecting property name"),
    "empty": ("tokenizer_config.json", "", r"tokenizer_config\.json: it is damaged"),
    "a list": ("tokenizer_config.json", "[]", r"tokenizer_config\.json: it holds a list, not an object"),
    "nested without end": ("tokenizer.json", '{"a":' + 100_000 * "[", r"tokenizer\.json: it is damaged"),
    "no tokenizer's JSON": ("tokenizer.json", "{}", r"no tokenizer loads from .*Copy the model's tokenizer files"),
    "a wrong type": ("tokenizer_config.json", '{"tokenizer_class": 5}', r"no tokenizer loads from .*Copy the"),
}


@pytest.mark.parametrize(("name", "content", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_tokenizer_files_are_named(tmp_path, model_dir, name, content, message):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        tokenize(Text(text="some text", description="a test"), folder)


def test_a_panic_of_the_tokenizers_library_is_an_error(tmp_path, model_dir):
    """A map of characters that are not in the text makes the Rust code panic; that is no Exception in Python."""
    folder = shutil.copytree(model_dir, tmp_path / "model")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="Copy the model's tokenizer files"):
        tokenize(Text(text="some text", description="a test"), folder)


class Panic(BaseException):
    """As pyo3's, which cannot be made in Python."""


@pytest.mark.parametrize("method", ["get_vocab", "__call__"])
@pytest.mark.parametrize("error", [Panic, RuntimeError, KeyboardInterrupt, SystemExit])
def test_every_error_of_the_tokenizer_but_interruptions(model_dir, monkeypatch, method, error):
    def fail(*args, **kwargs):
        raise error("index out of bounds")

    monkeypatch.setattr(PreTrainedTokenizerFast, method, fail)
    expected = error if error in (KeyboardInterrupt, SystemExit) else ValueError
    with pytest.raises(expected, match="index out of bounds") as caught:
        tokenize(Text(text="some text", description="a test"), model_dir)
    if expected is ValueError:
        assert str(model_dir) in str(caught.value) and error.__name__ in str(caught.value)


def test_ids_beyond_the_embedding_are_named(model_dir):
    text = Text(text="aab", description="letters")
    ids, _ = tokenize(text, model_dir)
    assert tokenize(text, model_dir, vocab_size=max(ids) + 1) == (ids, 0)
    with pytest.raises(
        ValueError, match=rf"token 3 of letters is 'b' with id {ids[3]}, but .*vocab_size is {ids[3]}, "
    ):
        tokenize(text, model_dir, vocab_size=ids[3])
    assert tokenize(text, model_dir, vocab_size=ids[3], first_k_tokens=3) == (ids[:3], 0)  # what is not used may be


def test_a_text_shorter_than_asked_for_is_said(model_dir, caplog):
    text = Text(text="aab", description="letters")
    assert len(tokenize(text, model_dir, first_k_tokens=4)[0]) == 4 and not caplog.records
    assert len(tokenize(text, model_dir, first_k_tokens=99)[0]) == 4
    assert "dataset.first_k_tokens is 99, letters has 4" in caplog.text


def test_a_bos_token_beyond_the_embedding_is_named(tmp_path, model_dir):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_dir)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    tokenizer.add_special_tokens({"bos_token": "<new>"})
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the BOS token is '<new>' with id 257, but the model's vocab_size is 257"):
        tokenize(Text(text="aab", description="letters"), tmp_path, vocab_size=257)


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
    assert len(wikitext_rows(path.read_bytes().decode())) == 4358  # as the hub's dataset card says
    text = load_text(name="wikitext", path=str(path), split="test")
    assert text.sha256 == "696cca6b65a171b0a358a4be6732cdfdf2dd6164a32e20fd70e3c13fc4dfae83"
