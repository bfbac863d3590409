"""Wrapper: the frame of codecs that stand in front of another one (hadamard, outlier, topk, zstd).

The option `inner` is a codec spec. A wrapper writes sections of its own in front of the inner codec's bytes
and hands the inner codec's `meta` and, at both ends, side inputs through; by default it is causal, frame-invariant and
of fixed size if the inner codec is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compressors.base import Compressor, CorruptPayload, LinkInfo, Payload
from compressors.bitpack import Section, sections_nbytes, split_bytes
from compressors.registry import make_compressor
from compressors.rows import Scratch

__all__ = ["Wrapper"]

InnerSpec = str | Mapping[str, Any] | Compressor


class Wrapper(Compressor):
    """A codec that hands (part of) its work to `self.inner`."""

    def __init__(self, *, inner: InnerSpec, inner_link: LinkInfo | None, link: LinkInfo | None) -> None:
        super().__init__(link=link)
        self.inner = make_compressor(inner, inner_link)
        self.causal, self.fixed_size = self.inner.causal, self.inner.fixed_size
        self.frame_invariant = self.inner.frame_invariant
        self.needs, self.importance_metric = self.inner.needs, self.inner.importance_metric
        self.decoder_needs = self.inner.decoder_needs
        self._scratch = Scratch()

    def _join(self, shape: Sequence[int], inner: Payload, sections: Sequence[Section]) -> tuple[Payload, list]:
        """(payload of `shape` with `sections` before the inner bytes, those sections, to be filled)."""
        start = sections_nbytes(*sections)
        data = self._scratch.get("data", (start + inner.data.numel(),), torch.uint8, inner.data.device)
        data[start:].copy_(inner.data)
        return Payload(data, tuple(shape), inner.meta), split_bytes(data[:start], *sections)

    def _part(
        self, payload: Payload, inner_shape: Sequence[int], device: torch.device, sections: Sequence[Section]
    ) -> tuple[Payload, list[torch.Tensor]]:
        """Inverse of `_join`: (inner payload of `inner_shape`, sections), on `device`."""
        start = sections_nbytes(*sections)
        if payload.data.numel() < start:
            raise CorruptPayload(f"payload has {payload.data.numel()} bytes, {self.name} needs {start} and more")
        data = payload.data.to(device)
        return Payload(data[start:], tuple(inner_shape), payload.meta), split_bytes(data[:start], *sections)
