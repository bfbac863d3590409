"""Codec names to codecs: built-ins, `package.module:Class` plug-ins, and the spec in a config or on a command
line.

A spec is one of

    int4
        a name
    outlier(channels=8, inner=hadamard(int4))
        the short form; an argument without a name is `inner`
    {name: outlier, channels: 8, inner: {name: int4}}
        a mapping, as YAML gives it
    my_package.codecs:Sketch(rank=4)
        a plug-in class, importable on every rank

`short_form` reads the second. Codec modules are imported when first asked for, so that listing names costs nothing.
This module knows nothing of links beyond passing `LinkInfo` on.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from compressors.base import Compressor, LinkInfo, option_names
from compressors.plugins import check_options, import_named
from compressors.short_form import did_you_mean, parse_short_form

__all__ = ["builtin_names", "make_compressor"]

# name -> (module, class, options that the name fixes)
_BUILTINS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "none": ("scalar.cast", "Identity", {}),
    "fp16": ("scalar.cast", "Cast", {"to": "fp16"}),
    "bf16": ("scalar.cast", "Cast", {"to": "bf16"}),
    "fp8_e4m3": ("scalar.fp8", "Fp8", {"variant": "e4m3"}),
    "fp8_e5m2": ("scalar.fp8", "Fp8", {"variant": "e5m2"}),
    **{f"int{nbits}": ("scalar.affine", "IntN", {"nbits": nbits}) for nbits in range(2, 9)},
    "nf4": ("scalar.fourbit", "FourBit", {"table": "nf4"}),
    "fp4": ("scalar.fourbit", "FourBit", {"table": "fp4"}),
    "mxfp4": ("scalar.mxfp4", "MxFp4", {}),
    "hqq3": ("scalar.hqq", "Hqq", {"nbits": 3}),
    **{f"hqq{nbits}": ("scalar.hqq", "Hqq", {"nbits": nbits, "layout": "dense"}) for nbits in (1, 2, 4, 8)},
    "block_rowcol_mean": ("scalar.block_rowcol_mean", "BlockRowColMean", {}),
    "hadamard": ("wrappers.hadamard", "Hadamard", {}),
    "outlier": ("wrappers.outlier", "Outlier", {}),
    "topk": ("wrappers.topk", "TopK", {}),
    "zstd": ("wrappers.zstd", "Zstd", {}),
    "klt": ("klt.codec", "Klt", {}),
    "klt_fixed": ("klt.fixed", "KltFixed", {}),
    "token_mixed": ("wrappers.token_mixed", "TokenMixed", {}),
    "token_graded": ("wrappers.token_mixed", "TokenGraded", {}),
}


def builtin_names() -> list[str]:
    """Names of the built-in codecs."""
    return list(_BUILTINS)


def make_compressor(spec: str | Mapping[str, Any] | Compressor, link: LinkInfo | None = None) -> Compressor:
    """The codec that `spec` describes (see the module docstring), for `link` if one is given.

    A codec object is returned as it is. Raises ValueError for an unknown codec or option, a bad value, or a
    plug-in that cannot be used; the message names the codec, the option, what was given and what is allowed.
    """
    if isinstance(spec, Compressor):
        return spec
    name, options = _parse(spec)
    cls, fixed = _load(name)
    _check_options(name, cls, options, fixed)
    return cls(**options | fixed, link=link)


def _parse(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(name, options) of a spec in either form."""
    if isinstance(spec, str):
        return parse_short_form(spec, "compressor", unnamed="inner")
    if not isinstance(spec, Mapping):
        raise ValueError(f"compressor is {spec!r}, expected a name, its short form or a mapping with `name`")
    options = {str(key): value for key, value in spec.items()}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"compressor is {dict(spec)!r}, expected a mapping with `name: <codec>`")
    return name, options


def _load(name: str) -> tuple[type[Compressor], dict[str, Any]]:
    """The class of a codec and the options that its name fixes."""
    if name in _BUILTINS:
        module, class_name, fixed = _BUILTINS[name]
        return getattr(importlib.import_module(f"compressors.{module}"), class_name), fixed
    if ":" in name:
        return _load_plugin(name), {}
    close = difflib.get_close_matches(name, _BUILTINS, n=3)
    raise ValueError(
        f"unknown compressor {name!r}{did_you_mean(close)}; built-in: {', '.join(_BUILTINS)}; "
        "a class of your own is written package.module:Class"
    )


def _load_plugin(name: str) -> type[Compressor]:
    class_name = name.partition(":")[2]
    cls = import_named(f"compressor {name!r}", name)
    if not (isinstance(cls, type) and issubclass(cls, Compressor)):
        raise ValueError(f"compressor {name!r}: {class_name} is not a subclass of compressors.Compressor")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise ValueError(f"compressor {name!r}: {class_name} does not define {missing}")
    if not isinstance(getattr(cls, "name", None), str):
        raise ValueError(f"compressor {name!r}: {class_name} has no class attribute `name`")
    if cls.name in _BUILTINS:
        raise ValueError(
            f"compressor {name!r}: {class_name}.name is {cls.name!r}, which is a built-in codec's; choose another"
        )
    if "link" not in inspect.signature(cls).parameters:
        raise ValueError(
            f"compressor {name!r}: {class_name}.__init__ must take link=None and hand it to super().__init__"
        )
    return cls


def _check_options(name: str, cls: type[Compressor], options: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Raise ValueError for an option that the codec does not take, lacks, or fixes by its name."""
    own = [option for option in option_names(cls) if option not in fixed]
    for option, value in options.items():
        if option in fixed and value != fixed[option]:
            raise ValueError(f"compressor {name!r}: {option} is {value!r}, but the name fixes {fixed[option]!r}")
    free = {option: value for option, value in options.items() if option not in fixed}
    check_options(f"compressor {name!r}", cls, free, own)
