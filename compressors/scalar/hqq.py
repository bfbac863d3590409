"""hqq1, hqq2, hqq3, hqq4, hqq8: half-quadratic quantisation, groups of 64 values within a token.

    scale = (max - min) / (2^n - 1)          at least 5e-5 and max |x| / 2^15, at most 65504
    zero  = -min / scale, then refined:
        q     = clamp(round(x / scale + zero), 0, 2^n - 1)
        e     = x - (q - zero) * scale
        e'    = sign(e) * max(|e| - |e|^(p - 1) / beta, 0)             p = 0.7, beta = 10
        zero  = mean(q - (x - e') / scale)
    x'    = (q - fp16(zero)) * fp16(scale), with the zero that had the smallest mean |e|

Source: Badri and Shaji 2023, "Half-quadratic quantization of large machine learning models", and the hqq
library's `Quantizer` (axis 1, group size 64). Departures:

* The library stops when the mean error of the whole tensor no longer falls, so a token's codes depend on
  later tokens. Here each group stops by itself, after PATIENCE updates without a smaller error or ITERATIONS
  in all, and keeps its best zero: causal, with errors as low as the library's.
* For 4 bits, and for 4 alone, the library's own config rounds the first zero (`round_zero`). Here it is not
  rounded: more perplexity on hidden states with outlier channels (docs/codecs.md).
* |e|^(p - 1) is taken from the bits of the float, within 3%: it only sets how far large errors are
  discounted, and it makes the same bytes on every device, which a library's pow does not.
* The library gives a range below 1e-4 the scale 1. Here two lower bounds and an upper one keep scale and zero
  within fp16.

Side information: fp16 scale and zero, 4 bytes a group, as the library has in half precision.

Payload: scale [N, groups], zero [N, groups], then the codes of each row, packed by `compressors.bitpack`;
3 bits in the library's layout of ten codes in a 32-bit word (`layout="words"`, 3.2 bits a value), or dense
(`layout="dense"`).
"""

from __future__ import annotations

import torch

from compressors.base import LinkInfo
from compressors.bitpack import Section, pack, packed_nbytes, unpack
from compressors.kernels.hqq_constants import BETA, GROUP, ITERATIONS, PATIENCE, POWER, POWER_OFFSET
from compressors.options import check_choice
from compressors.rows import RowCodec, divide

__all__ = ["Hqq"]

CODES_PER_WORD = 10
SMALLEST_SCALE = 5e-5
LARGEST_HALF = 65504.0
QUIET_NAN_FP16 = 0x7E00


