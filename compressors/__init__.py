"""Codecs: hidden states to bytes and back. Knows nothing of ranks, frames or models.

    codec = make_compressor("int4")
    payload = codec.compress(x)                                    # x [B, T, H]
    x_hat = make_compressor("int4").decompress(payload, x.device, x.dtype)

`base` holds the contract, `registry` the names, every other module one family of codecs.
"""

from compressors.base import Compressor, CorruptPayload, LinkInfo, Payload
from compressors.registry import builtin_names, make_compressor

__all__ = ["Compressor", "CorruptPayload", "LinkInfo", "Payload", "builtin_names", "make_compressor"]
