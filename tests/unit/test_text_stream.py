"""Text of an answer while it comes: for any ids and stop strings what decoding them at once gives."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.generation.text import TextStream
from tests.helpers.marks import slow_but
from tests.helpers.tiny_models import BOS_ID, EOS_ID, tiny_model

CORPUS = 3 * [
    "naïve café 🙂🙃 the then there theme 日本語 日本 € 10 £ 5 one two  three",
    "stop STOP <end> ёж Ⅷ 👩‍👩‍👧 ~",
]
SPECIAL = ["<s>", "</s>"]
SPACE = "\u2581"


def finished(tokenizer):
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False), AddedToken("\n\n", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def byte_level():
    """GPT-2's kind: merged tokens may end within a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return finished(tokenizer)


def byte_fallback(decoder):
    """SentencePiece's kind: characters it has, and bytes for all others."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [*"abcdefst.€\ufffd", SPACE, f"{SPACE}a", f"{SPACE}b", 2 * SPACE, 3 * SPACE]
    tokens += ["st", "op", "", "日本", "abcd"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.decoder = decoder
    return finished(tokenizer)


def gemma():
    return byte_fallback(decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]))


def llama2():
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return byte_fallback(decoders.Sequence(parts))


def metaspace():
    return byte_fallback(decoders.Metaspace())


def bytes_alone():
    return AutoTokenizer.from_pretrained(tiny_model("llama"))


KINDS = {f.__name__: functools.cache(f) for f in (byte_level, bytes_alone, gemma, llama2, metaspace)}


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def cut(text, stop):
    """By hand, character by character: the text in front of the stop string that ends first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)], "stop"
    return text, None


def streamed(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(token_id) for token_id in ids]
    return "".join([*pieces, stream.finish()]), stream.finish_reason


@st.composite
def answers(draw, tokenizer):
    """Ids at random, pieces of text, and runs of one id; with stop strings that may occur in their text."""
    one = st.integers(0, len(tokenizer) + 2)
    text = st.text("ab st.€日本🙂\n", max_size=6)
    written = text.map(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"])
    run = st.builds(lambda token_id, n: [token_id] * n, one, st.integers(2, 40))
    ids = sum(draw(st.lists(st.one_of(st.lists(one, max_size=12), written, run), max_size=6)), [])
    text = whole(tokenizer, ids)
    spans = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 6)).map(lambda s: text[s[0] : s[0] + s[1]])
    return ids, draw(st.lists(st.one_of(spans.filter(bool), st.text("ab€\ufffd", min_size=1, max_size=4)), max_size=3))


@pytest.mark.parametrize("kind", slow_but(("gemma",), KINDS))
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_pieces_are_the_whole(kind, data):
    tokenizer = KINDS[kind]()
    ids, stop = data.draw(answers(tokenizer))
    text = whole(tokenizer, ids)
    assert streamed(tokenizer, ids) == (text, None)
    assert streamed(tokenizer, ids, stop) == cut(text, stop)
    # What is given is never taken back, wherever the answer ends.
    stream, given = TextStream(tokenizer), ""
    for n, token_id in enumerate(ids, 1):
        given += stream.push(token_id)
        assert whole(tokenizer, ids[:n]).startswith(given)


def pieces(tokenizer, ids, stop=()):
    stream = TextStream(tokenizer, stop)
    return [*map(stream.push, ids), stream.finish()]


def test_no_half_characters():
    ids = bytes_alone()("é🙂x", add_special_tokens=False)["input_ids"]
    assert pieces(bytes_alone(), ids) == ["", "é", "", "", "", "🙂", "x", ""]


def test_bytes_that_never_become_a_character_come_at_the_end():
    ids = bytes_alone()("a🙂", add_special_tokens=False)["input_ids"]
    assert pieces(bytes_alone(), ids[:-1]) == ["a", "", "", "", "\ufffd"]


def test_a_run_of_byte_tokens_waits_for_its_end():
    tokenizer = gemma()
    euro, letter, wrong = [0xE2, 0x82, 0xAC], tokenizer.convert_tokens_to_ids("a"), 0x80
    assert pieces(tokenizer, [*euro, letter]) == ["", "", "", "€a", ""]
    assert pieces(tokenizer, [*euro, wrong, letter])[-2:] == [4 * "\ufffd" + "a", ""]
    assert pieces(tokenizer, [*euro, *euro])[-1] == "€€"


def test_text_waits_where_a_stop_string_may_have_begun_and_only_there():
    ids = bytes_alone()("to sto st!", add_special_tokens=False)["input_ids"]
    assert pieces(bytes_alone(), ids, ["stop"]) == ["t", "o", " ", "", "", "", "sto ", "", "", "st!", ""]


def test_a_stop_string_may_begin_in_a_token_and_end_in_another():
    tokenizer = gemma()
    ids = tokenizer.convert_tokens_to_ids(["a", "st", "op", "a"])
    stream = TextStream(tokenizer, ["astop", "top"])
    assert [stream.push(token_id) for token_id in ids] == ["", "", "", ""]
    assert stream.finish_reason == "stop" and stream.finish() == ""
    stream = TextStream(tokenizer, ["top"])
    assert [stream.push(token_id) for token_id in ids] == ["a", "s", "", ""]
    assert stream.finish_reason == "stop"


def test_of_stop_strings_in_one_token_the_one_that_ends_first_counts():
    tokenizer = gemma()
    ids = tokenizer.convert_tokens_to_ids(["e", "abcd"])
    assert streamed(tokenizer, ids, ["abcd", "bc"]) == ("ea", "stop")
    assert streamed(tokenizer, ids, ["abcd", "bcd"]) == ("e", "stop")


@pytest.mark.parametrize("kind", ["llama2", "metaspace"])
def test_a_space_behind_many_tokens_without_text_stays(kind):
    tokenizer = KINDS[kind]()
    ids = tokenizer.convert_tokens_to_ids(["a", *30 * [""], f"{SPACE}a"])
    assert streamed(tokenizer, ids) == (whole(tokenizer, ids), None) == ("a a", None)


def test_special_tokens_have_no_text():
    ids = bytes_alone()("hi", add_special_tokens=False)["input_ids"]
    assert pieces(bytes_alone(), [BOS_ID, ids[0], EOS_ID, ids[1]]) == ["", "h", "", "i", ""]


def test_nothing_after_the_end():
    stream = TextStream(bytes_alone())
    assert stream.finish() == "" and stream.push(5) == "" and stream.finish() == ""


@pytest.mark.parametrize("kind", KINDS)
def test_work_does_not_grow_with_the_answer(kind, monkeypatch):
    """Ids handed to the decoder, per token; characters, bytes that are none, and tokens without text."""
    tokenizer = KINDS[kind]()
    stream, num_decoded, decode = TextStream(tokenizer, ["never"]), [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **how: num_decoded.append(len(ids)) or decode(ids, **how))
    text = tokenizer("ab 日本 🙂.", add_special_tokens=False)["input_ids"]
    for ids in (text * 50, [0x80] * 500, [0xE2, text[0]] * 250, [tokenizer.eos_token_id] * 500):
        before = sum(num_decoded)
        for token_id in ids:
            stream.push(token_id)
        assert sum(num_decoded) - before < 20 * (len(ids) + 500)  # a run of byte tokens is decoded whole, once
    assert num_decoded
    stream.finish()
