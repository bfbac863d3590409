"""What tells runs apart: the digest of what they depend on, and the name of one of them."""

from __future__ import annotations

import datetime
import hashlib
import json
from typing import Any

__all__ = ["digest_of", "make_run_id"]


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def make_run_id(*words: str) -> str:
    """`20260131-235959-smollm2-nf4`: UTC time and a few words, safe as a file name."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    safe = ["".join(c if c.isalnum() or c in "._" else "-" for c in word).strip("-")[:40] for word in words]
    return "-".join([now, *filter(None, safe)])
