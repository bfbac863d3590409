"""What the links of a job may carry: derived alike on both ends, before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from compressors import Compressor
from pipeline.comm.link import HiddenSpec, LinkSpec, ResultSpec
from pipeline.comm.wire import WireFormat
from pipeline.config.schema import RunConfig
from pipeline.data.windows import MicroBatch
from pipeline.partition.passes import Pass, PassKind
from pipeline.partition.plan import Plan

__all__ = ["Workload", "generation_workload", "gradient_specs", "id_nbytes", "link_specs"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Which passes a job may make: SCORE passes of `microbatches`, others with so many rows and tokens in all."""

    microbatches: Sequence[MicroBatch] = ()
    max_rows: int = 0
    max_tokens: int = 0


def generation_workload(config: RunConfig, model_config: Any) -> Workload:
    """One row a slot; a chunk of prompts, or one token of every slot and the drafts behind it.

    Two tokens are the least that tells of one. Raises ConfigError for slots that are too long.
    """
    generation = config.generation
    length = generation.slot_length(getattr(model_config, "max_position_embeddings", None))
    chunk = min(max(generation.prefill_chunk, 2) if generation.prefill_chunk else length, length)
    num_drafts = generation.draft_depth if generation.draft else 0
    max_decoded = generation.max_slots * min(1 + num_drafts, length)
    return Workload(max_rows=generation.max_slots, max_tokens=max(chunk, max_decoded))


def link_specs(
    plan: Plan,
    codecs: Mapping[int, Compressor],
    workload: Workload,
    *,
    hidden_size: int,
    dtype: torch.dtype,
    decoding: Mapping[int, Compressor] = MappingProxyType({}),
    id_nbytes: int = 4,
    result_bound: Callable[[Pass], int] | None = None,
    max_result_nbytes: int = 0,
) -> dict[int, LinkSpec]:
    """By link index as `codecs`, and of the link of results, which is there where the head is not on node 0.

    `decoding` are the codecs of DECODE passes, where they are others. A result has at most `result_bound(pass)` bytes.
    """
    shapes = [m.shape for m in workload.microbatches]
    specs: dict[int, LinkSpec] = {}
    for index, codec in sorted(codecs.items()):
        both = (codec, decoding.get(index, codec))

        def bound(kind: PassKind, shape: tuple[int, ...], both: tuple[Compressor, Compressor] = both) -> int:
            return both[kind is PassKind.DECODE].max_nbytes(shape)

        specs[index] = HiddenSpec(
            name=plan.links[index].name,
            wire=WireFormat(
                link_index=index,
                num_trail=index,
                codec_ids=tuple(dict.fromkeys(codec.codec_id() for codec in both)),
                dtype=dtype,
                id_nbytes=id_nbytes,
            ),
            hidden_size=hidden_size,
            bound=bound,
            microbatch_shapes=shapes,
            max_rows=workload.max_rows,
            max_tokens=workload.max_tokens,
        )
    if plan.last_node != 0:
        assert result_bound is not None
        num_links = len(plan.links)
        specs[num_links] = ResultSpec(
            name=plan.chain_names[num_links],
            wire=WireFormat(link_index=num_links, num_trail=num_links, codec_ids=()),
            bound=result_bound,
            max_nbytes=max_result_nbytes,
            max_rows=workload.max_rows,
        )
    return specs


def id_nbytes(vocab_size: int) -> int:
    """Bytes that a token id takes in a frame."""
    return max(1, ((vocab_size - 1).bit_length() + 7) // 8)


def gradient_specs(
    plan: Plan, microbatches: Sequence[MicroBatch], *, hidden_size: int, dtype: torch.dtype
) -> dict[int, LinkSpec]:
    """Raw hidden states on the links, then raw float32 gradients back, in the order in which a pass takes them."""
    shapes = [m.shape for m in microbatches]
    there = [(f"raw:{link.name}", dtype) for link in plan.links]
    back = [(f"gradient:{link.name}", torch.float32) for link in reversed(plan.links)]
    specs: dict[int, LinkSpec] = {}
    for index, (name, its_dtype) in enumerate([*there, *back]):

        def bound(kind: PassKind, shape: tuple[int, ...], itemsize: int = its_dtype.itemsize) -> int:
            return itemsize * math.prod(shape)

        specs[index] = HiddenSpec(
            name=name,
            wire=WireFormat(link_index=index, num_trail=0, codec_ids=(), dtype=its_dtype),
            hidden_size=hidden_size,
            bound=bound,
            microbatch_shapes=shapes,
        )
    return specs
