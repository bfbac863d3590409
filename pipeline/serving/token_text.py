"""Tokens one by one, as the API tells of them: text, bytes, place in the answer's text, log-probabilities."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.generation.answer import Answer
from pipeline.generation.text import REPLACEMENT, TextStream

__all__ = ["ToldToken", "TokenTexts", "TokenTrail"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """The text of single tokens, and its bytes, behind other text: a leading space is not lost.

    Of a token that is a part of a character alone, the text is `bytes:\\xe2\\x82`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._num_before = len(self._decode(self._before))
        self._known: dict[int, tuple[str, list[int] | None]] = {}  # at most the vocabulary

    def __call__(self, token_id: int) -> tuple[str, list[int] | None]:
        if token_id not in self._known:
            self._known[token_id] = self._look_up(token_id)
        return self._known[token_id]

    def _look_up(self, token_id: int) -> tuple[str, list[int] | None]:
        text = self._decode([*self._before, token_id])[self._num_before :]
        if REPLACEMENT not in text:
            return text, list(text.encode())
        raw = self._raw(token_id)
        if raw is None:
            return text, None
        try:
            return raw.decode(), list(raw)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)

    def _raw(self, token_id: int) -> bytes | None:
        """Of a token that is no text by itself."""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return None
        if found := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(found[1], 16)])
        return bytes(_BYTE_LEVEL[c] for c in token) if all(c in _BYTE_LEVEL for c in token) else None

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _byte_level() -> dict[str, int]:
    """Of GPT-2's alphabet, which byte a character stands for: printable ones for themselves, others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level()


@dataclass(frozen=True)
class ToldToken:
    """`offset`: characters of the text in front of it. `logprob` is None, and `top` empty, for a text's first token."""

    token_id: int
    offset: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class TokenTrail:
    """The tokens of an answer with log-probabilities, in order, as its text becomes certain; those of the prompt first
    where it is echoed.
    """

    def __init__(self, answer: Answer, tokenizer: Any, *, echoed: str | None) -> None:
        self._answer, self._tokenizer, self._echoed = answer, tokenizer, echoed
        self._text = TextStream(tokenizer)
        self._num_told, self._offset = 0, len(echoed or "")
        self._prompt: list[ToldToken] | None = None if echoed is not None else []

    def up_to(self, num_characters: int | None) -> list[ToldToken]:
        """Those that are new, and begin in front of so many characters; None: all that there are."""
        if self._prompt is None:
            self._prompt = self._of_prompt()
        found, self._prompt = self._prompt, []
        told = self._answer.logprobs
        assert told is not None, "no log-probabilities were asked for"
        logprobs, tops = told["token_logprobs"], told["top_logprobs"]
        while self._num_told < len(tops) and (num_characters is None or self._offset < num_characters):
            place, token_id = self._num_told, self._answer.token_ids[self._num_told]
            found.append(ToldToken(token_id, self._offset, logprobs[place], tops[place]))
            self._offset += len(self._text.push(token_id))
            self._num_told += 1
        return found

    def _of_prompt(self) -> list[ToldToken]:
        text, offset, told = TextStream(self._tokenizer), 0, list[ToldToken]()
        special = {i: token.content for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        echoed = self._echoed or ""
        scored = ((token.logprob, token.top) for token in self._answer.prompt_logprobs)
        figures: Iterator[tuple[float | None, tuple[tuple[int, float], ...]]] = itertools.chain([(None, ())], scored)
        for token_id, (logprob, top) in zip(self._answer.prompt_ids, figures, strict=True):
            told.append(ToldToken(token_id, offset, logprob, top))
            offset += len(text.push(token_id))
            if token_id in special and echoed.startswith(special[token_id], offset):  # as the prompt has it
                offset += len(special[token_id])
        return told
