"""Rank 0's part in an evaluation: journal, progress, tracking and record."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.comm.watchdog import bounded
from pipeline.comm.wire import header_nbytes
from pipeline.config.schema import RunConfig
from pipeline.evaluation.job import Job
from pipeline.evaluation.progress import Progress
from pipeline.evaluation.tracking import Tracker
from pipeline.models.loading import WeightFormat
from pipeline.models.stage import Scores
from pipeline.records.base import finite_or_none, now
from pipeline.records.environment import environment_changes, software_versions
from pipeline.records.files import RecordError
from pipeline.records.identity import make_run_id
from pipeline.records.journal import FinishedMicroBatch, Journal
from pipeline.records.labels import emulation_label, model_label
from pipeline.records.perplexity import perplexity, sum_nll
from pipeline.records.run_record import (
    Args,
    Dataset,
    OneToken,
    OneTokenLink,
    OneTokenStage,
    OtherTraffic,
    Protocol,
    Reconstruction,
    Resumed,
    RunRank,
    RunRecord,
    RunResults,
    RunSchedule,
    SessionEnvironment,
)
from pipeline.records.store import write_record
from pipeline.records.traffic import LinkTraffic, link_record, link_totals
from pipeline.runtime.devices import shared_gpus
from pipeline.runtime.record_parts import codec_configs, emulation, planned_stages, recorded_model, stage_seconds
from pipeline.runtime.text import TokenizedText
from pipeline.runtime.timing import CACHED_TOKENS

__all__ = ["Recorder", "error_key"]

logger = logging.getLogger(__name__)


class Recorder:
    """Rank 0's part: journal, progress, record."""

    def __init__(self, job: Job, resume: bool, sweep: str | None) -> None:
        self._job = job
        config = job.config
        folder = Path(config.exp_dir)
        if not resume and Journal.exists(folder, job.digest):
            logger.warning(
                "an unfinished run with this config is set aside as *.journal.old; --resume would have continued it"
            )
        environment = job.deployment.environment
        self.journal = Journal.open(folder, job.digest, resume=resume, environment=environment)
        if job.measures_error and any(done.squared_error is None for done in self.journal.finished):
            logger.warning("the unfinished run was started without measure_error; it starts over")
            self.journal.close()
            self.journal = Journal.open(folder, job.digest, resume=False, environment=environment)
        self._check_journal()
        for change in self._environment_changes():
            logger.warning("%s", change)
        if resume and self.journal.num_sessions > 1:
            done, total = len(self.journal.finished), len(job.microbatches)
            logger.warning("resuming: %d of %d micro-batches were finished before", done, total)
        elif resume:
            logger.warning("nothing to resume: %s has no unfinished run with this config; starting anew", folder)
        codec_names = sorted({codec.name for codec in job.codecs.facts}) or ["unsplit"]
        self.run_id = make_run_id(model_label(config.model.name), "+".join(codec_names), job.digest[:8])
        emulated = emulation_label(emulation(config, job.plan, job.emulated_links), job.plan.chain_names)
        self._emulated = {"emulation": emulated} if emulated else {}  # for W&B
        tracked = config.as_dict() | self._emulated
        self._tracker = Tracker(config.wandb, run_id=self.run_id, config=tracked, folder=folder, group=sweep)
        self._folder, self._sweep = folder, sweep
        self._progress: Progress | None = None
        self._time_run_s = 0.0

    def begin(self) -> None:
        """The run proper begins: show progress, and start the clock."""
        job = self._job
        self._progress = Progress(
            num_tokens=sum(m.num_tokens for m in job.microbatches),
            link_names=[link.name for link in job.plan.links],
            tracker=self._tracker,
            in_sweep=self._sweep is not None,
        )
        for microbatch, done in zip(job.microbatches, self.journal.finished, strict=False):
            self._progress.add(
                num_tokens=microbatch.num_tokens, loss=done.loss, payload_bytes=done.payload_bytes, fresh=False
            )
        self.journal.restart_clock()

    def take(
        self,
        microbatch_index: int,
        scores: Scores,
        payload_bytes: tuple[int, ...],
        *,
        num_frames: int = 1,
        header_bytes: tuple[int, ...] | None = None,
    ) -> None:
        """One micro-batch is finished; bytes are those of each link, of headers where it crossed as several frames."""
        loss, top1 = scores.loss.numpy(), scores.top1.numpy()
        squared_error = None
        if self._job.measures_error:
            keys = [error_key(index, microbatch_index) for index in range(len(payload_bytes))]
            squared_error = tuple(map(tuple, self._job.control.take(keys)))
        self.journal.finish(FinishedMicroBatch(payload_bytes, loss, top1, squared_error, num_frames, header_bytes))
        microbatch = self._job.microbatches[microbatch_index]
        assert self._progress is not None, "begin comes first"
        self._progress.add(num_tokens=microbatch.num_tokens, loss=loss, payload_bytes=payload_bytes)

    def end(self) -> None:
        """The run proper is over: stop the clock."""
        self._time_run_s = self.journal.elapsed_s

    def finish(self, reports: Sequence[dict[str, Any]], first: int) -> Path:
        """Write the record; `first` is the micro-batch with which this session began."""
        assert self._progress is not None, "begin comes first"
        self._progress.close()
        self._check_traffic(reports, first)
        record = self._record(reports, self._time_run_s, first)
        path = write_record(self._folder, record, self._per_token())
        self.journal.remove()
        self._tracker.finish(record.results.model_dump() | record.traffic_totals.model_dump() | self._emulated)
        return path

    def abandon(self) -> None:
        """Let go of what an evaluation that has failed leaves open; its journal stays."""
        if self._progress is not None:
            bounded(self._progress.close)
        self.journal.close()
        self._tracker.finish({}, exit_code=1)

    def _check_journal(self) -> None:
        """That what is taken over fits this run; its digest says so, a file may lie."""
        num_links = len(self._job.plan.links)
        finished, microbatches = self.journal.finished, self._job.microbatches
        fits = len(finished) <= len(microbatches) and all(
            len(done.loss) == len(done.top1) == microbatch.num_scored and len(done.payload_bytes) == num_links
            for done, microbatch in zip(finished, microbatches, strict=False)
        )
        if not fits:
            raise RecordError(f"{self.journal.path} does not fit this run; delete the file to start over")

    def _environment_changes(self) -> list[str]:
        """Where a session went on on other devices, threads or versions than the one before, in words."""
        by_first = dict(self.journal.sessions)  # without those that finished nothing
        known = [(first, environment) for first, environment in by_first.items() if environment is not None]
        changes = []
        for (_, before), (first, own) in itertools.pairwise(known):
            if change := environment_changes(before, own):
                changes.append(
                    f"micro-batches from {first} on ran on something else than those before, which may change losses: "
                    f"{change}"
                )
        return changes

    def _check_traffic(self, reports: Sequence[dict[str, Any]], first: int) -> None:
        """What the frames told rank 0 must be what the senders counted."""
        counted = {name: traffic["payload_bytes"] for report in reports for name, traffic in report["sent"].items()}
        for link in self._job.plan.links:
            told = sum(done.payload_bytes[link.index] for done in self.journal.finished[first:])
            if told != counted[link.name]:
                raise RuntimeError(
                    f"link {link.name}: its frames told of {told} payload bytes, "
                    f"its sender counted {counted[link.name]}"
                )

    def _per_token(self) -> dict[str, np.ndarray]:
        counts = [window.num_scored for window in self._job.windows]
        return {
            "loss": np.concatenate([done.loss for done in self.journal.finished]),
            "top1": np.concatenate([done.top1 for done in self.journal.finished]),
            "window": np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        }

    def _record(self, reports: Sequence[dict[str, Any]], time_run_s: float, first: int) -> RunRecord:
        job = self._job
        config, deployment, plan = job.config, job.deployment, job.plan
        weights = WeightFormat.from_config(config.model)
        num_fresh = sum(m.num_tokens for m in job.microbatches[first:])
        results, errors, traffic = self._results(), self._errors(), self._traffic()
        has_infinite_errors = any(error is not None and not math.isfinite(error) for error in errors.values())
        return RunRecord(
            run_id=self.run_id,
            digest=job.digest,
            finished_at=now(),
            per_token_file=f"{self.run_id}.safetensors",
            finite=None not in (results.avg_ppl, results.total_nll) and not has_infinite_errors,
            args=Args.from_plain(config.original_args() | {"config": config.as_dict()}),
            results=results,
            traffic_totals=link_totals(
                traffic.values(), hidden_size=job.hidden_size, num_scored=results.total_loss_tokens
            ),
            traffic_other=self._other_traffic(reports),
            traffic_per_link={name: link_record(link, job.hidden_size) for name, link in traffic.items()},
            time_run_s=time_run_s,
            timed_tokens=num_fresh,
            tokens_per_s=num_fresh / (time_run_s - self.journal.earlier_s),
            causal=all(codec.causal for codec in job.all_facts) and not weights.mixes_tokens,
            notes=tuple(self._notes()),
            codecs=codec_configs(plan, job.codecs),
            codecs_decode=codec_configs(plan, job.decode_codecs) if job.decodes else None,
            importance={plan.links[i].name: metric for i, metric in job.importance.items()},
            plan=planned_stages(plan),
            resumed=self._resumed(),
            stages=stage_seconds(reports),
            one_token=_one_token(reports),
            reconstruction=_reconstruction(errors) if job.measures_error else None,
            ranks=tuple(RunRank(**{key: report[key] for key in RunRank.model_fields}) for report in reports),
            schedule=RunSchedule(in_flight=job.passes_in_flight(), receives_ahead=job.receives_ahead()),
            backend=deployment.backend,
            emulation=emulation(config, plan, job.emulated_links),
            model=recorded_model(config, deployment),
            dataset=_dataset(job.text),
            protocol=_protocol(config),
            versions=software_versions(),
            environment=dict(deployment.environment),
        )

    def _results(self) -> RunResults:
        job = self._job
        total_nll = sum_nll(float(loss) for done in self.journal.finished for loss in done.loss)
        num_scored = sum(m.num_scored for m in job.microbatches)
        return RunResults(
            avg_ppl=finite_or_none(perplexity(total_nll, num_scored)),
            total_nll=finite_or_none(total_nll),
            total_loss_tokens=num_scored,
            total_processed_tokens=sum(m.num_tokens for m in job.microbatches),
            num_windows=len(job.windows),
            num_microbatches=len(job.microbatches),
        )

    def _traffic(self) -> dict[str, LinkTraffic]:
        """What each link carried, from the journal: all sessions, each micro-batch once."""
        links = self._job.plan.links
        traffic = {link.name: LinkTraffic() for link in links}
        for microbatch, done in zip(self._job.microbatches, self.journal.finished, strict=True):
            for link in links:
                header_bytes = header_nbytes(is_indexed=True, trail=done.payload_bytes[: link.index])
                traffic[link.name].add(
                    num_tokens=microbatch.num_tokens,
                    payload_bytes=done.payload_bytes[link.index],
                    header_bytes=header_bytes if done.header_bytes is None else done.header_bytes[link.index],
                    num_frames=done.num_frames,
                )
        return traffic

    def _resumed(self) -> Resumed:
        journal = self.journal
        sessions = [
            SessionEnvironment.from_plain({"from_microbatch": first, **(environment or {})})
            for first, environment in journal.sessions
        ]
        return Resumed(
            num_sessions=journal.num_sessions,
            environments=tuple(sessions) if self._environment_changes() else None,
            resent_microbatches=len(journal.interrupted),
            resent_payload_bytes_at_most=sum(sum(journal.finished[m].payload_bytes) for m in journal.interrupted),
        )

    def _errors(self) -> dict[str, float | None]:
        """Relative squared error of each link over all frames, where it was measured; None where all were zero."""
        if not self._job.measures_error:
            return {}
        errors: dict[str, float | None] = {}
        for link in self._job.plan.links:
            sums = [done.squared_error[link.index] for done in self.journal.finished if done.squared_error is not None]
            total, power = (math.fsum(column) for column in zip(*sums, strict=True))
            errors[link.name] = total / power if power else None
        return errors

    def _other_traffic(self, reports: Sequence[dict[str, Any]]) -> OtherTraffic:
        """Bytes beside the hidden states, of this session: losses on their way to rank 0, END frames, token ids."""
        job = self._job
        hidden = {link.name for link in job.plan.links}
        results = [t for report in reports for name, t in report["sent"].items() if name not in hidden]
        num_ids = job.deployment.text.ids.numel()
        return OtherTraffic(
            result_bytes=sum(t["payload_bytes"] + t["header_bytes"] for t in results),
            end_bytes=sum(t["control_bytes"] for report in reports for t in report["sent"].values()),
            setup_bytes=4 * num_ids * (job.control.world.world_size - 1),
        )

    def _notes(self) -> list[str]:
        """Sentences that a reader of the numbers must know."""
        notes = list(self._job.deployment.model.notes)
        notes += [
            f"codec {codec.name} on {link.name} is not causal: later tokens leak into the perplexity"
            for codecs in dict.fromkeys((self._job.codecs, self._job.decode_codecs))
            for link, codec in zip(self._job.plan.links, codecs.facts, strict=True)
            if not codec.causal
        ]
        weights = WeightFormat.from_config(self._job.config.model)
        if weights.mixes_tokens:
            notes.append(
                f"8-bit bitsandbytes weights mix tokens inside the model (model.load_in_8bit_threshold "
                f"{weights.outlier_threshold:g}, 0 does not): hidden states are not causal"
            )
        notes += [
            f"ranks {', '.join(map(str, ranks))} share GPU {gpu}: the times of a stage contain the others' work"
            for gpu, ranks in shared_gpus(self._job.deployment.gpus).items()
        ]
        return notes + self._environment_changes()


