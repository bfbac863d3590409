"""Execute one rank's actions: receive, decompress, forward, compress, send.

The runner knows stages, codecs and the two ends of each link by their place in the chain; which of them this rank
holds, and in which order they act, is the plan's and the schedule's business. Link i leads from stage i to stage
i + 1; the link after the last stage carries losses back to node 0 where that is another node.
"""

from __future__ import annotations

import math
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch

from compressors.base import Compressor, Payload
from pipeline.comm.link import FrameReceiver, FrameSender
from pipeline.comm.mailbox import LinkError
from pipeline.comm.watchdog import PipelineError, tell
from pipeline.comm.wire import BadFrame, RemoteError
from pipeline.importance.metrics import AttentionMetric, Metric
from pipeline.models.attention import Attention, AttentionReader
from pipeline.models.stage import Scores, Stage, TokenWindows
from pipeline.partition.schedule import Action, ActionKind
from pipeline.records.store import RecordError
from pipeline.runtime.codecs import cause_in_words, naming
from pipeline.runtime.timing import wait_for_stream

__all__ = ["OnResult", "Probe", "Report", "Runner", "StageError", "StageTimes", "describe", "execute"]

# Called on node 0 once per micro-batch, in order: index, scores, payload bytes of each link.
OnResult = Callable[[int, Scores, tuple[int, ...]], None]
# Called at the sending end of a link: micro-batch, hidden states [B, T, H], what the codec made of them.
Probe = Callable[[int, torch.Tensor, Payload], None]


class Report(Protocol):
    """Takes down what this rank is doing (`Control.report`)."""

    def __call__(self, where: str, *, waiting: bool = False) -> str:
        """`waiting` for another rank; returns `where` with the rank's name."""


class StageError(PipelineError):
    """A stage or codec raised on some rank, which has logged the traceback. The text names rank and position.

    The links have been drained: the ranks may go on with another evaluation.
    """

    names_place = True


@dataclass
class StageTimes:
    """Seconds that one stage spent, by phase.

    `wait` is for frames, their framing and checksums included, by the host's clock. On a GPU the other phases are read
    from events of its stream. `importance` is what side inputs take, apart from `compute` although it interrupts that;
    `measure` is for the record alone.
    """

    compute_s: float = 0.0
    importance_s: float = 0.0
    compress_s: float = 0.0
    decompress_s: float = 0.0
    wait_s: float = 0.0
    measure_s: float = 0.0
    _events: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list, repr=False)

    @contextmanager
    def measure(self, phase: str, device: torch.device, *, within: str | None = None) -> Iterator[None]:
        """Add the enclosed work to `phase` ("compute", ...), and not to the phase `within` which it happens.

        GPU events are read later, by `as_dict`.
        """
        if device.type == "cuda" and phase != "wait":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(torch.cuda.current_stream(device))
            yield
            end.record(torch.cuda.current_stream(device))
            self._events.append((phase, within, start, end))
        else:
            start_s = time.perf_counter()
            yield
            self._add(phase, within, time.perf_counter() - start_s)

    def as_dict(self) -> dict[str, float]:
        for phase, within, start, end in self._events:
            end.synchronize()
            self._add(phase, within, start.elapsed_time(end) / 1e3)
        self._events.clear()
        names = ("compute_s", "importance_s", "compress_s", "decompress_s", "wait_s", "measure_s")
        return {name: getattr(self, name) for name in names}

    def _add(self, phase: str, within: str | None, seconds: float) -> None:
        setattr(self, f"{phase}_s", getattr(self, f"{phase}_s") + seconds)
        if within is not None:
            self._add(within, None, -seconds)


def execute(
    actions: Sequence[Action],
    perform: Callable[[Action], None],
    *,
    senders: Mapping[tuple[ActionKind, int], FrameSender],
    receivers: Iterable[FrameReceiver],
    report: Report,
) -> None:
    """Perform a rank's actions in order, then see its links through to their END frames.

    `senders` has the link end behind each kind of action and stage that sends. When a stage or codec raises, this
    rank's streams end with ERROR frames that say so, and what is still to come is drained. The next rank does the
    same, and so the news goes around the ring until every rank's streams have ended. A rank may be through with its
    actions before it hears of it.

    Raises StageError for an own failure, RemoteError for another rank's, BadFrame for a damaged frame, LinkError when
    a peer is gone; after the latter two the links are of no more use.
    """
    try:
        _perform_all(actions, perform, senders=senders, receivers=receivers, report=report)
    except (StageError, RemoteError) as e:
        report("ending the links after a failure", waiting=True)
        _end_streams(list(senders.values()), list(receivers), str(e))
        raise


