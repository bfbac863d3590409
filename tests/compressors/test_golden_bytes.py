"""The bytes that codecs write are a format: where one changes, raise `format_version` and renew its line."""

from __future__ import annotations

import hashlib

import pytest
import torch
from codec_cases import SPECS, compress, make

from compressors import Payload

# spec: (format version, bytes, first 16 hex digits of their SHA-256)
GOLDEN = {
    "none": (1, 1680, "fbbfde24fa3b5579"),
    "fp16": (1, 840, "131925902ea51ebe"),
    "bf16": (1, 840, "0e984605ad74ec8a"),
    "fp8_e4m3": (1, 444, "2ef4dfb8ca47dd5f"),
    "fp8_e5m2": (1, 444, "6ac215d155badd1d"),
    "int2": (1, 132, "5e3fff2c487f5392"),
    "int3": (1, 186, "bbef219a1353dd5f"),
    "int4": (1, 234, "3dc0074dd87f626c"),
    "int5": (1, 288, "37ededf791123701"),
    "int6": (1, 342, "8bc4b8f21a848852"),
    "int7": (1, 396, "02cd95fa009b490d"),
    "int8": (1, 444, "6844391dbd101119"),
    "int4(granularity=tensor)": (1, 214, "5a54c2df477a233c"),
    "nf4": (1, 258, "98177ca90ade8641"),
    "nf4(absmax=fp16)": (1, 234, "f4a4f1e6af399979"),
    "nf4(absmax=nested)": (1, 230, "6f023c13b5f412ad"),
    "fp4": (1, 258, "fd3bf6a63222555c"),
    "fp4(absmax=nested)": (1, 230, "14608bc8c4a807cf"),
    "mxfp4": (1, 228, "d05621b685def454"),
    "hqq1": (1, 102, "c1fff5e9c3789967"),
    "hqq2": (1, 156, "2dc7ff487fc80342"),
    "hqq3": (1, 216, "59bf881f229cea94"),
    "hqq3(layout=dense)": (1, 210, "b6925c9629a84142"),
    "hqq4": (1, 258, "0f0e11bd4e0a8aa7"),
    "hqq8": (1, 468, "baa10a746cea3ef4"),
    "block_rowcol_mean(block_tokens=2, block_channels=4)": (1, 864, "2b99f27ee29b0dc2"),
    "hadamard(int4)": (1, 234, "57436f87dc3454b4"),
    "hadamard(nf4, seed=7)": (1, 258, "546fb6f8d11cbcfd"),
    "outlier(channels=2, inner=int4)": (1, 260, "8a3fbbd8a4b9c9f9"),
    "outlier(channels=[0], inner=hadamard(int4))": (1, 246, "0caa12efaaf49254"),
    "topk": (1, 126, "6ebecfa64e69be7f"),
    "topk(density=0.02, inner=fp16)": (1, 30, "91b6b8a9cd6613f7"),
    "topk(density=0.5, inner=int8)": (1, 288, "235f190d898ef142"),
    "token_mixed(metric=norm, fraction=0.25, high=int8, low=int4)": (1, 306, "b369457a25c6028d"),
    "token_mixed(metric=random, fraction=0.5, high=none, low=int2)": (1, 1166, "d497582462512a08"),
    "token_mixed(metric=column, fraction=1)": (1, 444, "6844391dbd101119"),
    "token_graded(metric=uniform, fractions=[0.2, 0.3], codecs=[fp16, hadamard(int8), int4(granularity=token)])": (
        1,
        508,
        "88b516fef3d5fc43",
    ),
    "hadamard(token_mixed(metric=norm, fraction=0.25))": (1, 306, "f5c3a940b8949f7f"),
}

ZSTD_FRAME = "0128b52ffd2040250100e0000080004080a0c0e00010203040506070003f404141414141414141020080101ad006"


def fixed_input():
    """[2, 3, 70] float32: ramps, an outlier channel, a constant row; eighths, whose sums have no rounding."""
    x = ((torch.arange(420) * 37 % 101 - 50) / 8).reshape(2, 3, 70)
    x[..., 5] *= 30
    x[1, 1] = -1.25
    return x


def written(spec):
    codec = make(spec, hidden_size=70)
    data = bytes(compress(codec, fixed_input()).data.numpy())
    return codec.format_version, len(data), hashlib.sha256(data).hexdigest()[:16]


@pytest.mark.parametrize("spec", [s for s in SPECS if "zstd" not in s])
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
