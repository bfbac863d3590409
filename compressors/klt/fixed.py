"""klt_fixed: the transform of `klt` with a fixed number of bits for each component, and no entropy coder.

Bits go to the components by reverse water-filling (`compressors.klt.bit_allocation`), `nbits` times H in all. A
component is quantised uniformly, with the step that is best for a Laplace distribution at that many bits, and packed;
one without bits is its mean. Nothing is predicted from other tokens, all operations are torch's, and the size follows
from the shape: it runs on a GPU without waiting for it.

A token whose root mean square lies 4 octaves or more from the calibration's median, such as an attention sink, is
nearly all in a few channels. Within the same bytes its largest channels are sent as (index, bf16), the others are 0. A
NaN or an infinity makes the token NaN.

Side information: 2 bytes a token, the root mean square u in bf16, negative for a token of large channels.
Payload: u bf16 [N], the codes' bytes uint8 [N, P] (`compressors.bitpack`, components of one width after the other).
"""

from __future__ import annotations

import torch

from compressors.base import LinkInfo
from compressors.bitpack import Section, pack, packed_nbytes, unpack
from compressors.klt.bit_allocation import LAPLACE_STEP, MAX_NBITS, allocate
from compressors.klt.calibration_file import read_calibration
from compressors.klt.transform import RAW_EIGHTHS, multiply_rows
from compressors.options import option_error
from compressors.rows import RowCodec, divide

__all__ = ["KltFixed"]


class KltFixed(RowCodec):
    """`nbits` per value on average, by the link's file in `calibration`."""

    name = "klt_fixed"

    def __init__(self, *, calibration: str, nbits: float = 3.0, link: LinkInfo | None = None) -> None:
        super().__init__(link=link)
        if isinstance(nbits, bool) or not isinstance(nbits, (int, float)) or not 0.25 <= nbits <= MAX_NBITS:
            raise option_error(self.name, "nbits", nbits, f"a number from 0.25 to {MAX_NBITS}")
        self.calibration, self.nbits = calibration, nbits
        self._known = read_calibration(self.name, calibration, link)
        self._content = self._known.link
        widths = allocate(self._content.fixed_size, round(nbits * self._content.hidden_size))
        self._groups = [(n, (widths == n).nonzero().squeeze(1)) for n in range(1, MAX_NBITS + 1) if (widths == n).any()]
        self._order = torch.cat([group for _, group in self._groups])
        self._steps = self._content.fixed_size[self._order] * torch.tensor(LAPLACE_STEP)[widths[self._order]]
        self._levels = torch.exp2(widths[self._order].float())
        self._row_nbytes = max(sum(packed_nbytes(len(group), n) for n, group in self._groups), 4)
        self._median = 2.0 ** (int(self._content.rms_eighths) / 8)

    def format_config(self) -> dict:
        """The file's digest stands for its path."""
        return super().format_config() | {"calibration": self._known.digest}

    def sections(self, num_rows: int, width: int) -> list[Section]:
        return [(torch.bfloat16, (num_rows,)), (torch.uint8, (num_rows, self._row_nbytes))]

    def encode(self, rows, scales, packed):
        self._known.check_unchanged()
        u = rows.square().mean(1).sqrt().to(torch.bfloat16)
        u = torch.where(rows.isfinite().all(1), u, torch.nan)
        is_sparse = ~((8 * divide(u.float(), self._median).log2()).abs() < RAW_EIGHTHS)
        scales.copy_(torch.where(is_sparse, -u, u))
        scaled = torch.where(is_sparse.unsqueeze(1), 0, rows) / u.float().nan_to_num(1).clamp_min(1e-30).unsqueeze(1)
        y = multiply_rows(scaled - self._on("mean", rows), self._matrix("fixed_encode", rows))
        y = y[:, self._own("order", rows)]
        levels = self._own("levels", rows)
        codes = (y / self._own("steps", rows) + levels / 2).floor().clamp_(min=0).minimum(levels - 1).to(torch.uint8)
        packed.zero_()
        for begin, end, first, last, nbits in self._parts():
            packed[:, begin:end] = pack(codes[:, first:last].contiguous(), nbits)
        packed.copy_(torch.where(is_sparse.unsqueeze(1), self._pack_largest(rows), packed))
        self._known.check_unchanged()

    def decode(self, rows, limit, scales, packed):
        self._known.check_unchanged()
        codes = packed.new_empty(packed.shape[0], len(self._order))
        for begin, end, first, last, nbits in self._parts():
            codes[:, first:last] = unpack(packed[:, begin:end].contiguous(), nbits, last - first)
        y = rows.new_zeros(rows.shape)
        values = (codes.float() + 0.5 - self._own("levels", rows) / 2) * self._own("steps", rows)
        y[:, self._own("order", rows)] = values
        dense = multiply_rows(y, self._matrix("fixed_decode", rows)).add_(self._on("mean", rows))
        u = scales.float().unsqueeze(1)
        is_sparse = torch.signbit(u) & ~u.isnan()
        rows.copy_(torch.where(is_sparse, self._unpack_largest(packed, rows), dense * u)).clamp_(-limit, limit)
        self._known.check_unchanged()

    def _parts(self):
        """(first byte, last byte, first component, last component, nbits) of each width; ends are exclusive."""
        begin = first = 0
        for nbits, group in self._groups:
            end, last = begin + packed_nbytes(len(group), nbits), first + len(group)
            yield begin, end, first, last, nbits
            begin, first = end, last

    def _num_largest(self, width: int) -> int:
        return min(self._row_nbytes // 4, width)

    def _pack_largest(self, rows: torch.Tensor) -> torch.Tensor:
        """Largest channels of each row, indices int16 then values bf16, in uint8 [N, P]."""
        count = self._num_largest(rows.shape[1])
        channels = rows.nan_to_num(0).abs().topk(count, dim=1).indices
        values = rows.gather(1, channels)
        largest = torch.finfo(torch.bfloat16).max
        halves = torch.cat(
            [
                channels.to(torch.int16).view(torch.uint8),
                values.clamp(-largest, largest).to(torch.bfloat16).contiguous().view(torch.uint8),
            ],
            1,
        )
        packed = halves.new_zeros(rows.shape[0], self._row_nbytes)
        packed[:, : halves.shape[1]] = halves
        return packed

    def _unpack_largest(self, packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        count = self._num_largest(rows.shape[1])
        # contiguous() would leave a single row as it is, whose stride cannot be viewed as two bytes
        copy = {"memory_format": torch.contiguous_format}
        channels = packed[:, : 2 * count].clone(**copy).view(torch.int16).long().clamp_(0, rows.shape[1] - 1)
        values = packed[:, 2 * count : 4 * count].clone(**copy).view(torch.bfloat16).float()
        return torch.zeros_like(rows).scatter_(1, channels, values)

    def _on(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return self._scratch.constant(name, getattr(self._content, name), like.device)

    def _matrix(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """As `multiply_rows` wants it."""
        dtype = torch.bfloat16 if like.device.type == "cpu" else torch.float32
        return self._scratch.constant(name, getattr(self._content, name), like.device, dtype)

    def _own(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return self._scratch.constant(f"own {name}", getattr(self, f"_{name}"), like.device)
