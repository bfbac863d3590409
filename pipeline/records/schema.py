"""The shape of a run record, as far as reports read it: a table of keys and types, and a check against it.

`record` writes records and reads them back; what other versions or other programs leave in a folder may pass for one
at first sight. Plain Python; nothing is converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

__all__ = ["schema_problem"]

_NUMBER = (int, float)
_FIGURE = (int, float, NoneType)  # null where it is not finite, or there is nothing to divide by
_TIMES = {"compute_s": _NUMBER, "compress_s": _NUMBER, "decompress_s": _NUMBER}

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
        "avg_ppl": _FIGURE,
        "total_loss_tokens": int,
        "total_processed_tokens": int,
        "num_microbatches": int,
    },
    "traffic_totals": {"bytes_per_token": _FIGURE, "bits_per_value": _FIGURE},
    "traffic_per_link": {
        ...: {
            "bytes": int,
            "header_bytes": int,
            "padding_bytes": int,
            "tokens": int,
            "tx": int,
            "bytes_per_token": _NUMBER,
        }
    },
    "timed_tokens": int,
    "tokens_per_s": _NUMBER,
    "causal": bool,
    "notes": [str],
    "codecs": {...: {"name": str}},
    "plan": [{"stage": int, "node": int, "layers": [int]}],
    "stages": {...: {**_TIMES, "wait_s": _NUMBER, "importance_s?": _NUMBER}},
    "one_token?": {
        "stages": {...: _TIMES},
        "links": {...: {"payload_bytes": int, "header_bytes": int}},
    },
    "reconstruction?": {...: {"relative_squared_error": _FIGURE}},
    "ranks": [{"host": str, "threads": int}],
    "schedule": {"in_flight": int},
    "backend": str,
    "model": {"hidden_size": int, "checkpoint_fingerprint": str},
    "dataset": {"description": str, "num_tokens": int, "text_sha256": str, "ids_sha256": str},
    "protocol": {"max_length": int, "stride": int},
    "versions": {...: str},
}


def schema_problem(record: Any) -> str | None:
    """What a report would stumble over: the first key that is missing or of another type; None for a whole record."""
    return _problem(record, _RECORD, "")


def _problem(value: Any, shape: Any, where: str) -> str | None:
    if isinstance(shape, dict):
        if not isinstance(value, Mapping):
            return f"{where or 'it'} is not a mapping"
        items = [(key, shape[...]) for key in value] if ... in shape else list(shape.items())
        for key, inner in items:
            name = key.removesuffix("?")
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
    return None if isinstance(value, shape) else f"{where} is {str(value)[:40]!r}"
