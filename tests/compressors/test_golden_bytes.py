"""The bytes that codecs write are a format. Where one changes, raise `format_version` and renew its line here."""

from __future__ import annotations

import hashlib

import pytest
import torch
from codec_cases import SPECS, make

from compressors import Payload

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
    "int4(granularity=tensor)": (1, 214, "4009e30240664ad3"),
    "nf4": (1, 258, "63491c2c9d593e12"),
    "nf4(absmax=fp16)": (1, 234, "f4dcd98d5add9168"),
    "nf4(absmax=nested)": (1, 230, "11e7d7b3478fda53"),
    "fp4": (1, 258, "0555e4b45ece96f9"),
    "fp4(absmax=nested)": (1, 230, "cc9e6533a84c945c"),
    "mxfp4": (1, 228, "1ec98c8ded8732ea"),
    "hqq1": (1, 102, "356dd543078da308"),
    "hqq2": (1, 156, "d03f0cf433497d4e"),
    "hqq3": (1, 216, "2a4886b10554763f"),
    "hqq3(layout=dense)": (1, 210, "3d3e443e7d8f1770"),
    "hqq4": (1, 258, "5db847e7e7065eae"),
    "hqq8": (1, 468, "ddf7b04e09a0ac44"),
    "block_rowcol_mean(block_tokens=2, block_channels=4)": (1, 864, "f4d1a338e3ad2513"),
    "hadamard(int4)": (1, 234, "f1d62b58cbd2957c"),
    "hadamard(nf4, seed=7)": (1, 258, "f076a927af008869"),
    "outlier(channels=2, inner=int4)": (1, 260, "6a6f3b94a5af9160"),
    "outlier(channels=[0], inner=hadamard(int4))": (1, 246, "07ba07e2b8d5abc2"),
    "topk": (1, 126, "f706f7868dadb353"),
    "topk(density=0.02, inner=fp16)": (1, 30, "b547a7bb3bbcaee0"),
    "topk(density=0.5, inner=int8)": (1, 288, "98005b94980b70db"),
}

ZSTD_FRAME = "0128b52ffd2040250100e0000080004080a0c0e00010203040506070003f404141414141414141020080101ad006"


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


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.startswith("zstd")])
def test_bytes(spec):
    assert written(spec) == GOLDEN[spec]


def test_zstd_reads_a_stored_frame():
    """Another version of the library may write other bytes for the same content, but it reads these."""
    frame = bytes.fromhex(ZSTD_FRAME)
    data = torch.frombuffer(bytearray(frame), dtype=torch.uint8)
    decoded = make("zstd(none, item_size=4)").decompress(Payload(data, (1, 2, 8)), torch.device("cpu"), torch.float32)
    assert torch.equal(decoded, torch.arange(16.0).view(1, 2, 8))


def test_int8_by_hand():
    payload = make("int8").compress(torch.tensor([[[-1.0, 0.0, 1.0, 1.55]]]))
    # scale (1.55 + 1) / 255 = 0.01, in bf16 0x3c24; zero -128 + 100 = -28; codes round(x / scale) - 28 + 128
    assert bytes(payload.data.numpy()).hex() == "243c" + "e4ff" + "0064c8ff"
