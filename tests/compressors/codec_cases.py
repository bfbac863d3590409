"""Codecs that the codec tests run over: every built-in, and its options where they change the bytes."""

from __future__ import annotations

import torch

from compressors import LinkInfo, Payload, make_compressor
from compressors.check import side_inputs
from tests.helpers.marks import slow_but

SPECS = [
    "none",
    "fp16",
    "bf16",
    "fp8_e4m3",
    "fp8_e5m2",
    *(f"int{nbits}" for nbits in range(2, 9)),
    "int4(granularity=tensor)",
    *("nf4", "nf4(absmax=fp16)", "nf4(absmax=nested)", "fp4", "fp4(absmax=nested)", "mxfp4"),
    *("hqq1", "hqq2", "hqq3", "hqq3(layout=dense)", "hqq4", "hqq8"),
    "block_rowcol_mean(block_tokens=2, block_channels=4)",
    *("hadamard(int4)", "hadamard(nf4, seed=7)"),
    *("outlier(channels=2, inner=int4)", "outlier(channels=[0], inner=hadamard(int4))"),
    *("topk", "topk(density=0.02, inner=fp16)", "topk(density=0.5, inner=int8)"),
    *("zstd", "zstd(none, item_size=4, level=1)", "zstd(int4)"),
    "token_mixed(metric=norm, fraction=0.25, high=int8, low=int4)",
    "token_mixed(metric=random, fraction=0.5, high=none, low=int2)",
    "token_mixed(metric=uniform, fraction=0.3, high=zstd(int8), low=int4)",
    "token_mixed(metric=column, fraction=1)",
    "token_graded(metric=uniform, fractions=[0.2, 0.3], codecs=[fp16, hadamard(int8), int4(granularity=token)])",
    "token_graded(metric=column, fractions=[0.1, 0.2, 0.3, 0.2], codecs=[none, fp16, zstd(int8), zstd(int4), int2])",
    "hadamard(token_mixed(metric=norm, fraction=0.25))",
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(spec, dtype=torch.float32, hidden_size=64):
    """A codec as one end of a link makes it."""
    return make_compressor(spec, LinkInfo(name="test", hidden_size=hidden_size, max_tokens=64, dtype=dtype))


def compress(codec, x):
    """The codec's payload, with made-up side inputs."""
    return codec.compress(x, **side_inputs(codec, x))


def round_trip(spec, x, dtype=None):
    """What a second codec object decodes from the bytes alone."""
    payload = compress(make(spec, x.dtype, x.shape[-1]), x)
    received = Payload(payload.data.clone(), payload.shape, payload.meta)
    return make(spec, x.dtype, x.shape[-1]).decompress(received, x.device, dtype or x.dtype)


# What takes long is tried with one spec of each class in `make check`, with all in `make test`.
FIRST_OF_CLASS = list({type(make(spec)): spec for spec in reversed(SPECS)}.values())
MANY_SLOW_SPECS = slow_but(FIRST_OF_CLASS, SPECS)
