"""One evaluation on a deployed model: windows -> micro-batches -> engine -> sums -> record.

Every rank makes an `Evaluation`; rank 0 keeps journal, progress and record in a `Recorder`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from compressors import Compressor, Payload
from pipeline.comm.link_ends import LinkEnds, forward_hops, open_links
from pipeline.comm.wire import header_nbytes
from pipeline.evaluation.job import Job
from pipeline.evaluation.recorder import Recorder, error_key
from pipeline.models.loading import TORCH_DTYPES
from pipeline.models.stage import Scores, TokenWindows
from pipeline.partition.passes import Pass, PassKind, Row
from pipeline.partition.schedule import ScheduleError
from pipeline.runtime.codecs import naming
from pipeline.runtime.emulation import slowdown_of
from pipeline.runtime.engine import Engine, Entry, Failure, Result, StageError
from pipeline.runtime.head import Head
from pipeline.runtime.placement import credits_of
from pipeline.runtime.rank_report import own_gpus, rank_report
from pipeline.runtime.sources import MicroBatches
from pipeline.runtime.timing import (
    payload_from_json,
    payload_to_json,
    squared_error,
    time_compress,
    time_decompress,
)
from pipeline.runtime.together import failing_alike, from_all_ranks, warm_up
from pipeline.runtime.worker import EndCodecs, Probe, StageWorker

__all__ = ["Evaluation"]

ADVICE = "; finished micro-batches are kept: the same command with --resume goes on from them"


class Evaluation(Job):
    """A job that can be run, on one rank."""

    def run(self, *, resume: bool = False, sweep: str | None = None) -> Path | None:
        """Run to the end and write the record; returns its path on rank 0, None elsewhere.

        With `resume`, micro-batches that an interrupted run's journal holds are taken over and the others are run.
        `sweep` names the sweep that this is a point of.

        Raises ScheduleError for a schedule that would deadlock, StageError on every rank when a stage or codec has
        raised on one; the deployment stays usable.
        """
        recorder = Recorder(self, resume, sweep) if self.control.world.rank == 0 else None
        try:
            return self._run(recorder, in_sweep=sweep is not None)
        except (StageError, ScheduleError):
            if recorder:
                recorder.abandon()
            raise

    def _run(self, recorder: Recorder | None, *, in_sweep: bool) -> Path | None:
        control = self.control
        for gpu in own_gpus(self.deployment):
            torch.cuda.reset_peak_memory_stats(gpu)
        first = control.gather(len(recorder.journal.finished) if recorder else None)[0]
        if not in_sweep:
            control.watchdog.advice = ADVICE
        credits = credits_of(self.config, self.plan, control.world)
        control.report("warming up codecs")
        start_s = time.perf_counter()
        for codecs in dict.fromkeys((self.codecs, self.decode_codecs)):
            warm_up(control, codecs, self.deployment.devices, self.hidden_size, TORCH_DTYPES[self.config.model.dtype])
        warm_up_s = time.perf_counter() - start_s
        tokens = TokenWindows(self.text.ids, self.microbatches, self.text.bos_id)
        worker, ends = self._make_worker(tokens), self._open_links()
        source = None
        if recorder:
            source = (
                _DecodedWindows(tokens, recorder, first, self.config.evaluation.decode_chunk)
                if self.decodes
                else MicroBatches(
                    tokens,
                    first=first,
                    on_start=recorder.journal.start,
                    on_result=lambda index, result: recorder.take(index, result.value, result.trail),
                )
            )
        control.barrier()
        if recorder:
            recorder.begin()
        engine = Engine(worker, ends, control.report, source=source, credits=credits)
        with self._slots():
            engine.run()
        if recorder:
            recorder.end()
        with failing_alike(self.control):
            if source and source.failure is not None:
                raise StageError(source.failure)
        control.report("timing a token")
        one_token = self._one_token(worker)
        control.report("collecting results", waiting=True)
        own = rank_report(self.deployment, worker.times, ends)
        reports = control.gather({**own, "warm_up_s": warm_up_s, "one_token": one_token})
        if not recorder:
            return None
        path = recorder.finish(reports, first)
        if not in_sweep:
            control.watchdog.advice = f"; the record was written before: {path}"
        return path

    def _make_worker(self, tokens: TokenWindows) -> StageWorker:
        plan = self.plan
        return StageWorker(
            self.deployment.stages,
            EndCodecs.make(plan, self.codecs, self.decode_codecs, self.metrics),
            Head(tokens, len(plan.links) if plan.last_node != 0 else None),
            dtype=TORCH_DTYPES[self.config.model.dtype],
            probes=self._make_probes(),
            slowdown=slowdown_of(self.config, self.control.world),
        )

    def _open_links(self) -> LinkEnds:
        deployment = self.deployment
        return open_links(
            forward_hops(self.plan, devices=deployment.devices, channels=deployment.channels),
            self.specs,
            self.control.world,
            receives_ahead=self.receives_ahead(),
            groups=deployment.groups,
            emulated=self.emulated_links,
        )

    @contextmanager
    def _slots(self) -> Iterator[None]:
        """Caches for the windows of one micro-batch, where they go token by token."""
        if not self.decodes:
            yield
            return
        stages = self.deployment.stages.values()
        for stage in stages:
            stage.open_slots(self.config.batch_size, max(m.shape[1] for m in self.microbatches))
        try:
            yield
        finally:
            for stage in stages:
                stage.close_slots()

    def _make_probes(self) -> dict[int, Probe]:
        """What measures the reconstruction at this rank's sending ends, with decoders of their own."""
        if not self.measures_error:
            return {}

        def make_probe(index: int, decoder: Compressor) -> Probe:
            def probe(
                microbatch_index: int, hidden_states: torch.Tensor, payload: Payload, ids: torch.Tensor | None
            ) -> None:
                error = squared_error(decoder, payload, hidden_states, ids)
                self.control.post(error_key(index, microbatch_index), error)

            return probe

        return {index: make_probe(index, decoder) for index, decoder in self.codecs.probes.items()}

    def _one_token(self, worker: StageWorker) -> dict[str, Any]:
        """What a frame of one token costs at this rank's stages and sending ends; see docs/design.md, Records."""
        devices, dtype = self.deployment.devices, TORCH_DTYPES[self.config.model.dtype]
        slowdown = slowdown_of(self.config, self.control.world)
        stages = {
            index: {"compute_s": slowdown * compute_s, "compress_s": 0.0, "decompress_s": 0.0}
            for index, compute_s in self.deployment.one_token_compute_s.items()
        }
        links = {}

        def compress() -> dict[str, Any]:
            written = {}
            for index, encoder in self.codecs.encoders.items():
                token = worker.last_tokens.get(index)
                if token is None:  # every micro-batch was finished in an earlier session
                    token = torch.ones((1, 1, self.hidden_size), dtype=dtype, device=devices[index])
                with naming(encoder):
                    compress_s, payload = time_compress(encoder, token)
                stages[index]["compress_s"] = slowdown * compress_s
                name = self.plan.links[index].name
                links[name] = {
                    "payload_bytes": payload.nbytes,
                    "header_bytes": header_nbytes(num_rows=1, trail=[payload.nbytes] * index),
                }
                written[str(index)] = payload_to_json(payload)
            return written

        def decompress(written: Mapping[str, Any]) -> None:
            for index, decoder in self.codecs.decoders.items():
                device = devices[index + 1]
                payload = payload_from_json(written[str(index)], device)
                with naming(decoder):
                    decompress_s = time_decompress(decoder, payload, device, dtype)
                stages[index + 1]["decompress_s"] = slowdown * decompress_s

        with failing_alike(self.control):
            own = self.control.in_turn(compress)
        written = from_all_ranks(self.control, own)
        with failing_alike(self.control):
            self.control.in_turn(lambda: decompress(written))
        return {"stages": {str(index): times for index, times in stages.items()}, "links": links}


