"""Answers in the API's form: whole, or in chunks while they come. Made on the server's thread."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.generation.answer import Answer
from pipeline.serving.token_text import ToldToken, TokenTexts, TokenTrail

__all__ = ["ChatReply", "Choice", "CompletionReply", "Reply"]

_LEAST_LOGPROB = -9999.0  # in place of minus infinity, which JSON has not
_FINISH_REASONS = {"stop": "stop", "length": "length", "deadline": "length"}

Json = dict[str, Any]


@dataclass(eq=False)
class Choice:
    """One answer of a reply. `echoed` is the prompt, until it has been told; `trail` is None without log-probabilities.

    `num_shown` characters have been told so far, `echoed` included.
    """

    index: int
    answer: Answer
    trail: TokenTrail | None
    echoed: str = ""
    num_shown: int = 0

    def show(self, text: str) -> str:
        """`text` with what is to be in front of it."""
        text, self.echoed = self.echoed + text, ""
        self.num_shown += len(text)
        return text

    def new_tokens(self) -> list[ToldToken] | None:
        """Whose text has been shown and that have not been told; at the end those, too, that have none.

        Not those behind a stop string, which is no part of the answer.
        """
        if self.trail is None:
            return None
        is_cut = not self.answer.is_finished or self.answer.is_cut
        return self.trail.up_to(self.num_shown if is_cut else None)

    @property
    def finish_reason(self) -> str | None:
        return _FINISH_REASONS.get(self.answer.finish_reason or "")


class Reply:
    """To one request, of one or more choices. Subclasses say how the API's two endpoints write them."""

    prefix = ""
    kind = chunk_kind = ""

    def __init__(self, model: str, texts: TokenTexts, *, includes_usage: bool) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created, self._model, self._texts = int(time.time()), model, texts
        self._includes_usage = includes_usage

    def whole(self, choices: Sequence[Choice]) -> Json:
        """Once all have finished."""
        told = [
            self._choice(choice, choice.show(choice.answer.text), choice.new_tokens(), choice.finish_reason)
            for choice in choices
        ]
        return {**self._envelope(self.kind), "choices": told, "usage": _usage(choices)}

    def first_chunks(self, choices: Sequence[Choice]) -> list[Json]:
        """In front of any text."""
        return []

    def chunk(self, choice: Choice, text: str | None) -> Json:
        """`text` is new; None: the choice has finished."""
        is_last = text is None
        shown = choice.show(text or "")
        delta = self._delta(choice, shown, choice.new_tokens(), choice.finish_reason if is_last else None)
        return self._chunk([delta])

    def last_chunks(self, choices: Sequence[Choice]) -> list[Json]:
        """Once all have finished."""
        return [{**self._chunk([]), "usage": _usage(choices)}] if self._includes_usage else []

    def _chunk(self, deltas: list[Json]) -> Json:
        usage = {"usage": None} if self._includes_usage else {}
        return {**self._envelope(self.chunk_kind), "choices": deltas, **usage}

    def _envelope(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}

    def _choice(self, choice: Choice, text: str, tokens: list[ToldToken] | None, reason: str | None) -> Json:
        raise NotImplementedError

    def _delta(self, choice: Choice, text: str, tokens: list[ToldToken] | None, reason: str | None) -> Json:
        raise NotImplementedError


class CompletionReply(Reply):
    """`/v1/completions`, whose chunks are choices like any."""

    prefix = "cmpl"
    kind = chunk_kind = "text_completion"

    def _choice(self, choice: Choice, text: str, tokens: list[ToldToken] | None, reason: str | None) -> Json:
        logprobs = None if tokens is None else self._logprobs(tokens)
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    _delta = _choice

    def _logprobs(self, tokens: Sequence[ToldToken]) -> Json:
        return {
            "tokens": [self._texts(token.token_id)[0] for token in tokens],
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": [self._top(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _top(self, token: ToldToken) -> Json | None:
        """The likeliest by their text, and the token itself where it is none of them."""
        if token.logprob is None:
            return None
        found: Json = {}
        for token_id, logprob in (*token.top, (token.token_id, token.logprob)):
            found.setdefault(self._texts(token_id)[0], _number(logprob))
        return found


class ChatReply(Reply):
    """`/v1/chat/completions`."""

    prefix = "chatcmpl"
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def first_chunks(self, choices: Sequence[Choice]) -> list[Json]:
        opening = {"role": "assistant", "content": "", "refusal": None}
        return [
            self._chunk([{"index": choice.index, "delta": opening, "logprobs": None, "finish_reason": None}])
            for choice in choices
        ]

    def _choice(self, choice: Choice, text: str, tokens: list[ToldToken] | None, reason: str | None) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(tokens),
            "finish_reason": reason,
        }

    def _delta(self, choice: Choice, text: str, tokens: list[ToldToken] | None, reason: str | None) -> Json:
        delta = {"content": text} if text else {}
        logprobs = self._logprobs(tokens) if tokens else None
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[ToldToken] | None) -> Json | None:
        if tokens is None:
            return None
        content = [
            {
                **self._entry(token.token_id, token.logprob),
                "top_logprobs": [self._entry(token_id, logprob) for token_id, logprob in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> Json:
        text, nbytes = self._texts(token_id)
        return {"token": text, "logprob": _number(logprob), "bytes": nbytes}


def _usage(choices: Sequence[Choice]) -> Json:
    """A prompt counts once, however many answers it has."""
    prompts = {id(choice.answer.prompt_ids): len(choice.answer.prompt_ids) for choice in choices}
    num_prompt, num_generated = sum(prompts.values()), sum(len(choice.answer.token_ids) for choice in choices)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
    }


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST_LOGPROB)