def _perform_all(
    actions: Sequence[Action],
    perform: Callable[[Action], None],
    *,
    senders: Mapping[tuple[ActionKind, int], FrameSender],
    receivers: Iterable[FrameReceiver],
    report: Report,
) -> None:
    remaining = Counter((action.kind, action.stage_index) for action in actions)
    for key in senders.keys() - remaining.keys():
        senders[key].end()  # a resumed run may have nothing left to send
    for action in actions:
        key = (action.kind, action.stage_index)
        place = report(describe(action))
        try:
            perform(action)
        except (LinkError, RemoteError):
            raise
        except (PipelineError, RecordError) as e:
            _pass_on(senders.get(key), f"{place}: {e}")
            raise
        except Exception as e:
            tell(f"ERROR: {place}: a stage or codec raised\n{traceback.format_exc()}")
            raise StageError(f"{place}: {cause_in_words(e)}") from e
        remaining[key] -= 1
        if not remaining[key] and key in senders:
            # At once: this rank may go on for long with a later stage, and the next rank waits for END.
            senders[key].end()
    report("finishing", waiting=True)
    for receiver in receivers:
        receiver.finish()
    for sender in senders.values():
        sender.flush()


def _end_streams(senders: Sequence[FrameSender], receivers: Sequence[FrameReceiver], cause: str) -> None:
    """Leave no frame and no posted receive behind.

    Nothing is waited for before all errors are on their way, and all links are drained at once, each by a thread:
    a peer that blocks on one of them could not end the others.
    """
    for sender in senders:
        sender.send_error(cause)
    if receivers:
        with ThreadPoolExecutor(len(receivers)) as threads:
            for draining in [threads.submit(receiver.drain) for receiver in receivers]:
                draining.result()
    for sender in senders:
        sender.flush()


def _pass_on(sender: FrameSender | None, cause: str) -> None:
    """Tell the next stage why the run ends; if it is gone, too, the first cause is already being raised."""
    if sender is not None:
        with suppress(LinkError):
            sender.send_error(cause)
            sender.flush()


