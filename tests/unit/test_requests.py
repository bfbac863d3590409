"""Lines of prompts: what they become, and that one at fault is refused alone."""

import io
import itertools
import json
import re
import sys

import pytest

from pipeline.config.schema import ConfigError, GenerationConfig
from pipeline.data.text import load_tokenizer
from pipeline.generation import requests
from pipeline.generation.requests import RefusedRequest, Request, RequestMaker, read_requests
from pipeline.models.sampling import DEFAULTS, GenerationDefaults, SamplingOptions
from tests.helpers.tiny_models import BOS_ID, EOS_ID, VOCAB_SIZE, tiny_model

DEFAULT = GenerationDefaults(**DEFAULTS, eos_ids=(3,), notes=())
TEMPLATE = (
    "<bos>{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(tiny_model("llama"))


def maker_of(tokenizer, defaults=DEFAULT, slot_length=200, vocab_size=VOCAB_SIZE, **generation):
    return RequestMaker(
        tokenizer=tokenizer,
        generation=GenerationConfig(**generation),
        defaults=defaults,
        vocab_size=vocab_size,
        slot_length=slot_length,
    )


def ids_of(tokenizer, text):
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def read(tmp_path, content, maker):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_requests(str(path), maker))


def test_lines_become_requests(tmp_path, tokenizer):
    content = '{"prompt": "hi"}\n"you, \\u00e9"\n{"prompt": "x", "max_new_tokens": 4, "temperature": 0.5, "seed": 3}\n'
    first, second, third = read(tmp_path, content, maker_of(tokenizer, max_new_tokens=9, seed=1, deadline_s=2.0))
    assert first == Request(
        line=1,
        text="hi",
        prompt_ids=(BOS_ID, *ids_of(tokenizer, "hi")),
        max_new_tokens=9,
        sampling=SamplingOptions(seed=1),
        stop=(),
        eos_ids=(3, EOS_ID),
        logprobs=None,
        deadline_s=2.0,
    )
    assert (second.line, second.text, second.prompt_ids) == (2, "you, é", (BOS_ID, *ids_of(tokenizer, "you, é")))
    assert (third.max_new_tokens, third.sampling) == (4, SamplingOptions(temperature=0.5, top_k=50, seed=3))


def test_every_own_key_has_its_effect(tokenizer):
    own = {"max_new_tokens": 5, "temperature": 1, "top_k": 2, "top_p": 0.5, "min_p": 0.1, "repetition_penalty": 1.2}
    own |= {"stop": ["a", "b"], "seed": 8, "ignore_eos": True, "deadline_s": 3, "logprobs": 4, "echo": True}
    assert set(own) == set(requests.OWN_KEYS)
    request = maker_of(tokenizer).make({"prompt": "x", **own}, line=4)
    assert (request.line, request.max_new_tokens, request.stop, request.eos_ids, request.deadline_s) == (
        *(4, 5, ("a", "b"), (), 3.0),
    )
    assert request.logprobs == 4 and request.scored_from == 1
    assert request.sampling == SamplingOptions(
        temperature=1.0, top_k=2, top_p=0.5, min_p=0.1, repetition_penalty=1.2, seed=8, num_top=4
    )
    assert maker_of(tokenizer).make({"prompt": "x", "logprobs": 3}).sampling == SamplingOptions(num_top=3)
    assert maker_of(tokenizer).make({"prompt": "x", "stop": "one"}).stop == ("one",)
    assert maker_of(tokenizer, temperature=0.7).make({"prompt": "x", "temperature": None}).sampling.greedy


def test_messages_go_through_the_chat_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    request = maker_of(tokenizer).make({"messages": messages})
    assert request.text == "<bos>[user]hi[assistant]yo[answer]"
    assert request.prompt_ids == (BOS_ID, *ids_of(tokenizer, "[user]hi[assistant]yo[answer]"))
    assert list(request.prompt_ids) == tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    with pytest.raises(ValueError, match="the model's chat template fails on these messages: .*no judges"):
        maker_of(tokenizer).make({"messages": [{"role": "judge", "content": "hi"}]})


