"""The bytes that codecs write are a format. Where one changes, raise `format_version` and renew its line here."""

from __future__ import annotations

import hashlib

import pytest
import torch
from codec_cases import SPECS, make

# spec: (format version, bytes, first 16 hex digits of their SHA-256)
GOLDEN = {
    "none": (1, 1680, "e6b7df227c1ce525"),
    "fp16": (1, 840, "3f321a70cde1592e"),
    "bf16": (1, 840, "0cfb9b8d2727b542"),
    "fp8_e4m3": (1, 444, "123c51746668e938"),
    "fp8_e5m2": (1, 444, "c3fe732d02e237d6"),
    "int2": (1, 132, "3feacf8a5e027db0"),
    "int3": (1, 186, "b66630892cf53581"),
    "int4": (1, 234, "6d94e7e0c425fa36"),
    "int5": (1, 288, "853b6898900840c4"),
    "int6": (1, 342, "5070b8949366062f"),
    "int7": (1, 396, "57e745b776f114f5"),
    "int8": (1, 444, "9bfd3c7f17e09def"),
    "nf4": (1, 258, "63491c2c9d593e12"),
    "fp4": (1, 258, "0555e4b45ece96f9"),
    "mxfp4": (1, 228, "1ec98c8ded8732ea"),
    "hqq3": (1, 216, "2a4886b10554763f"),
    "hqq1": (1, 102, "356dd543078da308"),
    "hqq2": (1, 156, "d03f0cf433497d4e"),
    "hqq4": (1, 258, "5db847e7e7065eae"),
    "hqq8": (1, 468, "ddf7b04e09a0ac44"),
    "int4(granularity=tensor)": (1, 214, "4009e30240664ad3"),
}


def fixed_input():
    """[2, 3, 70] float32 without any random generator: ramps, an outlier channel and a constant row."""
    x = ((torch.arange(420) * 37 % 101 - 50) / 7).reshape(2, 3, 70)
    x[..., 5] *= 30
    x[1, 1] = -1.25
    return x


def written(spec):
    codec = make(spec, hidden_size=70)
    data = bytes(codec.compress(fixed_input()).data.numpy())
    return codec.format_version, len(data), hashlib.sha256(data).hexdigest()[:16]


@pytest.mark.parametrize("spec", SPECS)
def test_bytes(spec):
    assert written(spec) == GOLDEN[spec]


def test_int8_by_hand():
    payload = make("int8").compress(torch.tensor([[[-1.0, 0.0, 1.0, 1.55]]]))
    # scale (1.55 + 1) / 255 = 0.01, in bf16 0x3c24; zero -128 + 100 = -28; codes round(x / scale) - 28 + 128
    assert bytes(payload.data.numpy()).hex() == "243c" + "e4ff" + "0064c8ff"