class _DecodedWindows:
    """The source that scores the same windows through a cache, as an answer's tokens go.

    What stands in front of a micro-batch's first scored token is prefilled at once, the rest goes `decode_chunk` tokens
    at a time. Tokens are known beforehand, so passes follow each other without waiting, and one set of slots serves
    all.
    """

    def __init__(self, tokens: TokenWindows, recorder: Recorder, first: int, chunk: int) -> None:
        self.failure: str | None = None
        self._tokens, self._recorder, self._following, self._chunk = tokens, recorder, first, chunk
        self._due: deque[Entry] = deque()
        self._taken: list[tuple[Pass, Result]] = []

    @property
    def is_done(self) -> bool:
        return self.failure is not None or (
            not self._due and self._following == len(self._tokens.microbatches)
        )

    def next(self) -> Entry | None:
        if self.is_done:
            return None
        if not self._due:
            self._recorder.journal.start(self._following)
            self._due.extend(self._entries(self._following))
            self._following += 1
        return self._due.popleft()

    def is_void(self, work: Pass) -> bool:
        return False

    def take(self, work: Pass, result: Result | Failure) -> None:
        assert work.microbatch_index is not None
        if isinstance(result, Failure):
            self.failure = self.failure or result.cause
        if isinstance(result, Failure) or self.failure is not None:
            return
        self._taken.append((work, result))
        if work.rows[0].start + work.num_tokens == self._tokens.microbatches[work.microbatch_index].shape[1]:
            self._finish(work.microbatch_index)

    def _entries(self, index: int) -> Iterator[Entry]:
        ids, windows = self._tokens.input_ids(index), self._tokens.microbatches[index].windows
        length = ids.shape[1]
        start, end = 0, min(window.scored_columns.start for window in windows)
        kind = PassKind.PREFILL
        while start < length:
            if end > start:
                yield Entry(
                    work=Pass(
                        kind=kind,
                        rows=tuple(Row(slot, start) for slot in range(len(windows))),
                        num_tokens=end - start,
                        scores=True,
                        microbatch_index=index,
                    ),
                    token_ids=ids[:, start:end],
                )
            kind, start = PassKind.DECODE, end
            end = min(start + self._chunk, length)

    def _finish(self, index: int) -> None:
        """Put a micro-batch's scores into their order, window by window, and add up its bytes."""
        rows, columns, _ = self._tokens.scored(index)
        loss, top1 = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.int32)
        num_links = len(self._taken[0][1].trail)
        payload_bytes, header_bytes = [0] * num_links, [0] * num_links
        for work, result in self._taken:
            start = work.rows[0].start
            here = (columns >= start) & (columns < start + work.num_tokens)
            loss[here], top1[here] = result.value.loss, result.value.top1
            for link, nbytes in enumerate(result.trail):
                payload_bytes[link] += nbytes
                header_bytes[link] += header_nbytes(
                    num_rows=len(work.rows), is_indexed=True, trail=result.trail[:link]
                )
        num_frames = len(self._taken)
        self._taken.clear()
        self._recorder.take(
            index,
            Scores(loss, top1),
            tuple(payload_bytes),
            num_frames=num_frames,
            header_bytes=tuple(header_bytes),
        )
