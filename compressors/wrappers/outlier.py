"""outlier: a few channels in fp16, the others through an inner codec.

Large language models have a few channels, the same for all tokens, whose values are tens to thousands of
times the others' (Dettmers et al. 2022, "LLM.int8()", section 4; Sun et al. 2024, "Massive activations"). One
of them in a group ruins the group's scale; sent apart, it costs 2 bytes a token.

`channels` and `calibration` say which:

    channels: [3, 17]                         these
    channels: 8, calibration: file.json       the link's first 8 in a file (see compressors.channels)
    channels: 8                               the 8 with the largest |x| in the frame, whose indices are sent
                                              with it; this looks at all tokens, so it is not causal

At least one channel is always left to the inner codec. fp16 saturates at +-65504; NaN and infinities keep
their place.

Side information: 2 bytes a token and channel, and 4 bytes a frame and channel where the frame chooses.

Payload: [indices int32 [C]], values fp16 [N, C], the inner codec's bytes of the other channels in order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from compressors.base import CorruptPayload, LinkInfo, Payload
from compressors.bitpack import Section, sections_nbytes
from compressors.channels import channels_from_file, check_channels
from compressors.options import check_int, option_error
from compressors.saturation import saturating_cast, saturating_copy_
from compressors.wrapper import InnerSpec, Wrapper

__all__ = ["Outlier"]


class Outlier(Wrapper):
    """`channels` in fp16, the rest to `inner`."""

    name = "outlier"

    def __init__(
        self,
        *,
        inner: InnerSpec,
        channels: int | Sequence[int],
        calibration: str | None = None,
        link: LinkInfo | None = None,
    ) -> None:
        self.calibration = calibration
        self.channels: int | list[int]
        self._fixed: list[int] | None = None  # else each frame chooses
        if isinstance(channels, int):
            self.channels = self._num_channels = check_int(self.name, "channels", channels, 1, 2**31 - 1)
            if calibration:
                self._fixed = channels_from_file(self.name, calibration, link)[:channels]
        elif calibration:
            raise option_error(self.name, "channels", channels, "a number, when `calibration` lists them")
        else:
            self.channels = self._fixed = check_channels(self.name, "channels", channels, link)
        if self._fixed is not None:
            self._num_channels = len(self._fixed)
        inner_link = link and dataclasses.replace(link, hidden_size=max(link.hidden_size - self._num_channels, 1))
        super().__init__(inner=inner, inner_link=inner_link, link=link)
        self._places: dict[tuple[int, int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}  # of fixed channels
        self.causal = self.inner.causal and self._fixed is not None
        self.frame_invariant = self.inner.frame_invariant and self._fixed is not None

    def format_config(self) -> dict[str, Any]:
        """The channels stand for the calibration file: the bytes depend on them, not on its path."""
        config = super().format_config() | {"calibration": None}
        return config | {"channels": sorted(self._fixed)} if self._fixed is not None else config

    def max_nbytes(self, shape: Sequence[int]) -> int:
        inner_shape, sections = self._layout(shape)
        return sections_nbytes(*sections) + self.inner.max_nbytes(inner_shape)

    def _layout(self, shape: Sequence[int]) -> tuple[tuple[int, ...], list[Section]]:
        """(shape of what goes to the inner codec, own sections)."""
        width = shape[-1]
        if self._fixed is not None and max(self._fixed) >= width:
            raise option_error(self.name, "channels", self._fixed, f"channels below this width, {width}")
        num_channels = min(self._num_channels, width - 1)
        sections: list[Section] = [(torch.float16, (math.prod(shape[:-1]), num_channels))]
        if self._fixed is None:
            sections.insert(0, (torch.int32, (num_channels,)))
        return (*shape[:-1], width - num_channels), sections

    @torch.no_grad()
    def compress(self, x: torch.Tensor, **side: Any) -> Payload:
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        inner_shape, sections = self._layout(x.shape)
        num_channels = x.shape[-1] - inner_shape[-1]
        if self._fixed is None:
            chosen = _largest(rows, num_channels)
            others = _complement(chosen, x.shape[-1])
        else:
            chosen, others = self._fixed_places(num_channels, x.shape[-1], x.device)
        inner = self.inner.compress(rows.index_select(1, others).view(inner_shape), **side)
        payload, (*indices, values) = self._join(x.shape, inner, sections)
        saturating_copy_(values, rows.index_select(1, chosen))
        if indices:
            indices[0].copy_(chosen)
        return payload

    @torch.no_grad()
    def decompress(self, payload: Payload, device: torch.device, dtype: torch.dtype, **side: Any) -> torch.Tensor:
        width = payload.shape[-1]
        inner_shape, sections = self._layout(payload.shape)
        inner, (*indices, values) = self._part(payload, inner_shape, device, sections)
        if indices:
            chosen = self._received(indices[0], width)
            others = _complement(chosen, width)
        else:
            chosen, others = self._fixed_places(values.shape[1], width, values.device)
        x = torch.empty(values.shape[0], width, dtype=dtype, device=device)
        rest = self.inner.decompress(inner, device, dtype, **side)
        x.index_copy_(1, others, rest.view(values.shape[0], inner_shape[-1]))
        x.index_copy_(1, chosen, saturating_cast(values, dtype))
        return x.view(payload.shape)

    def _fixed_places(self, num_channels: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(fixed channels, the others), ascending int64 indices on `device`, made once for each width."""
        key = num_channels, width, device
        if key not in self._places:
            assert self._fixed is not None
            chosen = torch.tensor(sorted(self._fixed[:num_channels]), dtype=torch.int64).to(device)
            self._places[key] = chosen, _complement(chosen, width)
        return self._places[key]

    def _received(self, indices: torch.Tensor, width: int) -> torch.Tensor:
        """Channel indices from a payload. Bytes in host memory are checked, others forced into range: a check
        would have to wait for the device."""
        if indices.device.type == "cpu" and indices.numel():
            ascending = bool((indices[1:] > indices[:-1]).all())
            if not ascending or not 0 <= int(indices[0]) <= int(indices[-1]) < width:
                raise CorruptPayload(f"outlier channels {indices.tolist()} are not ascending below {width}")
        return indices.long().clamp_(0, width - 1)


def _largest(rows: torch.Tensor, num_channels: int) -> torch.Tensor:
    """The channels of largest magnitude in `rows` [N, H], ascending int64 indices."""
    if rows.shape[0] == 0:
        return torch.arange(num_channels, device=rows.device)
    return rows.abs().amax(0).float().topk(num_channels).indices.sort().values


def _complement(chosen: torch.Tensor, width: int) -> torch.Tensor:
    """The width - C indices that are not among the C `chosen`, ascending."""
    is_chosen = torch.zeros(width, dtype=torch.uint8, device=chosen.device).index_fill_(0, chosen, 1)
    if chosen.device.type == "cpu":
        return (is_chosen == 0).nonzero().squeeze(1)
    return is_chosen.argsort(stable=True)[: width - chosen.numel()]