WRITTEN = {
    "byte-order mark": b'\xef\xbb\xbf{"prompt": "a"}\n"b"\n',
    "CR LF": b'{"prompt": "a"}\r\n"b"\r\n',
    "blank lines": b'\n{"prompt": "a"}\n  \n\t\r\n"b"\n\n',
    "no final line end": b'{"prompt": "a"}\n"b"',
    "spaces around": b'  {"prompt" : "a" }  \n "b" ',
}


@pytest.mark.parametrize("content", WRITTEN.values(), ids=WRITTEN)
def test_marks_line_ends_and_blank_lines_do_not_matter(tmp_path, tokenizer, content):
    assert [request.text for request in read(tmp_path, content, maker_of(tokenizer))] == ["a", "b"]


def test_line_numbers_count_blank_lines(tmp_path, tokenizer):
    assert [request.line for request in read(tmp_path, '\n"a"\n\n"b"\nc\n', maker_of(tokenizer))] == [2, 4, 5]


AT_FAULT = {
    '{"prompt": "x"': r"it is no JSON \(Expecting",
    "plain words": r'it is no JSON \(.*; write {"prompt": "..."}, or the prompt in double quotes',
    '"x" "y"': r"it is no JSON \(Extra data",
    "[1, 2]": r"it must be an object with prompt or messages, or a string, got \[1, 2\]",
    "7": "it must be an object with prompt or messages, or a string, got 7",
    "null": "it must be an object",
    "{}": "it must have either prompt or messages",
    '{"prompt": "x", "messages": []}': "it must have either prompt or messages",
    '{"prompt": 7}': "prompt must be a string or a list of token ids, got 7",
    '{"prompt": []}': "the prompt has no tokens",
    '{"prompt": [1, -1]}': r"prompt\[1\] must be a token id, 0 to 257, got -1",
    '{"prompt": [258]}': r"prompt\[0\] must be a token id, 0 to 257, got 258",
    '{"prompt": [true]}': r"prompt\[0\] must be a token id, 0 to 257, got True",
    '{"prompt": [1.0]}': r"prompt\[0\] must be a token id, 0 to 257, got 1.0",
    '{"prompt": [[1]]}': r"prompt\[0\] must be a token id, 0 to 257, got \[1\]",
    json.dumps({"prompt": [1] * 201}): "the prompt has 201 tokens and max_new_tokens is 0, but .* at most 200",
    '{"prompt": "x", "max_new_tokens": 0, "echo": true}': "max_new_tokens is 0, .*logprobs",
    '{"prompt": [1], "max_new_tokens": 0, "echo": true, "logprobs": 1}': "the prompt has one token, which has no log",
    '{"prompt": "x", "echo": 1}': "echo must be true or false",
    '{"prompt": "x", "max_new_tokens": -1}': "max_new_tokens must be at least 0, got -1",
    '{"prompt": "x", "temprature": 1}': "unknown key 'temprature'; did you mean temperature",
    '{"prompt": "x", "max_slots": 1}': "unknown key 'max_slots'; .*Allowed: prompt, messages, max_new_tokens",
    '{"prompt": "x", "prompt": "y"}': "the key 'prompt' is given twice",
    '{"prompt": "x", "max_new_tokens": "4"}': "max_new_tokens must be an integer, got '4'",
    '{"prompt": "x", "max_new_tokens": 4.0}': "max_new_tokens must be an integer, got 4.0; write 4",
    '{"prompt": "x", "max_new_tokens": true}': "max_new_tokens must be an integer, got True",
    '{"prompt": "x", "max_new_tokens": null}': "max_new_tokens must be an integer, got None",
    '{"prompt": "x", "max_new_tokens": 0}': "max_new_tokens is 0, .* set echo to true and logprobs to a number",
    '{"prompt": "x", "temperature": NaN}': "NaN is no JSON number",
    '{"prompt": "x", "temperature": 1e999}': "temperature must be a finite number",
    '{"prompt": "x", "top_p": 1.5}': "top_p must be at most 1, got 1.5",
    '{"prompt": "x", "top_p": 0.5}': "top_p is 0.5, but no temperature is given",
    '{"prompt": "x", "logprobs": 21}': "logprobs must be at most 20, got 21",
    '{"prompt": "x", "logprobs": -1}': "logprobs must be at least 0, got -1",
    '{"prompt": "x", "logprobs": true}': "logprobs must be an integer, got True",
    '{"prompt": "x", "seed": 9223372036854775808}': "seed must be at most",
    '{"prompt": "x", "stop": [""]}': "stop holds an empty string",
    '{"prompt": "x", "stop": "\\ud800"}': "stop.* is not UTF-8",
    '{"prompt": "\\ud83d"}': "prompt has half of a surrogate pair at character 0",
    '{"messages": []}': "messages must be a list such as",
    '{"messages": "hi"}': "messages must be a list such as",
    '{"messages": [{"role": "user"}]}': r"messages\[0\] must have the keys role and content",
    '{"messages": [{"role": "user", "content": [1]}]}': r"messages\[0\].content must be a string, got \[1\]",
    '{"messages": [{"role": "user", "content": "x"}]}': "the model has no chat template",
    b'{"prompt": "\xe9t\xe9"}': "it is not UTF-8, from byte 12 on; convert the file: iconv",
    b'{"prompt": "a\x00b"}': "it is no JSON",
    '"x"'.encode("utf-16"): "it is not UTF-8, from byte 0 on",
    "[" * 100_000: "it is no JSON",
    json.dumps({"prompt": 73 * "x"}): "the prompt has 74 tokens and max_new_tokens is 128, but .* at most 200",
}


