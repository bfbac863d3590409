"""Codecs, shapes and inputs that the codec tests share."""

from __future__ import annotations

import torch

from compressors import LinkInfo, builtin_names, make_compressor

SPECS = [*builtin_names(), "int4(granularity=tensor)"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 0, 5), (0, 3, 64), (1, 1, 1), (1, 1, 64), (2, 3, 7), (3, 5, 100), (1, 4, 129), (2, 2, 576)]


def make(spec, dtype=torch.float32, hidden_size=64):
    """A codec as one end of a link makes it."""
    return make_compressor(spec, LinkInfo(name="test", hidden_size=hidden_size, max_tokens=64, dtype=dtype))


def round_trip(spec, x, dtype=None):
    """What a second codec object decodes from the bytes alone."""
    payload = make(spec, x.dtype, x.shape[-1]).compress(x)
    received = type(payload)(payload.data.clone(), payload.shape, payload.meta)
    return make(spec, x.dtype, x.shape[-1]).decompress(received, x.device, dtype or x.dtype)


def hidden_states(shape, dtype=torch.float32, seed=0):
    """Normal values with a few large channels, as hidden states have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x[..., :: max(shape[-1] // 3, 1)] *= 20
    return x.to(dtype)
