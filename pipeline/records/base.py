"""What the models of records share: strict and frozen parts, types of numbers and words, mistakes named by their key.

Below the records themselves (`run_record`, `generation_record`, `failed_point`), which say what they hold.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError

from pipeline.config.schema import MAX_NUMBER

__all__ = [
    "Amount",
    "Bounded",
    "CodecSpec",
    "Count",
    "OpenPart",
    "Part",
    "Positive",
    "Timestamp",
    "Words",
    "finite_or_none",
    "now",
    "problem_in",
]


class Part(BaseModel):
    """A record or a part of one. Keys are those below and no others; numbers are finite."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        json_schema_serialization_defaults_required=True,
    )

    @classmethod
    def from_plain(cls, value: Any) -> Self:
        """Of plain values as JSON would hold them: tuples as lists, numbers that are not finite as null, bytes that are
        no text escaped.

        Raises ValidationError.
        """
        return cls.model_validate_json(json.dumps(_plain(value)))


class OpenPart(Part):
    """A part that others give names in: beside the keys below it has any."""

    model_config = ConfigDict(extra="allow")

    @property
    def others(self) -> Mapping[str, JsonValue]:
        """The keys that are not fields."""
        return self.__pydantic_extra__ or {}


def _escape(value: Any) -> Any:
    """Names of files and messages of plug-ins may hold bytes that are no text, which JSON's readers refuse."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def _check_time(value: str) -> str:
    try:
        datetime.datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(f"{value[:40]!r} is no time in ISO 8601") from None
    return value


Count = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Positive = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
Amount = Annotated[float, Field(ge=0, le=MAX_NUMBER)]
Bounded = Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)]
Words = Annotated[str, BeforeValidator(_escape)]
Timestamp = Annotated[str, AfterValidator(_check_time)]
CodecSpec = str | Mapping[str, JsonValue]  # as a user writes it: a short form, or a name with options


def now() -> str:
    """A Timestamp."""
    return datetime.datetime.now(datetime.UTC).isoformat()


def finite_or_none(value: float) -> float | None:
    """What a record holds of a figure that may be infinite or NaN, which JSON has no number for."""
    return value if math.isfinite(value) else None


def problem_in(error: ValidationError) -> str:
    """The first mistake in words: the key, what stands there and what is allowed."""
    first = error.errors(include_url=False)[0]
    where, told = _place(first["loc"]), first["msg"]
    if first["type"] == "missing":
        return f"it lacks {where}"
    if first["type"] == "extra_forbidden":
        return f"{where} is not a key of it"
    if first["type"] == "json_invalid":
        return told
    if first["type"] == "value_error":
        told = str(first["ctx"]["error"])
        return f"{where}: {told}" if where else told
    return f"{where or 'it'} is {_short(first['input'])}: {told[:1].lower()}{told[1:]}"


def _place(loc: tuple[int | str, ...]) -> str:
    """`plan[0].layers`, without what would move a terminal's cursor."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in loc).removeprefix(".")[:200]
    return text if text.isprintable() else repr(text)


def _short(value: Any) -> str:
    """For messages; of a very long integer not even the text can be had."""
    try:
        return repr(str(value)[:40])
    except (ValueError, RecursionError):
        return f"{type(value).__name__} that cannot be shown"


def _plain(value: Any) -> Any:
    """`value` as strict JSON can hold it."""
    if isinstance(value, float):
        return finite_or_none(value)
    if isinstance(value, Mapping):
        return {_escape(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return _escape(value)
