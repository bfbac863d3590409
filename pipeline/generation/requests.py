"""Requests for answers: lines of a file or of standard input, checked, tokenised, with the options that each has.

In front of the scheduler, on rank 0. A line is a JSON object, with `prompt` (a text, or a list of token ids) or
`messages` and any of `OWN_KEYS` of the config's `generation` section, or a JSON string, which is a prompt. A line at
fault is refused and the others go on.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from compressors.user_files import InputError, user_path
from pipeline.config.reading import generation_with
from pipeline.config.schema import MAX_LOGPROBS, ConfigError, GenerationConfig
from pipeline.data.text import check_vocabulary, encode
from pipeline.models.sampling import UNCUT, GenerationDefaults, SamplingOptions, sampling_options

__all__ = ["OWN_KEYS", "RefusedRequest", "Request", "RequestMaker", "parse_fields", "read_requests"]

MAX_LINE_NBYTES = 16 * 2**20
_MAX_ERROR_LENGTH = 1000
# Keys of `generation` that a request may have for itself.
OWN_KEYS = (
    *("max_new_tokens", "temperature", *UNCUT, "repetition_penalty"),
    *("stop", "seed", "ignore_eos", "logprobs", "echo", "deadline_s"),
)
_NO_TOKENS = "the prompt has no tokens, so there is nothing to go on from; write a longer one"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how it is to be answered.

    `text` is the prompt as it was tokenised, behind the chat template where there are messages, or the text of the ids
    that were given. `scored_from` is the first position of the prompt whose token's log-probability is told, from 1 on,
    None for none; with it, `max_new_tokens` may be 0. `eos_ids` end the
    answer, and are empty where end-of-sequence tokens are ignored. `logprobs` is how many of the likeliest tokens are
    told of beside each token's own log-probability, None for neither. `deadline_s` counts from when the request is
    taken.
    """

    line: int
    text: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingOptions
    stop: tuple[str, ...]
    eos_ids: tuple[int, ...]
    logprobs: int | None
    deadline_s: float | None
    scored_from: int | None = None


@dataclass(frozen=True)
class RefusedRequest:
    """A line that is no request; the error names the line and what to change."""

    line: int
    error: str


