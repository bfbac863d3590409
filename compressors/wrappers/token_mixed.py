"""token_mixed, token_graded: important tokens through one codec, the others through cheaper ones.

    token_mixed(metric=column, fraction=0.25, high=int8, low=int4)
    token_graded(metric=norm, fractions=[0.1, 0.4], codecs=[fp16, int8, int4])

In every row (sequence) of T tokens, those with the largest importance form level 0, the next ones level 1, and
so on: with cumulative fractions P_i, levels 0 to i hold round(P_i T) tokens together. Each level goes, in the
order of its tokens, through its own codec. The importance is a side input of the sender, which the pipeline
computes by the `metric` named here; among equal values earlier tokens rank higher, and NaN ranks lowest.

The receiver knows how many tokens each level has, and reads from the payload which they are. What decides over a
token's bits is its rank in the row, so every metric that looks at content makes later tokens matter to earlier
ones, the norm of single tokens too: such a codec is not causal. With a metric of places alone (random, uniform)
the choice depends on T and on nothing else. Neither is frame-invariant, as a frame's tokens are ranked among
themselves; where one level has all tokens, nothing is ranked.

Side information: ceil(log2 n) bits per token for n levels, if more than one has tokens, and 8 bytes for each
codec whose size depends on the values.
Payload: the levels of each row's tokens (packed by `bitpack`), the sizes (int64) of codecs without a fixed size,
the codecs' bytes in the order of the levels; a level without tokens takes none.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compressors.base import Compressor, CorruptPayload, LinkInfo, Payload
from compressors.bitpack import Section, pack, packed_nbytes, sections_nbytes, split_bytes, unpack
from compressors.options import option_error
from compressors.registry import make_compressor
from compressors.rows import Scratch
from compressors.wrapper import InnerSpec

__all__ = ["CAUSAL_METRICS", "TokenGraded", "TokenMixed"]

Level = tuple[Compressor, tuple[int, int, int]]  # a codec and the shape [B, n, H] that goes through it

# Metrics that look at windows and positions only. All others see content, and so later tokens.
CAUSAL_METRICS = ("random", "uniform")


class _TokenLevels(Compressor):
    """What both names share. A subclass stores its options and calls `_set_levels`."""

    def _set_levels(self, metric: str, levels: Mapping[str, Compressor], fractions: Sequence[float]) -> None:
        """`levels` are codecs by the option that they came from, `fractions` of all but the last."""
        if not isinstance(metric, str):
            raise option_error(self.name, "metric", metric, "the name of an importance metric, such as column")
        self.importance_metric = metric
        self._levels = list(levels.values())
        self._cumulative = [sum(fractions[: i + 1]) for i in range(len(fractions))] + [1.0]
        needs = {"importance"}
        for option, codec in levels.items():
            if codec.importance_metric not in (None, metric):
                allowed = f"codecs by the same metric {metric!r}, not {codec.importance_metric!r}"
                raise option_error(self.name, option, codec.name, allowed)
            needs |= set(codec.needs)
        self.needs = tuple(sorted(needs))
        self.decoder_needs = tuple(sorted({name for codec in self._levels for name in codec.decoder_needs}))
        chooses = sum(end > start for start, end in itertools.pairwise([0.0, *self._cumulative])) > 1
        by_place = metric in CAUSAL_METRICS or not chooses
        self.causal = by_place and all(codec.causal for codec in self._levels)
        self.frame_invariant = not chooses and all(codec.frame_invariant for codec in self._levels)
        self.fixed_size = all(codec.fixed_size for codec in self._levels)
        self._nbits = (len(self._levels) - 1).bit_length()
        self._scratch = Scratch()

    def _counts(self, num_tokens: int) -> list[int]:
        """Tokens of each level in a row of T."""
        bounds = [0, *(min(int(p * num_tokens + 0.5), num_tokens) for p in self._cumulative)]
        return [end - start for start, end in itertools.pairwise(bounds)]

    def _layout(self, shape: Sequence[int]) -> tuple[list[Section], list[Level]]:
        """Sections in front and the levels that have tokens, for hidden states [B, T, H]."""
        batch, num_tokens, width = shape
        counts = self._counts(num_tokens)
        parts = [(codec, (batch, n, width)) for codec, n in zip(self._levels, counts, strict=True) if batch * n]
        num_variable = sum(not codec.fixed_size for codec, _ in parts)
        codes = (batch, packed_nbytes(num_tokens, self._nbits)) if len(parts) > 1 else (0,)
        return [(torch.uint8, codes), (torch.uint8, (8 * num_variable,))], parts

    def max_nbytes(self, shape: Sequence[int]) -> int:
        sections, parts = self._layout(shape)
        return sections_nbytes(*sections) + sum(codec.max_nbytes(part) for codec, part in parts)

    @torch.no_grad()
    def compress(self, x: torch.Tensor, *, importance: torch.Tensor | None = None, **side: Any) -> Payload:
        if importance is None or importance.shape != x.shape[:2]:
            got = None if importance is None else tuple(importance.shape)
            raise ValueError(f"{self.name}: importance is {got}, expected {tuple(x.shape[:2])}")
        batch, num_tokens, width = x.shape
        sections, parts = self._layout(x.shape)
        start = sections_nbytes(*sections)
        data = self._scratch.get("data", (self.max_nbytes(x.shape),), torch.uint8, x.device)
        codes_section, sizes_section = split_bytes(data[:start], *sections)
        codes = self._codes(importance.to(x.device))
        if codes_section.numel():
            codes_section.copy_(pack(codes, self._nbits))
        side = {name: value.to(x.device) for name, value in {**side, "importance": importance}.items()}
        sizes = []
        for (codec, shape), index in zip(parts, self._split(codes), strict=True):
            part = x.gather(1, index[..., None].expand(shape))
            payload = codec.compress(part, **{name: side[name].gather(1, index) for name in codec.needs})
            if payload.meta:
                raise ValueError(f"{self.name}: codec {codec.name} writes meta, which has no place here")
            end = start + payload.data.numel()
            data[start:end].copy_(payload.data)
            start = end
            if not codec.fixed_size:
                sizes.append(payload.data.numel())
        if sizes:
            sizes_section.copy_(torch.tensor(sizes).view(torch.uint8))
        return Payload(data[:start], tuple(x.shape))

    @torch.no_grad()
    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype, **side: Any) -> torch.Tensor:
        data = self._data_without_meta(payload).to(device)
        sections, parts = self._layout(payload.shape)
        start = sections_nbytes(*sections)
        if data.numel() < start:
            raise CorruptPayload(f"payload has {data.numel()} bytes, {self.name} needs {start} and more")
        codes_section, sizes_section = split_bytes(data[:start], *sections)
        sizes = self._sizes(parts, sizes_section, data.numel() - start)
        codes = self._received_codes(codes_section, payload.shape)
        x = torch.empty(payload.shape, dtype=dtype, device=device)
        side = {name: value.to(device) for name, value in side.items()}
        for (codec, shape), index, nbytes in zip(parts, self._split(codes), sizes, strict=True):
            part_side = {name: side[name].gather(1, index) for name in codec.decoder_needs}
            part = codec.decompress(Payload(data[start : start + nbytes], shape), device, dtype, **part_side)
            x.scatter_(1, index[..., None].expand(shape), part)
            start += nbytes
        return x

    def _codes(self, importance: torch.Tensor) -> torch.Tensor:
        """Level of each token, uint8 [B, T]."""
        num_tokens = importance.shape[1]
        ranked = importance.float().nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
        return torch.empty_like(ranked, dtype=torch.uint8).scatter_(1, ranked, self._by_rank(num_tokens, ranked))

    def _by_rank(self, num_tokens: int, like: torch.Tensor) -> torch.Tensor:
        """Levels of the tokens from the most important to the least, uint8 [B, T]."""
        levels = torch.empty(num_tokens, dtype=torch.uint8, device=like.device)
        for level, part in enumerate(levels.split(self._counts(num_tokens))):
            part.fill_(level)
        return levels.expand(like.shape)

    def _split(self, codes: torch.Tensor) -> list[torch.Tensor]:
        """Positions int64 [B, n] of each level that has tokens, ascending."""
        order = codes.argsort(dim=1, stable=True)
        return [part for part in order.split(self._counts(codes.shape[1]), dim=1) if part.numel()]

    def _received_codes(self, section: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Levels uint8 [B, T] from a payload. Bytes in host memory are checked; elsewhere a check would wait for
        the device, and `_split` makes some choice of the right size from any bytes."""
        batch, num_tokens, _ = shape
        if not section.numel():
            return torch.zeros(batch, num_tokens, dtype=torch.uint8, device=section.device)
        codes = unpack(section, self._nbits, num_tokens)
        if codes.device.type == "cpu":
            expected = self._by_rank(num_tokens, codes)
            if not torch.equal(codes.sort(dim=1).values, expected):
                counts = self._counts(num_tokens)
                raise CorruptPayload(f"{self.name}: the levels of a row do not have {counts} tokens")
        return codes

    def _sizes(self, parts: Sequence[Level], section: torch.Tensor, total: int) -> list[int]:
        """Bytes of each level. Raises CorruptPayload unless they are possible and add up to `total`."""
        told = iter(section.clone().view(torch.int64).tolist() if section.numel() else [])
        sizes = []
        for codec, shape in parts:
            bound = codec.max_nbytes(shape)
            nbytes = bound if codec.fixed_size else next(told)
            if not 0 <= nbytes <= bound:
                told_of = f"{nbytes} bytes for {codec.name}"
                raise CorruptPayload(f"{self.name}: {told_of}, at most {bound} are possible")
            sizes.append(nbytes)
        if sum(sizes) != total:
            raise CorruptPayload(f"{self.name}: {total} bytes behind the levels, expected {sum(sizes)}")
        return sizes