@pytest.mark.parametrize("line, words", AT_FAULT.items(), ids=itertools.count())
def test_a_line_at_fault_is_refused_alone(tmp_path, tokenizer, line, words):
    line = line if isinstance(line, bytes) else line.encode()
    before, refused, after, *_ = read(tmp_path, b'"a"\n' + line + b'\n"b"\n', maker_of(tokenizer))
    assert (before.text, refused.line) == ("a", 2) and (b"\n" in line or after.text == "b")
    assert isinstance(refused, RefusedRequest) and re.match(f"line 2: .*{words}", refused.error, re.DOTALL)


def test_an_error_tells_a_part_of_a_long_value(tmp_path, tokenizer):
    line = json.dumps({"prompt": "x", "logprobs": "y" * 100_000})
    (refused,) = read(tmp_path, line.encode(), maker_of(tokenizer))
    assert refused.error.startswith("line 1: ") and 1000 < len(refused.error) < 1100


def test_the_longest_prompt_that_fits(tokenizer):
    assert len(maker_of(tokenizer).make({"prompt": 71 * "x"}).prompt_ids) == 72


def test_over_long_lines(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(requests, "MAX_LINE_NBYTES", 20)
    lines = [b'"%s"' % (n * b"x") for n in (18, 19, 40, 41, 500, 1)]
    found = read(tmp_path, b"\n".join(lines), maker_of(tokenizer))
    assert [getattr(request, "error", None) for request in found] == [
        None, *(f"line {n}: it is longer than 20 bytes" for n in (2, 3, 4, 5)), None,
    ]  # fmt: skip


def test_a_prompt_without_tokens(tokenizer, monkeypatch):
    assert maker_of(tokenizer).make({"prompt": ""}).prompt_ids == (BOS_ID,)
    monkeypatch.setattr(tokenizer, "chat_template", "{{ '' }}")
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        maker_of(tokenizer).make({"messages": [{"role": "user", "content": "x"}]})


def test_ids_that_the_model_does_not_have(tokenizer):
    with pytest.raises(ValueError, match="token 0 of the prompt is '<bos>' with id 256, .* vocab_size is 60"):
        maker_of(tokenizer, vocab_size=60).make({"prompt": "y"})


def test_special_tokens_in_a_text_are_special_tokens(tokenizer, monkeypatch):
    """As in transformers: in prompts, and in what messages say, which may so end their own turn."""
    assert maker_of(tokenizer).make({"prompt": "a<eos>b"}).prompt_ids == (
        *(BOS_ID, *ids_of(tokenizer, "a"), EOS_ID, *ids_of(tokenizer, "b")),
    )
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages[0].content }}")
    request = maker_of(tokenizer).make({"messages": [{"role": "user", "content": "a<eos>b"}]})
    assert request.prompt_ids == (*ids_of(tokenizer, "a"), EOS_ID, *ids_of(tokenizer, "b"))


