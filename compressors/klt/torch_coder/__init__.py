"""klt's quantiser and entropy coder in PyTorch: the bytes and levels of `kernels.klt` and `kernels.trellis`, anywhere.

Tensors live on one device, and nothing loops over values: what is serial in a frame are the rows of its blocks' tokens
and the stripes of a token, and one step handles all states of all blocks at once. docs/klt_format.md specifies the
bytes. Numbers are int64, as PyTorch's unsigned integers lack arithmetic.
"""

from __future__ import annotations

from compressors.klt.torch_coder.decoder import decode
from compressors.klt.torch_coder.encoder import encode
from compressors.klt.torch_coder.models import Models, Symbols, make_models
from compressors.klt.torch_coder.trellis import quantize, reconstruct

__all__ = ["Models", "Symbols", "decode", "encode", "make_models", "quantize", "reconstruct"]
