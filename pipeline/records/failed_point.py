"""The file that a failed point of a sweep leaves: that it failed, and why. The next start tries it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from pydantic import JsonValue

from pipeline.records.base import Part, Timestamp, Words
from pipeline.records.run_record import SCHEMA_VERSION

__all__ = ["FAILURE_KIND", "FailedPoint"]

FAILURE_KIND: Final = "failed point"


class FailedPoint(Part):
    """`args`: the sweep's config, and what the point sets in it."""

    schema_version: Literal[5] = SCHEMA_VERSION
    kind: Literal["failed point"] = FAILURE_KIND
    failure_id: str
    label: Words
    error: Words
    args: Mapping[str, JsonValue]
    finished_at: Timestamp