class TokenMixed(_TokenLevels):
    """The `fraction` of most important tokens through `high`, the others through `low`."""

    name = "token_mixed"

    def __init__(
        self,
        *,
        metric: str,
        fraction: float,
        high: InnerSpec = "int8",
        low: InnerSpec = "int4",
        link: LinkInfo | None = None,
    ) -> None:
        super().__init__(link=link)
        self.metric = metric
        self.fraction = _check_fraction(self.name, "fraction", fraction)
        self.high, self.low = make_compressor(high, link), make_compressor(low, link)
        self._set_levels(metric, {"high": self.high, "low": self.low}, [self.fraction])


class TokenGraded(_TokenLevels):
    """The `fractions[0]` of most important tokens through `codecs[0]`, the next `fractions[1]` through
    `codecs[1]`, ...; what is left through the last one."""

    name = "token_graded"

    def __init__(
        self,
        *,
        metric: str,
        fractions: Sequence[float],
        codecs: Sequence[InnerSpec],
        link: LinkInfo | None = None,
    ) -> None:
        super().__init__(link=link)
        if isinstance(codecs, str) or not isinstance(codecs, Sequence) or not 2 <= len(codecs) <= 16:
            raise option_error(self.name, "codecs", codecs, "a list of 2 to 16 codecs, such as [fp16, int8, int4]")
        if not isinstance(fractions, Sequence) or len(fractions) != len(codecs) - 1:
            allowed = f"a list of {len(codecs) - 1}, one less than codecs"
            raise option_error(self.name, "fractions", fractions, allowed)
        self.metric = metric
        self.fractions = [_check_fraction(self.name, "fractions", fraction) for fraction in fractions]
        if sum(self.fractions) > 1 + 1e-9:
            raise option_error(self.name, "fractions", fractions, "fractions that add up to at most 1")
        self.codecs = [make_compressor(codec, link) for codec in codecs]
        named = {f"codecs[{i}]": codec for i, codec in enumerate(self.codecs)}
        self._set_levels(metric, named, self.fractions)


def _check_fraction(codec: str, option: str, got: Any) -> float:
    if isinstance(got, bool) or not isinstance(got, (int, float)) or not 0 <= got <= 1:
        raise option_error(codec, option, got, "a number from 0 to 1")
    return float(got)
