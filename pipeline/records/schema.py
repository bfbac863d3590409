"""The shape of a run record, as far as reports read it: a table of keys, types and ranges, and a check against it.

`record` writes records and reads them back; what other versions or other programs leave in a folder may pass for one
at first sight. Plain Python; nothing is converted.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["schema_problem"]


@dataclass(frozen=True)
class _Number:
    """From `low` to `high`; `whole`: an integer; `null`: may be missing, as where it is not finite."""

    low: float = 0
    high: float = 1e15  # sums, quotients and square roots of such numbers are numbers, too
    whole: bool = False
    null: bool = False


_COUNT = _Number(whole=True)
_POSITIVE = _Number(low=1, whole=True)
_AMOUNT = _Number()
_FIGURE = _Number(null=True)
_PPL = _Number(low=0.5, high=sys.float_info.max, null=True)  # 1 at best, but for rounding
_TIMES = {"compute_s": _AMOUNT, "compress_s": _AMOUNT, "decompress_s": _AMOUNT}

# A mapping with the key `...` has names of its own; a list has any length; a key with "?" may be missing.
_RECORD = {
    "run_id": str,
    "digest": str,
    "finished_at": str,
    "args": {
        "model_name": str,
        "dtype": str,
        "load_in_8bit": bool,
        "load_in_4bit": bool,
        "config": {"compressor": (str, dict), "compressor_per_link": dict},
    },
    "results": {
        "avg_ppl": _PPL,
        "total_loss_tokens": _COUNT,
        "total_processed_tokens": _COUNT,
        "num_microbatches": _POSITIVE,
    },
    "traffic_totals": {"bytes_per_token": _FIGURE, "bits_per_value": _FIGURE},
    "traffic_per_link": {
        ...: {
            "bytes": _COUNT,
            "header_bytes": _COUNT,
            "padding_bytes": _COUNT,
            "tokens": _POSITIVE,
            "tx": _COUNT,
            "bytes_per_token": _AMOUNT,
        }
    },
    "timed_tokens": _COUNT,
    "tokens_per_s": _AMOUNT,
    "causal": bool,
    "notes": [str],
    "codecs": {...: {"name": str}},
    "plan": [{"stage": _COUNT, "node": _COUNT, "layers": [_COUNT]}],
    "stages": {...: {**_TIMES, "wait_s": _AMOUNT, "importance_s?": _AMOUNT}},
    "one_token?": {
        "stages": {...: _TIMES},
        "links": {...: {"payload_bytes": _COUNT, "header_bytes": _COUNT}},
        "cached_tokens?": _COUNT,
    },
    "reconstruction?": {...: {"relative_squared_error": _FIGURE}},
    "ranks": [{"host": str, "threads": _COUNT}],
    "schedule": {"in_flight": _POSITIVE},
    "backend": str,
    "model": {"hidden_size": _POSITIVE, "checkpoint_fingerprint": str},
    "dataset": {"description": str, "num_tokens": _COUNT, "text_sha256": str, "ids_sha256": str},
    "protocol": {"max_length": _COUNT, "stride": _COUNT},
    "versions": {...: str},
    "environment?": {...: str},
}


def schema_problem(record: Any) -> str | None:
    """What a report would stumble over: the first key that is missing, of another type or out of its range, or that
    does not fit the others; None for a whole record.
    """
    return _problem(record, _RECORD, "") or _contradiction(record)


def _problem(value: Any, shape: Any, where: str) -> str | None:
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            return f"{where or 'it'} is not a mapping"
        items = [(key, shape[...]) for key in value] if ... in shape else list(shape.items())
        for key, inner in items:
            name = key if ... in shape else key.removesuffix("?")
            here = f"{where}.{name}" if where else name
            if name in value:
                if problem := _problem(value[name], inner, here):
                    return problem
            elif name == key:
                return f"it lacks {here}"
        return None
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where} is not a list"
        return next(filter(None, (_problem(item, shape[0], f"{where}[{i}]") for i, item in enumerate(value))), None)
    fits = _is_in(value, shape) if isinstance(shape, _Number) else isinstance(value, shape)
    return None if fits else f"{where} is {_short(value)}"


def _is_in(value: Any, allowed: _Number) -> bool:
    if value is None:
        return allowed.null
    if isinstance(value, bool) or not isinstance(value, int if allowed.whole else (int, float)):
        return False
    return allowed.low <= value <= allowed.high


def _contradiction(record: Mapping[str, Any]) -> str | None:
    """What is wrong between keys that are right by themselves."""
    try:
        datetime.datetime.fromisoformat(record["finished_at"])
    except ValueError:
        return f"finished_at is {_short(record['finished_at'])}"
    for stage in record["plan"]:
        if len(stage["layers"]) != 2 or stage["layers"][0] > stage["layers"][1]:
            return f"layers of stage {stage['stage']} are {_short(stage['layers'])}, not a start and an end"
    planned = {str(stage["stage"]) for stage in record["plan"]}
    if not planned or planned != record["stages"].keys():
        return f"stages are {_short(list(record['stages']))}, those of the plan {_short(sorted(planned))}"
    links, with_codec = record["traffic_per_link"], record["codecs"]
    if links.keys() != with_codec.keys():
        return f"links are {_short(list(links))}, those with codecs {_short(list(with_codec))}"
    if not record["ranks"]:
        return "ranks is empty"
    return None


def _short(value: Any) -> str:
    """For messages; of a very long integer not even the text can be had."""
    try:
        return repr(str(value)[:40])
    except (ValueError, RecursionError):
        return f"{type(value).__name__} that cannot be shown"
