"""Requests to the endpoint of `tests.helpers.serving` that are at fault, each in one thing."""

from __future__ import annotations

import json
from collections.abc import Iterator

__all__ = ["CHAT", "CHAT_FIELDS", "COMPLETION", "TEXT_FIELDS", "malformed"]

COMPLETION = {"model": "tiny-chat", "prompt": "a", "max_tokens": 1}
CHAT = {"model": "tiny-chat", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
WRONG = [None, True, -1, 1.5, 10**30, 1e300, "x", "", [], {}, [[]], [None], {"a": 1}, [{"a": []}], ["x", 1]]
# Of a field, values among `WRONG` that it may have.
FINE = {
    "prompt": ["x", ""], "stream": [None, True], "stop": [None, "x", "", []], "n": [None], "seed": [None],
    "temperature": [None, 1.5], "top_p": [None], "max_tokens": [None], "logprobs": [None], "echo": [None, True],
    "user": [None, "x", ""], "best_of": [None], "suffix": [None, ""], "logit_bias": [None, {}], "tools": [None, []],
    "presence_penalty": [None], "stream_options": [None], "max_completion_tokens": [None], "top_logprobs": [None],
    "response_format": [None], "ignore_eos": [None, True], "top_k": [None],
}  # fmt: skip
CHAT_FIELDS = ("messages", "n", "seed", "temperature", "stop", "max_completion_tokens", "top_logprobs", "tools",
               "response_format", "stream_options", "model")  # fmt: skip
TEXT_FIELDS = ("prompt", "n", "seed", "temperature", "top_p", "max_tokens", "logprobs", "echo", "stop", "stream",
               "user", "best_of", "suffix", "logit_bias", "presence_penalty", "ignore_eos", "top_k",
               "model")  # fmt: skip


def malformed() -> Iterator[tuple[str, bytes]]:
    """Path behind `/v1/`, and body."""
    for kind, base, fields in (("completions", COMPLETION, TEXT_FIELDS), ("chat/completions", CHAT, CHAT_FIELDS)):
        for field in fields:
            for value in WRONG:
                if not any(value == fine and type(value) is type(fine) for fine in FINE.get(field, [])):
                    yield kind, json.dumps(base | {field: value}).encode()
        for field in ("model", "prompt", "messages"):
            if field in base:
                yield kind, json.dumps({key: value for key, value in base.items() if key != field}).encode()
    for message in (
        {}, {"role": "user"}, {"content": "a"}, {"role": "robot", "content": "a"}, {"role": "user", "content": 5},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]},
        {"role": "user", "content": [{"type": "text"}]}, {"role": "user", "content": None}, "a", None, [],
        {"role": "tool", "content": "a"}, {"role": "user", "content": "a", "more": 1},
        {"role": "user", "content": "\ud800"},
    ):  # fmt: skip
        yield "chat/completions", json.dumps(CHAT | {"messages": [message]}).encode()
    yield "chat/completions", json.dumps(CHAT | {"top_logprobs": 2}).encode()
    for fields in (
        {"max_tokens": 0}, {"max_tokens": 0, "echo": True}, {"prompt": [258]}, {"prompt": [[1], [2**40]]},
        {"prompt": [1, "a"]}, {"prompt": ["a"] * 129}, {"n": 65, "prompt": ["a", "b"]}, {"prompt": "a " * 200},
        {"stop": ["a"] * 17}, {"stop": "a" * 257}, {"stop": [""]}, {"logprobs": 21}, {"temperature": 2.1}, {"n": 0},
        {"seed": -1}, {"seed": 2**63}, {"stream_options": {"include_usage": True}}, {"max_tokens": 10**6},
        {"stream": True, "stream_options": {"more": 1}}, {"prompt": "\ud800"}, {"model": "other"},
    ):  # fmt: skip
        yield "completions", json.dumps(COMPLETION | fields).encode()
    yield from (("completions", body) for body in NO_JSON)


NO_JSON = [
    b"", b"{", b"[]", b"null", b'"a"', b"5", b"{}", b"\xff\xfe", b'{"prompt": "\xc3\x28"}', 100_000 * b"[",
    b'{"model": "tiny-chat", "prompt": "a", "prompt": "b"}', b'{"model": "tiny-chat", "prompt": "a", "n": NaN}',
    b'{"model": "tiny-chat", "prompt": "a", "temperature": Infinity}', b'{"a": ' * 5000 + b"1" + b"}" * 5000,
    b'{"model": "tiny-chat", "prompt": "a", "temperature": 1e999}', b'{"n": ' + 10_000 * b"9" + b"}", b"\0" * 100,
    b'{"model": "tiny-chat", "prompt": ' + b"[" * 400 + b"]" * 400 + b"}", b'{"prompt": "a"}}', b"prompt=a&n=1",
]  # fmt: skip
