"""One evaluation on a deployed model: windows -> micro-batches -> engine -> sums -> record.

Every rank makes an `Evaluation`; rank 0 keeps journal, progress and record in a `Recorder`.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from compressors import Compressor, Payload
from pipeline.comm.link_ends import LinkEnds, forward_hops, open_links
from pipeline.comm.watchdog import PipelineError, tell
from pipeline.comm.wire import header_nbytes
from pipeline.evaluation.job import Job
from pipeline.evaluation.recorder import Recorder, error_key
from pipeline.models.loading import TORCH_DTYPES
from pipeline.models.stage import TokenWindows
from pipeline.partition.passes import Pass, PassKind
from pipeline.partition.schedule import ScheduleError
from pipeline.records.store import RecordError
from pipeline.runtime.codecs import cause_in_words, naming
from pipeline.runtime.engine import Engine, Entry, Failure, Result, StageError
from pipeline.runtime.head import Head
from pipeline.runtime.memory import peak_rss_bytes, pss_bytes
from pipeline.runtime.timing import (
    blank_side_inputs,
    payload_from_json,
    payload_to_json,
    squared_error,
    time_compress,
    time_decompress,
)
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
        for gpu in self._gpus():
            torch.cuda.reset_peak_memory_stats(gpu)
        first = control.gather(len(recorder.journal.finished) if recorder else None)[0]
        if not in_sweep:
            control.watchdog.advice = ADVICE
        # One process takes each pass to its end: more of them would only lie about.
        credits = self.passes_in_flight() if control.world.world_size > 1 else 1
        control.report("warming up codecs")
        start_s = time.perf_counter()
        self._warm_up()
        warm_up_s = time.perf_counter() - start_s
        tokens = TokenWindows(self.text.ids, self.microbatches, self.text.bos_id)
        worker, ends = self._make_worker(tokens), self._open_links()
        source = _Windows(tokens, recorder, first) if recorder else None
        control.barrier()
        if recorder:
            recorder.begin()
        engine = Engine(worker, ends, control.report, source=source, credits=credits)
        engine.run()
        with self._failing_alike():
            if source and source.failure is not None:
                raise StageError(source.failure)
        control.report("timing a token")
        one_token = self._one_token(worker)
        control.report("collecting results", waiting=True)
        reports = control.gather({**self._rank_report(worker, ends), "warm_up_s": warm_up_s, "one_token": one_token})
        if not recorder:
            return None
        path = recorder.finish(reports, first)
        if not in_sweep:
            control.watchdog.advice = f"; the record was written before: {path}"
        return path

    @contextmanager
    def _failing_alike(self) -> Iterator[None]:
        """Make a stage's or codec's failure on any rank in the enclosed work a StageError on all."""
        failure = None
        try:
            yield
        except StageError as e:
            failure = str(e)
        except (PipelineError, RecordError):
            raise
        except Exception as e:
            place = self.control.watchdog.place
            tell(f"ERROR: {place}: a codec raised\n{traceback.format_exc()}")
            failure = f"{place}: {cause_in_words(e)}"
        failures = [told for told in self.control.gather(failure) if told is not None]
        if failures:
            raise StageError(failures[0])

    def _make_worker(self, tokens: TokenWindows) -> StageWorker:
        plan = self.plan
        return StageWorker(
            self.deployment.stages,
            EndCodecs(encoders=self.codecs.encoders, decoders=self.codecs.decoders),
            Head(tokens, len(plan.links) if plan.last_node != 0 else None),
            tokens,
            dtype=TORCH_DTYPES[self.config.model.dtype],
            metrics=self.metrics,
            probes=self._make_probes(),
        )

    def _open_links(self) -> LinkEnds:
        deployment = self.deployment
        return open_links(
            forward_hops(self.plan, devices=deployment.devices, channels=deployment.channels),
            self.specs,
            self.control.world,
            receives_ahead=self.config.runtime.receives_ahead,
        )

    def _make_probes(self) -> dict[int, Probe]:
        """What measures the reconstruction at this rank's sending ends, with decoders of their own."""
        if not self.config.measure_error:
            return {}

        def make_probe(index: int, decoder: Compressor) -> Probe:
            def probe(microbatch_index: int, hidden_states: torch.Tensor, payload: Payload) -> None:
                self.control.post(error_key(index, microbatch_index), squared_error(decoder, payload, hidden_states))

            return probe

        return {index: make_probe(index, decoder) for index, decoder in self.codecs.probes.items()}

    def _one_token(self, worker: StageWorker) -> dict[str, Any]:
        """What a frame of one token costs at this rank's stages and sending ends; see docs/design.md, Records."""
        devices, dtype = self.deployment.devices, TORCH_DTYPES[self.config.model.dtype]
        stages = {
            index: {"compute_s": compute_s, "compress_s": 0.0, "decompress_s": 0.0}
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
                    stages[index]["compress_s"], payload = time_compress(encoder, token)
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
                    stages[index + 1]["decompress_s"] = time_decompress(decoder, payload, device, dtype)

        with self._failing_alike():
            own = self.control.in_turn(compress)
        written = self._from_all_ranks(own)
        with self._failing_alike():
            self.control.in_turn(lambda: decompress(written))
        return {"stages": {str(index): times for index, times in stages.items()}, "links": links}

    def _warm_up(self) -> None:
        """Run this rank's codecs once on a small tensor, so that compiling kernels is not timed with the run."""
        devices, dtype = self.deployment.devices, TORCH_DTYPES[self.config.model.dtype]
        own = {}
        with self._failing_alike(), self._one_rank_a_machine_first():
            for index, encoder in self.codecs.encoders.items():
                x = torch.ones((1, 2, self.hidden_size), dtype=dtype, device=devices[index])
                with naming(encoder):
                    payload = encoder.compress(x, **blank_side_inputs(encoder, x))
                own[str(index)] = payload_to_json(payload)
        written = self._from_all_ranks(own)
        with self._failing_alike(), self._one_rank_a_machine_first():
            for index, decoder in self.codecs.decoders.items():
                device = devices[index + 1]
                payload = payload_from_json(written[str(index)], device)
                with naming(decoder):
                    decoder.decompress(payload, device, dtype)

    @contextmanager
    def _one_rank_a_machine_first(self) -> Iterator[None]:
        """The enclosed work on local rank 0, then on the others, which find the kernels that it compiled on disk."""
        is_first = self.control.world.local_rank == 0
        if not is_first:
            self.control.barrier()
        try:
            yield
        finally:
            if is_first:
                self.control.barrier()

    def _from_all_ranks(self, by_link: dict[str, Any]) -> dict[str, Any]:
        """JSON by link from every rank, in one mapping: a decoder's rank has no encoder to make it a frame."""
        return {index: value for rank in self.control.gather(by_link) for index, value in rank.items()}

    def _gpus(self) -> set[torch.device]:
        return {device for device in self.deployment.devices.values() if device.type == "cuda"}

    def _rank_report(self, worker: StageWorker, ends: LinkEnds) -> dict[str, Any]:
        """What this rank tells rank 0 at the end, as JSON."""
        devices, gpus = self.deployment.devices, self._gpus()
        rank = self.control.world.rank
        return {
            "rank": rank,
            "host": self.control.host,
            "threads": self.deployment.threads,
            "peak_rss_bytes": peak_rss_bytes(),
            "pss_bytes": pss_bytes(),
            "gpu": self.deployment.gpus[rank],
            "peak_cuda_bytes": sum(map(torch.cuda.max_memory_allocated, gpus)) if gpus else None,
            "cuda_in_use_bytes": sum(map(_in_use_nbytes, gpus)) if gpus else None,
            "stages": {
                str(index): {"device": str(devices[index]), **times.as_dict()} for index, times in worker.times.items()
            },
            "sent": {sender.spec.name: sender.traffic.as_dict() for sender in ends.senders.values()},
        }


def _in_use_nbytes(gpu: torch.device) -> int:
    """Of a GPU's memory, by all processes: contexts and libraries too, which torch's own count leaves out."""
    free_nbytes, total_nbytes = torch.cuda.mem_get_info(gpu)
    return total_nbytes - free_nbytes


class _Windows:
    """The source of SCORE passes: micro-batches from `first` on, until one fails."""

    def __init__(self, tokens: TokenWindows, recorder: Recorder, first: int) -> None:
        self.failure: str | None = None
        self._tokens, self._recorder, self._following = tokens, recorder, first

    @property
    def is_done(self) -> bool:
        return self.failure is not None or self._following == len(self._tokens.microbatches)

    def next(self) -> Entry | None:
        if self.is_done:
            return None
        index, self._following = self._following, self._following + 1
        self._recorder.journal.start(index)
        return Entry(work=Pass(kind=PassKind.SCORE, microbatch_index=index), token_ids=self._tokens.input_ids(index))

    def take(self, work: Pass, result: Result | Failure) -> None:
        assert work.microbatch_index is not None
        if isinstance(result, Failure):
            self.failure = self.failure or result.cause
        elif self.failure is None:
            self._recorder.take(work.microbatch_index, result.value, result.trail)
