"""Codecs: hidden states to bytes and back. Knows nothing of ranks, frames or models.

    codec = make_compressor("int4")
    payload = codec.compress(x)                                    # x [B, T, H]
    x_hat = make_compressor("int4").decompress(payload, x.device, x.dtype)

`base` holds the contract, `registry` the names, `strict_yaml` and `user_files` how options and files are read, every
other module one family of codecs. What needs torch is imported when first asked for: a config is read without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressors.base import Compressor, CorruptPayload, LinkInfo, Payload
    from compressors.registry import builtin_names, make_compressor

__all__ = ["Compressor", "CorruptPayload", "LinkInfo", "Payload", "builtin_names", "make_compressor"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "registry" if name in ("builtin_names", "make_compressor") else "base"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
