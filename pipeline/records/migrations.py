"""Records of older versions, lifted to the newest one: JSON in, JSON out.

Before the models see a file (`store`). A figure that an older version did not have is null, unless it is known what it
would have been. What stands where it should not is left for the models to refuse.

Version 1 is every file from the first release on that says so: it grew, and run records had no `kind`. Version 2 is
that of the models: all keys are there, with null for what is not known or does not apply. Version 3 added what was
emulated, and how often the ring was formed again while prompts were answered; version 4 what came of drafts; version
5 which blocks of few bits weights were held as, which none were before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.records.generation_record import GENERATION_KIND
from pipeline.records.run_record import RUN_KIND, SCHEMA_VERSION

__all__ = ["lift"]

_THRESHOLD_BEFORE_IT_WAS_A_KEY = 6.0


def lift(value: Any) -> dict[str, Any]:
    """A file's JSON value, in place, in the shape of `SCHEMA_VERSION`.

    Raises ValueError for what says neither what it is nor of which version.
    """
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not a mapping")
    if "schema_version" not in value:
        raise ValueError("it lacks schema_version")
    version = value["schema_version"]
    if type(version) is not int or not 1 <= version <= SCHEMA_VERSION:
        raise ValueError(f"schema_version is {str(version)[:40]!r}, this program reads 1 to {SCHEMA_VERSION}")
    if version == 1:
        kind = value.setdefault("kind", RUN_KIND)
        if isinstance(kind, str) and kind in _FROM_1:
            _FROM_1[kind](value)
    if version < 3 and value.get("kind") in (RUN_KIND, GENERATION_KIND):
        _add(value, emulation=None)
    if version < 3 and value.get("kind") == GENERATION_KIND:
        _add(value, interruptions=None)
    if version < 4 and value.get("kind") == GENERATION_KIND:
        _add(value, drafts=None)
        _add_to_each(value.get("requests"), num_passes=None, num_drafts_accepted=None)
    if version < 5:
        _add(value.get("model"), blocks=None)
    value["schema_version"] = SCHEMA_VERSION
    return value


def _run_from_1(record: dict[str, Any]) -> None:
    _add(record, finished_at=None, traffic_other=None, one_token=None, reconstruction=None, environment=None)
    _add(record, codecs_decode=None, timed_tokens=_timed_tokens(record))
    _add(record, importance={})  # no codec asked for importance
    _add(record.get("one_token"), cached_tokens=None)
    _add(record.get("protocol"), mode="window", decode_chunk=None)
    _common_from_1(record)
    _add_to_each(record.get("ranks"), warm_up_s=None)
    _add(record.get("resumed"), environments=None)


def _common_from_1(record: dict[str, Any]) -> None:
    # Times of what did not exist are zero; those of sampling were within compute_s.
    _add_to_each(record.get("stages"), importance_s=0.0, measure_s=0.0, head_s=0.0)
    _add_to_each(record.get("ranks"), gpu=None, pss_bytes=None, cuda_in_use_bytes=None)
    config = _part(_part(record, "args"), "config")
    _add(config, compressor_decode=None, importance={})
    _add(_part(config, "model"), load_in_8bit_threshold=_THRESHOLD_BEFORE_IT_WAS_A_KEY)


# What has the same keys in both versions is not named.
_FROM_1: dict[str, Callable[[dict[str, Any]], None]] = {RUN_KIND: _run_from_1, GENERATION_KIND: _common_from_1}


def _timed_tokens(record: dict[str, Any]) -> int | None:
    """All of them in a run of one session; how many a resumed one had timed was not written down."""
    if _part(record, "resumed").get("num_sessions") != 1:
        return None
    return _part(record, "results").get("total_processed_tokens")


def _part(value: dict[str, Any], key: str) -> dict[str, Any]:
    part = value.get(key)
    return part if isinstance(part, dict) else {}


def _add(part: Any, **missing: Any) -> None:
    if isinstance(part, dict):
        for key, value in missing.items():
            part.setdefault(key, value)


def _add_to_each(parts: Any, **missing: Any) -> None:
    if isinstance(parts, (dict, list)):
        for part in parts.values() if isinstance(parts, dict) else parts:
            _add(part, **missing)
