"""What a session ran on, as far as losses may depend on it: words by key. `runtime.environment` finds them out."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["Environment", "environment_changes"]

Environment = Mapping[str, str]  # "threads": "2", "torch": "2.13.0", ...


def environment_changes(before: Environment, now: Environment) -> str:
    """`threads 2, before 1; torch 2.13.0, before 2.12.1`; empty where the two are alike."""
    keys = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    return "; ".join(f"{key} {now.get(key, 'not there')}, before {before.get(key, 'not there')}" for key in keys)