class Runner:
    """One rank's share of a run.

    Args:
        stages: this rank's stages by stage index.
        actions: what to do, in order (`schedule.make_schedule`).
        tokens: ids of all micro-batches; every rank has them.
        encoders, decoders: the codec objects of this rank's link ends, by link index.
        metrics: what computes the importance for encoders that need it, by link index.
        senders, receivers: the link ends of this rank, by link index.
        dtype: of the hidden states.
        on_start: told on node 0 that a micro-batch enters the pipeline.
        on_result: takes the scores on node 0.
        report: takes this rank's position, for failure messages and heartbeats.
        probes: told of what this rank sends, by link index, outside the phases that are timed.

    `last_tokens` has the hidden states [1, 1, H] of the last token that passed each link end of this rank.
    """

    def __init__(
        self,
        *,
        stages: Mapping[int, Stage],
        actions: Sequence[Action],
        tokens: TokenWindows,
        encoders: Mapping[int, Compressor],
        decoders: Mapping[int, Compressor],
        metrics: Mapping[int, Metric],
        senders: Mapping[int, FrameSender],
        receivers: Mapping[int, FrameReceiver],
        dtype: torch.dtype,
        on_start: Callable[[int], None],
        on_result: OnResult,
        report: Report,
        probes: Mapping[int, Probe],
    ) -> None:
        self.times = {index: StageTimes() for index in stages}
        self._stages, self._actions, self._tokens = stages, actions, tokens
        self._encoders, self._decoders, self._metrics = encoders, decoders, metrics
        self._senders, self._receivers = senders, receivers
        self._dtype, self._report = dtype, report
        self._on_start, self._on_result = on_start, on_result
        self._probes = probes
        self.last_tokens: dict[int, torch.Tensor] = {}

    @torch.inference_mode()
    def run(self) -> None:
        """Execute all actions.

        Raises as `execute`, and RecordError when a result cannot be kept.
        """
        execute(
            self._actions,
            lambda action: self._take_result(action) if action.kind is ActionKind.RESULT else self._forward(action),
            senders={(ActionKind.FORWARD, index): sender for index, sender in self._senders.items()},
            receivers=self._receivers.values(),
            report=self._report,
        )

    def _forward(self, action: Action) -> None:
        index, microbatch_index = action.stage_index, action.microbatch_index
        stage, times = self._stages[index], self.times[index]
        trail: tuple[int, ...] = ()
        if stage.plan.is_first:
            self._on_start(microbatch_index)
            inputs = self._tokens.input_ids(microbatch_index)
        else:
            inputs, trail = self._receive_hidden(action)
        with times.measure("compute", stage.device):
            output = stage.forward(inputs, self._attention_reader(index))
        if not stage.plan.is_last:
            self._send_hidden(action, output, trail)
            return
        rows, columns, targets = self._tokens.scored(microbatch_index)
        with times.measure("compute", stage.device):
            scores = stage.score(output, rows, columns, targets)
        if index in self._senders:
            with self._waiting(action):
                self._senders[index].send(microbatch_index, _scores_to_payload(scores), trail)
        else:
            self._on_result(microbatch_index, scores, trail)

    def _attention_reader(self, index: int) -> AttentionReader | None:
        """What takes in the attention of a stage, where the link behind it has a metric that reads it."""
        metric, times, device = self._metrics.get(index), self.times[index], self._stages[index].device
        if not isinstance(metric, AttentionMetric):
            return None

        def read(stage_layer: int, attention: Attention) -> None:
            with times.measure("importance", device, within="compute"):
                metric.read(stage_layer, attention)

        return read

    def _receive_hidden(self, action: Action) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Hidden states [B, T, H] of the link before the action's stage, and all payload bytes up to here."""
        index = action.stage_index
        receiver, decoder = self._receivers[index - 1], self._decoders[index - 1]
        stage, times = self._stages[index], self.times[index]
        with times.measure("wait", stage.device), self._waiting(action):
            header, payload = receiver.receive(action.microbatch_index)
        with times.measure("decompress", stage.device):
            on_device = Payload(payload.data.to(stage.device), payload.shape, payload.meta)
            with naming(decoder):
                hidden_states = decoder.decompress(on_device, stage.device, self._dtype)
        if hidden_states.shape != payload.shape or hidden_states.dtype != self._dtype:
            raise ValueError(
                f"codec {decoder.name} decompressed to {hidden_states.dtype} "
                f"{tuple(hidden_states.shape)}, expected {self._dtype} {payload.shape}"
            )
        receiver.release()
        self.last_tokens[index - 1] = hidden_states[:1, -1:].clone()
        return hidden_states, (*header.trail, header.body_nbytes)

    def _send_hidden(self, action: Action, hidden_states: torch.Tensor, trail: tuple[int, ...]) -> None:
        index, microbatch_index = action.stage_index, action.microbatch_index
        codec, stage, times = self._encoders[index], self._stages[index], self.times[index]
        side = {}
        with times.measure("importance", stage.device):
            if "token_ids" in codec.needs:
                side["token_ids"] = self._tokens.input_ids(microbatch_index)
            if index in self._metrics:
                side["importance"] = self._metrics[index].importance(hidden_states, microbatch_index)
        with times.measure("compress", stage.device):
            with naming(codec):
                payload = codec.compress(hidden_states, **side)
        wait_for_stream(stage.device)  # else the copy to the host counts the GPU's work as waiting
        if index in self._probes:
            with times.measure("measure", stage.device):
                self._probes[index](microbatch_index, hidden_states, payload)
        self.last_tokens[index] = hidden_states[:1, -1:].clone()
        with times.measure("wait", stage.device), self._waiting(action):
            self._senders[index].send(microbatch_index, payload, trail)

    def _take_result(self, action: Action) -> None:
        receiver = self._receivers[action.stage_index - 1]
        with self._waiting(action):
            header, payload = receiver.receive(action.microbatch_index)
        if payload.data.numel() != 4 * math.prod(payload.shape):
            raise BadFrame(f"result of {payload.data.numel()} bytes for {payload.shape[1]} scored tokens")
        scores = _scores_from_payload(payload)
        receiver.release()
        self._on_result(action.microbatch_index, scores, header.trail)

    @contextmanager
    def _waiting(self, action: Action) -> Iterator[None]:
        """Report that this rank waits for another. After an error it is left at that."""
        self._report(describe(action), waiting=True)
        yield
        self._report(describe(action))


def describe(action: Action) -> str:
    """For messages; a BACKWARD says so."""
    backward = ", backward" if action.kind is ActionKind.BACKWARD else ""
    return f"stage {action.stage_index}, micro-batch {action.microbatch_index}{backward}"


def _scores_to_payload(scores: Scores) -> Payload:
    """Result frame: losses as float32, then top-1 ids as int32; the shape is (1, number of tokens, 2)."""
    data = torch.cat([scores.loss.view(torch.uint8), scores.top1.view(torch.uint8)])
    return Payload(data, (1, scores.loss.numel(), 2))


def _scores_from_payload(payload: Payload) -> Scores:
    half = payload.data.numel() // 2
    data = payload.data.clone()
    return Scores(data[:half].view(torch.float32), data[half:].view(torch.int32))