class Hqq(RowCodec):
    """Codes of `nbits` bits with a refined zero for each 64 values of a token."""

    frame_invariant = True

    def __init__(self, *, nbits: int, layout: str = "words", link: LinkInfo | None = None) -> None:
        super().__init__(link=link)
        self.name = f"hqq{nbits}"
        self.nbits = check_choice(self.name, "nbits", nbits, (1, 2, 3, 4, 8))
        self.layout = check_choice(self.name, "layout", layout, ("words", "dense") if nbits == 3 else ("dense",))
        self._levels = 2**nbits - 1

    def sections(self, num_rows: int, width: int) -> list[Section]:
        groups = (torch.float16, (num_rows, -(-width // GROUP)))
        if self.layout == "words":
            return [groups, groups, (torch.int32, (num_rows, -(-width // CODES_PER_WORD)))]
        return [groups, groups, (torch.uint8, (num_rows, packed_nbytes(width, self.nbits)))]

    def encode(self, rows, scale, zero, packed):
        width = rows.shape[1]
        groups, valid = _groups(rows), _is_real(rows)
        group_scale, group_zero = self._start(groups)
        codes = self._refine(groups, valid, group_scale[..., None], group_zero[..., None])
        self._store(codes.flatten(1)[:, :width], group_scale, group_zero, scale, zero, packed)

    def encode_cpu(self, rows, scale, zero, packed):
        from compressors.kernels import hqq

        group_scale, group_zero = self._start(_groups(rows))
        codes = self._scratch.get("codes", rows.shape, torch.uint8, rows.device)
        hqq.refine(rows.numpy(), self._levels, group_scale.numpy(), group_zero.numpy(), codes.numpy())
        self._store(codes, group_scale, group_zero, scale, zero, packed)

    def decode(self, rows, limit, scale, zero, packed):
        codes = _groups(self._unpack(packed, rows.shape[1]))
        values = (codes - zero.float()[..., None]) * scale.float()[..., None]
        rows.copy_(values.flatten(1)[:, : rows.shape[1]]).clamp_(-limit, limit)

    def decode_cpu(self, rows, limit, scale, zero, packed):
        from compressors.kernels import hqq

        codes = self._unpack(packed, rows.shape[1])
        hqq.decode(codes.numpy(), scale.float().numpy(), zero.float().numpy(), limit, rows.numpy())

    def _start(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, zero) [N, groups] before refinement, the scale rounded to fp16; NaN for lost groups."""
        lo, hi = groups.amin(2), groups.amax(2)
        largest = torch.maximum(lo.abs(), hi.abs())
        scale = divide(hi, self._levels) - divide(lo, self._levels)
        scale = torch.maximum(scale, largest / 2**15).clamp_(SMALLEST_SCALE, LARGEST_HALF)
        scale = scale.half().float().masked_fill_(~largest.isfinite(), torch.nan)
        return scale, (-lo / scale).clamp_(-LARGEST_HALF, LARGEST_HALF)

    def _refine(self, groups, valid, scale, zero):
        """Update `zero` [N, groups, 1] in place and return the codes [N, groups, 64]."""
        inverse, count = 1.0 / scale, valid.sum(-1, keepdim=True, dtype=torch.float32)
        trial, smallest = zero.clone(), torch.full_like(zero, torch.inf)
        failures = torch.zeros_like(zero)
        for _ in range(ITERATIONS + 1):
            q = (groups * inverse + trial).round_().clamp_(0, self._levels)
            e = groups - (q - trial) * scale
            magnitude = e.abs()
            error = _tree_sum(magnitude * valid)
            better = (error < smallest) & (failures < PATIENCE)
            smallest = torch.where(better, error, smallest)
            zero.copy_(torch.where(better, trial, zero))
            failures = torch.where(better, 0.0, failures + 1)
            discount = (magnitude.view(torch.int32).float() * POWER + POWER_OFFSET).int().view(torch.float32)
            kept = torch.copysign((magnitude - discount * (1 / BETA)).clamp_(min=0), e)
            trial = _tree_sum((q - (groups - kept) * inverse) * valid) / count
        q = (groups * inverse + zero).round_().clamp_(0, self._levels)
        return q.masked_fill_(scale.isnan(), 0).to(torch.uint8)

    def _store(self, codes, group_scale, group_zero, scale, zero, packed):
        lost = group_scale.isnan()
        scale.copy_(group_scale).view(torch.int16).masked_fill_(lost, QUIET_NAN_FP16)
        zero.copy_(group_zero.clamp_(-LARGEST_HALF, LARGEST_HALF)).masked_fill_(lost, 0)
        packed.copy_(_pack_words(codes) if self.layout == "words" else pack(codes, self.nbits))

    def _unpack(self, packed: torch.Tensor, width: int) -> torch.Tensor:
        return _unpack_words(packed, width) if self.layout == "words" else unpack(packed, self.nbits, width)


def _groups(rows: torch.Tensor) -> torch.Tensor:
    """[N, H] as [N, groups, 64], filled up with the row's last value."""
    num_rows, width = rows.shape
    fill = -width % GROUP
    padded = torch.cat([rows, rows[:, -1:].expand(num_rows, fill)], dim=1) if fill else rows
    return padded.view(num_rows, (width + fill) // GROUP, GROUP)


def _is_real(rows: torch.Tensor) -> torch.Tensor:
    """Which values of `_groups` are not filled up, bool [groups, 64]."""
    width = rows.shape[1]
    return (torch.arange(width + -width % GROUP, device=rows.device) < width).view(-1, GROUP)


def _tree_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of the last 64 values, halves added to halves: an order that every device keeps."""
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values


def _pack_words(codes: torch.Tensor) -> torch.Tensor:
    """3-bit codes [N, H] to int32 [N, W = ceil(H / 10)]: word j has codes j, j + W, ..., from bit 27 down."""
    num_rows, width = codes.shape
    num_words = -(-width // CODES_PER_WORD)
    if codes.device.type == "cpu":
        from compressors.kernels import bits

        packed = torch.empty(num_rows, num_words, dtype=torch.int32)
        bits.pack_words(codes.contiguous().numpy(), packed.numpy())
        return packed
    fill = num_words * CODES_PER_WORD - width
    lanes = torch.nn.functional.pad(codes, (0, fill)).view(num_rows, CODES_PER_WORD, num_words).int()
    words = lanes[:, 0] << 27
    for lane in range(1, CODES_PER_WORD):
        words |= lanes[:, lane] << (27 - 3 * lane)
    return words


def _unpack_words(words: torch.Tensor, width: int) -> torch.Tensor:
    """Inverse of `_pack_words`: int32 [N, W] to uint8 codes [N, width]."""
    if words.device.type == "cpu":
        from compressors.kernels import bits

        codes = torch.empty(words.shape[0], width, dtype=torch.uint8)
        bits.unpack_words(words.numpy(), codes.numpy())
        return codes
    lanes = [((words >> (27 - 3 * lane)) & 7).to(torch.uint8) for lane in range(CODES_PER_WORD)]
    return torch.cat(lanes, dim=1)[:, :width]
