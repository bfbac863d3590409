"""Pack n-bit codes into bytes, and typed tensors into one byte buffer. Pure layout: no scales, no rounding.

Used by every codec that stores codes of fewer than 8 bits. Rows are packed one by one, so a row's bytes
depend on that row alone.

Layout of a row of n codes: each code is cut, from its low bits up, into planes of 4, 2 and 1 bits (7 bits are
4 + 2 + 1; 8 bits are stored as they are). A plane of w bits takes s = ceil(n w / 8) bytes and is split, not
interleaved: byte j holds the codes j, j + s, j + 2 s, ..., from its low bits up. Contiguous reads and writes
make that several times faster than interleaving neighbours. It is dense at widths divisible by 8; at others,
3, 5, 6 and 7 bits take at most 2 bytes a row more. Unused bits are 0.

`pack_pairs` is the other layout of 4-bit codes, neighbours in one byte, the first in the high half: that of
bitsandbytes, for codes that stand for table values.

`compressors.kernels` writes the same bytes in compiled loops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from compressors.base import CorruptPayload

__all__ = [
    "concat_bytes",
    "pack",
    "pack_by_torch",
    "pack_pairs",
    "packed_nbytes",
    "sections_nbytes",
    "split_bytes",
    "unpack",
    "unpack_by_torch",
    "unpack_pairs",
]

PLANE_BITS = (4, 2, 1)

Section = tuple[torch.dtype, Sequence[int]]


def packed_nbytes(length: int, nbits: int) -> int:
    """Bytes of a packed row of `length` codes."""
    if not 1 <= nbits <= 8:
        raise ValueError(f"nbits must be 1 to 8, got {nbits}")
    if nbits == 8:
        return length
    return sum(-(-length * width // 8) for width in PLANE_BITS if nbits & width)


def pack(codes: torch.Tensor, nbits: int) -> torch.Tensor:
    """Pack uint8 `codes` [..., length], each below 2**nbits, to uint8 [..., packed_nbytes(length, nbits)]."""
    length = codes.shape[-1]
    packed = codes.new_zeros(*codes.shape[:-1], packed_nbytes(length, nbits))
    if nbits == 8:
        return packed.copy_(codes)
    if codes.device.type == "cpu":
        from compressors.kernels import bits

        bits.pack_rows(_as_rows(codes), nbits, _as_rows(packed))
    else:
        pack_by_torch(codes, nbits, packed)
    return packed


def unpack(packed: torch.Tensor, nbits: int, length: int) -> torch.Tensor:
    """Inverse of `pack`: uint8 [..., packed_nbytes(length, nbits)] to uint8 codes [..., length]."""
    if packed.shape[-1] != packed_nbytes(length, nbits):
        raise ValueError(
            f"{length} codes of {nbits} bits take {packed_nbytes(length, nbits)} bytes, got {packed.shape[-1]}"
        )
    if nbits == 8:
        return packed.clone()
    codes = packed.new_zeros(*packed.shape[:-1], length)
    if packed.device.type == "cpu":
        from compressors.kernels import bits

        bits.unpack_rows(_as_rows(packed), nbits, _as_rows(codes))
    else:
        unpack_by_torch(packed, nbits, codes)
    return codes


def pack_by_torch(codes: torch.Tensor, nbits: int, packed: torch.Tensor) -> None:
    """`pack` into zeros by torch operations, for any device: what the compiled loops are held to."""
    for plane, width, shift in _planes(packed, codes.shape[-1], nbits):
        for lane, part in enumerate(codes.split(plane.shape[-1], dim=-1)):
            plane[..., : part.shape[-1]] |= ((part >> shift) & (2**width - 1)) << (lane * width)


def unpack_by_torch(packed: torch.Tensor, nbits: int, codes: torch.Tensor) -> None:
    """`unpack` into zeros by torch operations, for any device."""
    for plane, width, shift in _planes(packed, codes.shape[-1], nbits):
        for lane, part in enumerate(codes.split(plane.shape[-1], dim=-1)):
            part |= ((plane[..., : part.shape[-1]] >> (lane * width)) & (2**width - 1)) << shift


def _as_rows(tensor: torch.Tensor) -> np.ndarray:
    """[..., n] as an array [N, n], a view if it is contiguous."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1]).contiguous().numpy()


def _planes(packed: torch.Tensor, length: int, nbits: int) -> list[tuple[torch.Tensor, int, int]]:
    """(view of the plane's bytes [..., s], its bits, their position in the code), for nbits below 8."""
    widths = [width for width in PLANE_BITS if nbits & width]
    planes = packed.split([-(-length * width // 8) for width in widths], dim=-1)
    return [(plane, width, nbits & ~(2 * width - 1)) for plane, width in zip(planes, widths, strict=True)]


def pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Pack uint8 `codes` [..., n] below 16 to uint8 [..., ceil(n / 2)], the first of a pair high."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[..., ::2] << 4) | codes[..., 1::2]


def unpack_pairs(packed: torch.Tensor, length: int) -> torch.Tensor:
    """Inverse of `pack_pairs`: uint8 [..., ceil(length / 2)] to uint8 codes [..., length]."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten(-2)[..., :length]


def concat_bytes(*tensors: torch.Tensor) -> torch.Tensor:
    """One contiguous 1-D uint8 tensor with the bytes of `tensors` one after the other, any dtypes."""
    return torch.cat([t.contiguous().reshape(-1).view(torch.uint8) for t in tensors])


def sections_nbytes(*sections: Section) -> int:
    """Bytes of sections, each a (dtype, shape)."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in sections)


def split_bytes(data: torch.Tensor, *sections: Section) -> list[torch.Tensor]:
    """Inverse of `concat_bytes`: cut 1-D uint8 `data` into typed tensors, one for each (dtype, shape).

    The results are views where alignment allows (always, when `data` is a tensor of its own and sections are
    ordered by falling element size), so a writer can fill them. Raises CorruptPayload when lengths differ.
    """
    sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in sections]
    if data.numel() != sum(sizes):
        raise CorruptPayload(f"payload has {data.numel()} bytes, its shape needs {sum(sizes)}")
    tensors = []
    for part, (dtype, shape) in zip(data.split_with_sizes(sizes), sections, strict=True):
        if dtype != torch.uint8:
            if part.data_ptr() % dtype.itemsize or part.storage_offset() % dtype.itemsize:
                part = part.clone()
            part = part.view(dtype)
        tensors.append(part.view(shape))
    return tensors