def _dataset(text: TokenizedText) -> Dataset:
    return Dataset(
        description=text.description,
        num_tokens=text.ids.numel(),
        text_sha256=text.text_sha256,
        ids_sha256=text.ids_sha256,
    )


def _protocol(config: RunConfig) -> Protocol:
    decodes = config.evaluation.mode == "decode"
    return Protocol(
        name="token perplexity, sliding window",
        mode="decode" if decodes else "window",
        decode_chunk=config.evaluation.decode_chunk if decodes else None,
        max_length=config.dataset.max_length,
        stride=config.dataset.stride,
        bos=config.dataset.bos,
    )


def _reconstruction(errors: Mapping[str, float | None]) -> dict[str, Reconstruction]:
    """By link."""
    return {
        name: Reconstruction(relative_squared_error=None if error is None else finite_or_none(error))
        for name, error in errors.items()
    }


def _one_token(reports: Sequence[dict[str, Any]]) -> OneToken:
    return OneToken(
        cached_tokens=CACHED_TOKENS,
        stages={index: OneTokenStage(**times) for index, times in _of_all(reports, "stages").items()},
        links={name: OneTokenLink(**sizes) for name, sizes in _of_all(reports, "links").items()},
    )


def _of_all(reports: Sequence[dict[str, Any]], part: str) -> dict[str, dict[str, Any]]:
    """One-token figures of all ranks, by stage or link."""
    return {name: figures for report in reports for name, figures in report["one_token"][part].items()}


def error_key(link_index: int, microbatch_index: int) -> str:
    """Under which a sender posts the squared error of a frame."""
    return f"squared_error/{link_index}/{microbatch_index}"