@dataclass(frozen=True, kw_only=True)
class RequestMaker:
    """What requests are made with: transformers' tokenizer, options where a request has none of its own, bounds.

    `slot_length` is how many positions prompt and answer may have together.
    """

    tokenizer: Any
    generation: GenerationConfig
    defaults: GenerationDefaults
    vocab_size: int
    slot_length: int

    def make(self, fields: Mapping[str, Any], *, line: int = 1) -> Request:
        """Of a line's keys and values. Raises ValueError for what cannot be answered."""
        _check_keys(fields)
        own = {key: value for key, value in fields.items() if key in OWN_KEYS}
        generation = generation_with(self.generation, own)
        sampling = sampling_options(generation, self.defaults)
        lost = [key for key, uncut in UNCUT.items() if own.get(key) not in (None, uncut)]
        if lost and sampling.greedy and "temperature" not in own:
            name = lost[0]
            raise ConfigError(f"{name} is {own[name]}, but answers are greedy; give a temperature above 0 with it")
        text, ids = self._prompt(fields)
        self._check_length(len(ids), generation.max_new_tokens)
        scored_from = 1 if generation.echo and generation.logprobs is not None and len(ids) > 1 else None
        if scored_from is None and generation.max_new_tokens == 0:
            raise ValueError(
                "the prompt has one token, which has no log-probability, and max_new_tokens is 0; write a longer one"
            )
        return Request(
            line=line,
            text=text,
            prompt_ids=tuple(ids),
            max_new_tokens=generation.max_new_tokens,
            sampling=sampling,
            stop=generation.stop,
            eos_ids=self._eos_ids(generation),
            logprobs=generation.logprobs,
            deadline_s=generation.deadline_s,
            scored_from=scored_from,
        )

    def make_scored(self, prompt_ids: Sequence[int], scored_from: int, num_top: int = 1, *, line: int = 1) -> Request:
        """For the log-probabilities of a prompt's tokens from position `scored_from` on, each told with the `num_top`
        likeliest in its place. Raises ValueError where there is no such position, or what cannot be answered.
        """
        ids = self._checked_ids(prompt_ids)
        if type(scored_from) is not int or not 0 < scored_from < len(ids):
            raise ValueError(f"scored_from is {scored_from!r}; in a prompt of {len(ids)} tokens, 1 to {len(ids) - 1}")
        if type(num_top) is not int or not 0 <= num_top <= MAX_LOGPROBS:
            raise ValueError(f"num_top is {num_top!r}; 0 to {MAX_LOGPROBS} are possible")
        return Request(
            line=line,
            text=self._text_of(ids),
            prompt_ids=ids,
            max_new_tokens=0,
            sampling=SamplingOptions(num_top=num_top),
            stop=(),
            eos_ids=(),
            logprobs=num_top,
            deadline_s=None,
            scored_from=scored_from,
        )

    def _prompt(self, fields: Mapping[str, Any]) -> tuple[str, Sequence[int]]:
        """Text and ids."""
        if isinstance(fields.get("prompt"), list):
            own = self._checked_ids(fields["prompt"])
            return self._text_of(own), own
        if "messages" in fields:
            text = self._chat(fields["messages"])
        else:
            text = _checked_text(fields["prompt"], "prompt")
        # A template writes the special tokens itself.
        ids = encode(self.tokenizer, text, "the prompt cannot be tokenised", add_special_tokens="prompt" in fields)
        if not ids:
            raise ValueError(_NO_TOKENS)
        check_vocabulary(self.tokenizer, ids, "the prompt", vocab_size=self.vocab_size)
        return text, ids

    def _checked_ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        if not ids:
            raise ValueError(_NO_TOKENS)
        self._check_length(len(ids), 0)
        for place, token_id in enumerate(ids):
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                raise ValueError(f"prompt[{place}] must be a token id, 0 to {self.vocab_size - 1}, got {token_id!r}")
        return tuple(ids)

    def _check_length(self, num_ids: int, max_new_tokens: int) -> None:
        if num_ids + max_new_tokens > self.slot_length:
            raise ValueError(
                f"the prompt has {num_ids} tokens and max_new_tokens is {max_new_tokens}, but a sequence has at most "
                f"{self.slot_length}; shorten the one or the other, or raise generation.max_length as far as the model "
                "goes"
            )

    def _text_of(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _eos_ids(self, generation: GenerationConfig) -> tuple[int, ...]:
        """The checkpoint's and the tokenizer's: either may lack the token that ends a turn. And special tokens that are
        stop strings: these have no text here.
        """
        own = self.tokenizer.eos_token_id
        found = set() if generation.ignore_eos else {*self.defaults.eos_ids, *([] if own is None else [own])}
        if generation.stop:
            special = {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
            found |= {special[text] for text in generation.stop if text in special}
        return tuple(sorted(found))

    def _chat(self, messages: Any) -> str:
        """The template's text of a conversation, up to where the answer begins."""
        if not isinstance(messages, list) or not messages:
            example = '[{"role": "user", "content": "..."}]'
            raise ValueError(f"messages must be a list such as {example}, got {messages!r}")
        for index, message in enumerate(messages):
            if not isinstance(message, dict) or sorted(message) != ["content", "role"]:
                raise ValueError(f"messages[{index}] must have the keys role and content, got {message!r}")
            for key in message:
                _checked_text(message[key], f"messages[{index}].{key}")
        if not self.tokenizer.chat_template:
            raise ValueError("the model has no chat template, so it takes no messages; write a prompt instead")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as e:  # templates are programs
            raise ValueError(f"the model's chat template fails on these messages: {type(e).__name__}: {e}") from e


def read_requests(source: str, maker: RequestMaker) -> Iterator[Request | RefusedRequest]:
    """The requests of a file, or of standard input for `-`, in order and as they are read.

    UTF-8, one JSON value a line, lines numbered from 1. Blank lines are passed over, as are a byte-order mark and the
    kind of line ends. Raises ConfigError for a file that cannot be opened, and at the end for one without a request.
    """
    if source == "-":
        return _requests(sys.stdin.buffer, "standard input", maker)
    try:
        return _requests(open(user_path(source), "rb"), source, maker)
    except (OSError, InputError) as e:
        raise ConfigError(f"prompts {source!r} cannot be read: {e}") from e


def _requests(file: BinaryIO, name: str, maker: RequestMaker) -> Iterator[Request | RefusedRequest]:
    is_empty = True
    with file:
        for number, line in _lines(file, name):
            if number == 1:
                line = line.removeprefix(_BYTE_ORDER_MARK)
            if not line.strip():
                continue
            is_empty = False
            request: Request | RefusedRequest
            try:
                request = maker.make(_parse(line), line=number)
            except ValueError as e:
                request = RefusedRequest(number, f"line {number}: {_shortened(str(e))}")
            yield request
    if is_empty:
        raise ConfigError(f'prompts {name!r}: there is no line in it; write one like {{"prompt": "..."}} per request')


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    """Numbers and lines; of one that is too long, just as much as shows it."""
    number = 0
    while True:
        try:
            line = file.readline(MAX_LINE_NBYTES + 1)
            rest = line
            while len(rest) > MAX_LINE_NBYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_NBYTES + 1)
        except OSError as e:
            raise ConfigError(f"prompts {name!r} cannot be read further than line {number}: {e}") from e
        if not line:
            return
        number += 1
        yield number, line


def _shortened(error: str) -> str:
    """Errors tell the value got, which may be as long as a line; the cure stands at the end."""
    if len(error) <= _MAX_ERROR_LENGTH:
        return error
    return f"{error[: _MAX_ERROR_LENGTH // 2]} ... {error[-_MAX_ERROR_LENGTH // 2 :]}"


def _parse(line: bytes) -> Mapping[str, Any]:
    """A line's keys and values. Raises ValueError."""
    if len(line.rstrip(b"\r\n")) > MAX_LINE_NBYTES:
        raise ValueError(f"it is longer than {MAX_LINE_NBYTES} bytes")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"it is not UTF-8, from byte {e.start} on; convert the file: iconv -f ... -t UTF-8") from e
    try:
        content = _strict_json(text)
    except ValueError as e:
        raise ValueError(f'it is no JSON ({e}); write {{"prompt": "..."}}, or the prompt in double quotes') from e
    if isinstance(content, str):
        return {"prompt": content}
    if not isinstance(content, dict):
        raise ValueError(f"it must be an object with prompt or messages, or a string, got {text.strip()[:40]}")
    return content


def parse_fields(content: bytes) -> dict[str, Any]:
    """A JSON object of UTF-8, without NaN, infinity or keys given twice. Raises ValueError."""
    value = _strict_json(content.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"it must be an object, not {type(value).__name__}")
    return value


def _strict_json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_once_each)
    except RecursionError as e:
        raise ValueError("it is nested too deeply") from e


def _once_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _check_keys(fields: Mapping[str, Any]) -> None:
    allowed = ("prompt", "messages", *OWN_KEYS)
    for key in fields:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"unknown key {key!r}; {hint}Allowed: {', '.join(allowed)}")
    if ("prompt" in fields) == ("messages" in fields):
        raise ValueError("it must have either prompt or messages")


def _checked_text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        or_ids = " or a list of token ids" if key == "prompt" else ""
        raise ValueError(f"{key} must be a string{or_ids}, got {value!r}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(f"{key} has half of a surrogate pair at character {e.start}, which is no character") from e
    return value