def test_cuts_of_a_line_under_a_greedy_config(tokenizer):
    maker = maker_of(tokenizer, temperature=0.0, top_k=5)
    assert maker.make({"prompt": "x"}).sampling == SamplingOptions()
    assert maker.make({"prompt": "x", "top_k": 3, "temperature": 0}).sampling == SamplingOptions()
    with pytest.raises(ConfigError, match="top_k is 3, but answers are greedy; give a temperature above 0 with it"):
        maker.make({"prompt": "x", "top_k": 3})
    assert maker.make({"prompt": "x", "top_k": 0, "top_p": 1, "min_p": 0}).sampling == SamplingOptions()


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_a_request(tmp_path, tokenizer, content):
    with pytest.raises(ConfigError, match=r"prompts '.*prompts.jsonl': there is no line in it; write one like"):
        read(tmp_path, content, maker_of(tokenizer))


def test_files_that_cannot_be_opened(tmp_path, tokenizer):
    for name in (str(tmp_path / "missing.jsonl"), str(tmp_path), "", "a\0b"):
        with pytest.raises(ConfigError, match="prompts .* cannot be read: "):
            read_requests(name, maker_of(tokenizer))


def test_standard_input_line_by_line(tokenizer, monkeypatch):
    class Lines(io.BytesIO):
        def readline(self, size=-1):
            line = super().readline(size)
            assert line != b'"second"\n' or first_was_seen
            return line

    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": Lines(b'"first"\n"second"\n')}))
    first_was_seen = False
    found = read_requests("-", maker_of(tokenizer))
    assert next(found).text == "first"
    first_was_seen = True
    assert [request.text for request in found] == ["second"]


def test_prompts_of_token_ids(tokenizer):
    ids = ids_of(tokenizer, "hi")
    request = maker_of(tokenizer).make({"prompt": list(ids), "logprobs": 0, "echo": True, "max_new_tokens": 0})
    assert (request.text, request.prompt_ids, request.max_new_tokens, request.scored_from) == ("hi", ids, 0, 1)
    one = maker_of(tokenizer).make({"prompt": [104], "logprobs": 0, "echo": True, "max_new_tokens": 1})
    assert one.scored_from is None, "of one token there is nothing to tell"
    assert maker_of(tokenizer).make({"prompt": "hi", "echo": True}).scored_from is None


def test_requests_for_scores(tokenizer):
    maker = maker_of(tokenizer, slot_length=5, max_new_tokens=3, temperature=1.0, logprobs=4)
    request = maker.make_scored((BOS_ID, 104, 105, 106, 107), 4)
    assert request.scored_from == 4 and request.max_new_tokens == 0 and request.logprobs == 1
    assert request.sampling == SamplingOptions(num_top=1) and request.prompt_ids == (BOS_ID, 104, 105, 106, 107)
    assert maker.make_scored([1, 2], 1, 0).sampling.num_top == 0
    for ids, scored_from, num_top, words in (
        ([1, 2, 3], 3, 1, "scored_from is 3; in a prompt of 3 tokens, 1 to 2"),
        ([1, 2, 3], 0, 1, "scored_from is 0"),
        ([1], 1, 1, "scored_from is 1; in a prompt of 1 tokens"),
        ([], 1, 1, "the prompt has no tokens"),
        ([1] * 6, 1, 1, "the prompt has 6 tokens and max_new_tokens is 0, but a sequence has at most 5"),
        ([1, 258], 1, 1, r"prompt\[1\] must be a token id"),
        ([1, 2], 1, 21, "num_top is 21; 0 to 20 are possible"),
    ):
        with pytest.raises(ValueError, match=words):
            maker.make_scored(ids, scored_from, num_top)
