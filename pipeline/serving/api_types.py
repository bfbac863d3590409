"""Bodies of requests, as OpenAI's API has them: types, bounds, and what of them this server does not do.

A body is read strictly: one UTF-8 JSON object without NaN or keys that stand twice, no type taken for another, no field
that neither the API nor this server knows. A field of the API that is not done here (`NEUTRAL`) may have the value that
asks for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config.schema import MAX_LOGPROBS, MAX_SEED
from pipeline.generation.requests import parse_fields
from pipeline.serving.errors import refused

__all__ = ["MAX_CHOICES", "ChatBody", "CompletionBody", "SharedBody", "read_body"]

MAX_CHOICES = 128  # n times the prompts
MAX_MESSAGES = 4096
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_TOKENS = 2**31 - 1
MAX_NAME_LENGTH = 512
MAX_FIELDS = 256

# Fields of the API that are not done here, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "prompt_cache_key": ("",),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}

Name = Annotated[str, Field(max_length=MAX_NAME_LENGTH)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SharedBody(_Strict):
    """What both endpoints take. None: what the config and then the checkpoint say; a seed of one's own is drawn.

    The last four are not the API's, and mean what they do in a line of prompts.
    """

    model: Name
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: Stop | Stops | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Name | None = None
    safety_identifier: Name | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOKENS)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None

    def options(self) -> dict[str, Any]:
        """Keys of `generation` that the request has for itself, but for its length, seed and log-probabilities."""
        named = {
            **{key: getattr(self, key) for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
            "ignore_eos": self.ignore_eos,
            "stop": self.stop or None,
        }
        return {key: value for key, value in named.items() if value is not None}

    @property
    def num_choices(self) -> int:
        """Of each prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionBody(SharedBody):
    """`/v1/completions`."""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return list(self.prompt)
        return [self.prompt]  # type: ignore[list-item]


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: None = None
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def as_plain(self) -> dict[str, str]:
        """For chat templates, which know no developer."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(SharedBody):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


Body = TypeVar("Body", bound=SharedBody)


def read_body(content: bytes, kind: type[Body]) -> Body:
    """Of a request's bytes. Raises ApiError (400) that names the field at fault."""
    try:
        fields = parse_fields(content)
    except ValueError as e:
        raise refused(f"the body is no JSON object that can be taken: {e}") from e
    if len(fields) > MAX_FIELDS:
        raise refused(f"the body has {len(fields)} fields, of at most {MAX_FIELDS}")
    try:
        body = kind.model_validate(_without_neutral(fields))
    except ValidationError as e:
        error = e.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(map(str, error["loc"])) or None
        raise refused(f"{param or 'the body'}: {error['msg']}", param) from e
    _check_together(body)
    return body


def _without_neutral(fields: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for key, value in fields.items():
        if key not in NEUTRAL:
            kept[key] = value
        elif value is not None and not any(_is_same(value, allowed) for allowed in NEUTRAL[key]):
            allowed = " or ".join(["null", *map(repr, NEUTRAL[key])])
            raise refused(f"{key} is not supported by this server; leave it out, or give {allowed}", key)
    return kept


def _is_same(value: Any, allowed: Any) -> bool:
    return isinstance(value, bool) == isinstance(allowed, bool) and bool(value == allowed)


def _check_together(body: SharedBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise refused("stream_options is only allowed when stream is true", "stream_options")
    if isinstance(body, CompletionBody):
        _check_completion(body)
    elif isinstance(body, ChatBody):
        if body.top_logprobs is not None and not body.logprobs:
            raise refused("top_logprobs needs logprobs to be true", "top_logprobs")
        if body.max_tokens == 0:
            raise refused("max_tokens must be at least 1", "max_tokens")
        lengths = {body.max_tokens, body.max_completion_tokens} - {None}
        if len(lengths) > 1:
            raise refused("max_tokens and max_completion_tokens differ; give the latter alone", "max_tokens")


def _check_completion(body: CompletionBody) -> None:
    if body.best_of not in (None, body.num_choices):
        raise refused("best_of is not supported by this server; leave it out, or give it the value of n", "best_of")
    if body.prompt == []:
        raise refused("prompt is empty, so there is nothing to go on from; write one", "prompt")
    if body.num_choices * len(body.prompts()) > MAX_CHOICES:
        raise refused(f"n times the prompts must be at most {MAX_CHOICES}", "n")
    if body.max_tokens == 0 and not body.echo:
        raise refused("max_tokens is 0, which needs echo", "max_tokens")
