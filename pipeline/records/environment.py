"""What a session ran on, as far as losses may depend on it: words by key (`runtime.environment` asks for them)."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata

__all__ = ["Environment", "environment_changes", "software_versions"]

_PACKAGES = ("torch", "transformers", "bitsandbytes", "safetensors", "tokenizers", "numpy", "numba")

Environment = Mapping[str, str]  # "threads": "2", "torch": "2.13.0", ...


def environment_changes(before: Environment, now: Environment) -> str:
    """`threads 2, before 1; torch 2.13.0, before 2.12.1`; empty where the two are alike."""
    keys = [key for key in {**now, **before} if before.get(key) != now.get(key)]
    return "; ".join(f"{key} {now.get(key, 'not there')}, before {before.get(key, 'not there')}" for key in keys)


def software_versions() -> dict[str, str]:
    """Versions of what computes the numbers."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions
