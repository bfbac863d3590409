"""What a rank computes of a pass: decode, forward, encode; at the end of the chain, what the head makes of it.

Knows stages, codecs and metrics by their place in the chain; which of them this rank holds is the plan's business. Link
i leads from stage i to stage i + 1; the one behind the last stage, where there is one, carries results to node 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from compressors.base import Compressor, Payload
from pipeline.comm.link import Frame
from pipeline.importance.metrics import AttentionMetric, Metric
from pipeline.models.attention import Attention, AttentionReader
from pipeline.models.stage import Stage
from pipeline.partition.passes import Pass, PassKind
from pipeline.partition.plan import Plan
from pipeline.runtime.codecs import CodecFacts, LinkCodecs, naming
from pipeline.runtime.engine import Departure, Entry, Result
from pipeline.runtime.head import Head
from pipeline.runtime.stage_times import StageTimes
from pipeline.runtime.timing import wait_for_stream

__all__ = ["EndCodecs", "Probe", "StageWorker", "Tap"]

# Called at the sending end of a link: micro-batch, hidden states [B, T, H], what the codec made of them, token ids.
Probe = Callable[[int, torch.Tensor, Payload, torch.Tensor | None], None]

# Called once a stage has computed a pass over slots: the pass, its token ids int64 [B, T], and hidden states [B, T, H]
# on the stage's device, in inference mode.
Tap = Callable[[Pass, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class EndCodecs:
    """The codec objects at this rank's link ends, by link index.

    `metrics` compute the importance of tokens for encoders that need it. `decoding` are those for DECODE passes, where
    they are others. `ids_onward` has the links over which generation sends token ids along, because a codec or head
    further on needs them.
    """

    encoders: Mapping[int, Compressor]
    decoders: Mapping[int, Compressor]
    metrics: Mapping[int, Metric] = field(default_factory=dict)
    decoding: EndCodecs | None = None
    ids_onward: frozenset[int] = frozenset()

    @classmethod
    def make(
        cls,
        plan: Plan,
        codecs: LinkCodecs,
        decode_codecs: LinkCodecs,
        metrics: Mapping[int, Metric] = MappingProxyType({}),
    ) -> EndCodecs:
        """Of a job whose DECODE passes have `decode_codecs`, which may be `codecs`."""
        decoding = None
        if decode_codecs is not codecs:
            decoding = cls(encoders=decode_codecs.encoders, decoders=decode_codecs.decoders)
        facts = [*enumerate(codecs.facts), *enumerate(decode_codecs.facts)]
        return cls(
            encoders=codecs.encoders,
            decoders=codecs.decoders,
            metrics=metrics,
            decoding=decoding,
            ids_onward=_ids_onward(plan, facts),
        )

    def of(self, kind: PassKind) -> EndCodecs:
        return self.decoding if kind is PassKind.DECODE and self.decoding is not None else self


class StageWorker:
    """One rank's share of all passes (`engine.Worker`).

    Args:
        stages: this rank's stages by stage index.
        codecs: of this rank's link ends.
        head: what comes of the last stage's output, and of result frames; every rank has one, with the tokens of the
            micro-batches that SCORE passes name.
        dtype: of the hidden states.
        probes: told of what this rank sends, by link index, outside the phases that are timed.
        slowdown: of all that this rank computes (`StageTimes`).

    `last_tokens` has the hidden states [1, 1, H] of the last token that passed each link end of this rank.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        codecs: EndCodecs,
        head: Head,
        *,
        dtype: torch.dtype,
        probes: Mapping[int, Probe] = MappingProxyType({}),
        slowdown: float = 1.0,
    ) -> None:
        self.times = {index: StageTimes(slowdown=slowdown) for index in stages}
        self.last_tokens: dict[int, torch.Tensor] = {}
        self._stages, self._codecs, self._head, self._dtype, self._probes = stages, codecs, head, dtype, probes
        self._taps: list[tuple[Tap, Tap]] = []

    def watch(self, sent: Tap, returned: Tap) -> None:
        """On rank 0: tell `sent` of what the first stage makes of every pass over slots, and `returned` of what has
        come into the last stage, if it is on this rank.
        """
        self._taps.append((sent, returned))

    def place(self, link_index: int | None, work: Pass) -> str:
        return f"stage {0 if link_index is None else link_index + 1}, {work}"

    @torch.inference_mode()
    def enter(self, entry: Entry) -> Departure | Result:
        return self._forward(0, entry.work, entry.token_ids, (), entry.token_ids, entry.note)

    @torch.inference_mode()
    def unpack(self, link_index: int, frame: Frame) -> torch.Tensor:
        assert frame.payload is not None
        index, payload = link_index + 1, frame.payload
        if index not in self._stages:  # a result, which node 0 takes as it is
            return payload.data.clone()
        stage, times = self._stages[index], self.times[index]
        decoder = self._codecs.of(frame.work.kind).decoders[link_index]
        with times.measure("decompress", stage.device):
            on_device = Payload(payload.data.to(stage.device), payload.shape, payload.meta)
            side = {"token_ids": self._ids(frame.work, frame.token_ids)} if "token_ids" in decoder.decoder_needs else {}
            with naming(decoder):
                hidden_states = decoder.decompress(on_device, stage.device, self._dtype, **side)
        if hidden_states.shape != payload.shape or hidden_states.dtype != self._dtype:
            raise ValueError(
                f"codec {decoder.name} decompressed to {hidden_states.dtype} "
                f"{tuple(hidden_states.shape)}, expected {self._dtype} {payload.shape}"
            )
        self.last_tokens[link_index] = hidden_states[:1, -1:].clone()
        return hidden_states

    @torch.inference_mode()
    def step(self, link_index: int, frame: Frame, inputs: torch.Tensor, entry: Entry | None) -> Departure | Result:
        if link_index + 1 not in self._stages:
            return Result(self._head.from_payload(frame.work, inputs), frame.trail[:-1])
        ids, note = self._ids(frame.work, frame.token_ids), frame.note
        if entry is not None:
            ids, note = entry.token_ids, entry.note
        return self._forward(link_index + 1, frame.work, inputs, frame.trail, ids, note)

    def spare(self, link_index: int, frame: Frame) -> Result:
        return Result(None, frame.trail if link_index + 1 in self._stages else frame.trail[:-1])

    def drop(self, link_index: int | None, work: Pass) -> None:
        # Other stages of this rank are left alone: those before may have gone on with the slot's next sequence.
        stage = self._stages.get(0 if link_index is None else link_index + 1)
        if stage is None or stage.slots is None:
            return
        for row in work.rows:
            kept = row.start if row.from_slot is None else 0  # the copy may not have been made
            stage.slots.crop(row.slot, min(kept, stage.slots.length(row.slot)))

    def waited(self, link_index: int, seconds: float, *, sending: bool) -> None:
        times = self.times.get(link_index + (not sending))
        if times is not None:
            times.wait_s += seconds

    def _ids(self, work: Pass, carried: Any) -> torch.Tensor | None:
        """Token ids int64 [B, T] of a pass, where this rank knows them."""
        if work.kind is PassKind.SCORE:
            assert work.microbatch_index is not None
            return self._head.tokens.input_ids(work.microbatch_index)
        return None if carried is None else torch.from_numpy(carried)

    def _forward(
        self,
        index: int,
        work: Pass,
        inputs: torch.Tensor,
        trail: tuple[int, ...],
        ids: torch.Tensor | None,
        note: bytes,
    ) -> Departure | Result:
        stage, times = self._stages[index], self.times[index]
        with times.measure("compute", stage.device):
            output = stage.forward(inputs, self._attention_reader(index), rows=work.rows or None)
        if self._taps and work.rows and ids is not None:
            self._show(stage, work, ids, inputs, output)
        if not stage.plan.is_last:
            return self._encode(index, work, output, trail, ids, note)
        with times.measure("head" if work.samples else "compute", stage.device):
            value = self._head.results(work, stage, output, ids, note)
        if index == self._head.result_link:
            return Departure(link_index=index, payload=self._head.to_payload(value), trail=trail)
        return Result(value, trail)

    def _show(
        self, stage: Stage, work: Pass, ids: torch.Tensor, inputs: torch.Tensor, output: torch.Tensor
    ) -> None:
        """To those that watch; what they raise fails the pass, or they would go on with what they have missed."""
        for sent, returned in self._taps:
            if stage.plan.is_first:
                sent(work, ids, output)
            elif stage.plan.is_last:
                returned(work, ids, inputs)

    def _encode(
        self,
        index: int,
        work: Pass,
        hidden_states: torch.Tensor,
        trail: tuple[int, ...],
        ids: torch.Tensor | None,
        note: bytes,
    ) -> Departure:
        codec, stage, times = self._codecs.of(work.kind).encoders[index], self._stages[index], self.times[index]
        side = {}
        with times.measure("importance", stage.device):
            if "token_ids" in codec.needs:
                side["token_ids"] = ids
            if index in self._codecs.metrics:
                assert work.microbatch_index is not None
                side["importance"] = self._codecs.metrics[index].importance(hidden_states, work.microbatch_index)
        with times.measure("compress", stage.device):
            with naming(codec):
                payload = codec.compress(hidden_states, **side)
        wait_for_stream(stage.device)  # else the copy to the host counts the GPU's work as waiting
        if index in self._probes and work.microbatch_index is not None:
            with times.measure("measure", stage.device):
                self._probes[index](work.microbatch_index, hidden_states, payload, ids)
        self.last_tokens[index] = hidden_states[:1, -1:].clone()
        carried = None
        if work.kind is not PassKind.SCORE and index in self._codecs.ids_onward:
            assert ids is not None
            carried = ids.numpy()
        note = note if self._head.result_link is not None else b""  # else it never left node 0
        return Departure(link_index=index, payload=payload, trail=trail, token_ids=carried, note=note)

    def _attention_reader(self, index: int) -> AttentionReader | None:
        """What takes in the attention of a stage, where the link behind it has a metric that reads it."""
        metric, times, device = self._codecs.metrics.get(index), self.times[index], self._stages[index].device
        if not isinstance(metric, AttentionMetric):
            return None

        def read(stage_layer: int, attention: Attention) -> None:
            with times.measure("importance", device, within="compute"):
                metric.read(stage_layer, attention)

        return read


def _ids_onward(plan: Plan, facts: Sequence[tuple[int, CodecFacts]]) -> frozenset[int]:
    """Links that token ids cross: those before a head on another node, or before a codec that takes ids.

    `facts` are those of the codecs, with the link that each is on.
    """
    if plan.last_node != 0:
        return frozenset(range(len(plan.links)))
    last = -1
    for index, codec in facts:
        if "token_ids" in codec.decoder_needs:
            last = max(last, index)
        elif "token_ids" in codec.needs:
            last = max(last, index - 1)
    return frozenset(range(last + 1))
