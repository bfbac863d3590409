"""One evaluation on a deployed model: windows -> micro-batches -> runner -> sums -> record.

Every rank makes an `Evaluation`; rank 0 keeps journal, progress and record.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compressors import Compressor, Payload
from pipeline import metrics
from pipeline.compose import LinkEnds, frame_specs, make_codecs, make_links, make_metrics, make_run_windows
from pipeline.config import RunConfig
from pipeline.deployment import Deployment
from pipeline.hf_model import TORCH_DTYPES
from pipeline.journal import FinishedMicroBatch, Journal
from pipeline.mailbox import FrameSpec
from pipeline.probes import blank_side_inputs, squared_error, time_codec
from pipeline.progress import Progress
from pipeline.record import RecordError, digest_of, make_run_id, model_label, software_versions, write_record
from pipeline.runner import Probe, Runner, StageError
from pipeline.schedule import Action, dry_run, make_schedule
from pipeline.stage import Scores, TokenWindows
from pipeline.tracking import Tracker
from pipeline.watchdog import PipelineError
from pipeline.windows import make_microbatches
from pipeline.wire import RemoteError, header_nbytes

__all__ = ["Evaluation"]

logger = logging.getLogger(__name__)

ADVICE = "; finished micro-batches are kept: the same command with --resume goes on from them"


class Evaluation:
    """One config on one deployment, on one rank.

    The constructor derives what all ranks must derive alike: micro-batches, codecs, schedule and the digest by which
    a resumed run recognises itself.
    """

    def __init__(self, config: RunConfig, deployment: Deployment) -> None:
        self.config, self.deployment = config, deployment
        self.plan, self.control = deployment.plan, deployment.control
        self.hidden_size = deployment.model_config.hidden_size
        self.text = text = deployment.text.cut(config.dataset.first_k_tokens)
        self.windows = make_run_windows(config, text.ids, text.bos_id)
        self.microbatches = make_microbatches(self.windows, config.batch_size)
        self.encoders, self.decoders = self._make_codecs(), self._make_codecs()
        self.metrics = make_metrics(
            config,
            self.plan,
            self.encoders,
            self.microbatches,
            model_config=deployment.model_config,
            checkpoint_digest=deployment.checkpoint_digest,
            ids_sha256=text.ids_sha256,
        )
        self.in_flight = config.runtime.in_flight or self.plan.num_nodes + 2
        self.digest = digest_of(
            {
                **config.numerics(),
                "compressor": [codec.format_config() for codec in self.encoders],
                "compressor_per_link": None,
                "importance": {str(index): metric.describe() for index, metric in self.metrics.items()},
                "checkpoint": deployment.checkpoint_digest,
                "ids": text.ids_sha256,
                "bos_id": text.bos_id,
            }
        )

    def run(self, *, resume: bool = False, sweep: str | None = None) -> Path | None:
        """Run to the end and write the record; returns its path on rank 0, None elsewhere.

        With `resume`, micro-batches that an interrupted run's journal holds are taken over and the others are run.
        `sweep` names the sweep that this is a point of.

        Raises StageError on every rank when a stage or codec has raised on one; the deployment stays usable.
        """
        head = _Head(self, resume, sweep) if self.control.world.rank == 0 else None
        try:
            return self._run(head, in_sweep=sweep is not None)
        finally:
            if head:
                head.close()

    def _run(self, head: _Head | None, *, in_sweep: bool) -> Path | None:
        control = self.control
        first = control.gather(len(head.journal.finished) if head else None)[0]
        if not in_sweep:
            control.watchdog.advice = ADVICE
        control.report("warming up codecs")
        start_s = time.perf_counter()
        with self._failing_alike():
            self._warm_up()
            schedule, specs = self._make_schedule(first), self._frame_specs()
        warm_up_s = time.perf_counter() - start_s
        runner, links = self._make_runner(head, first, schedule, specs)
        control.barrier()
        if head:
            head.begin()
        with self._failing_alike():
            runner.run()
        control.report("timing a token")
        one_token = control.in_turn(lambda: self._one_token(runner))
        control.report("collecting results", waiting=True)
        reports = control.gather(
            {**self._rank_report(runner, links), "warm_up_s": warm_up_s, "one_token": one_token}
        )
        if not head:
            return None
        path = head.finish(reports, first)
        if not in_sweep:
            control.watchdog.advice = f"; the record was written before: {path}"
        return path

    @contextmanager
    def _failing_alike(self) -> Iterator[None]:
        """Make a stage's or codec's failure on any rank in the enclosed work a StageError on all."""
        failure = None
        try:
            yield
        except (StageError, RemoteError) as e:
            failure = str(e)
        except (PipelineError, RecordError):
            raise
        except Exception as e:
            place = self.control.watchdog.place
            logger.exception("%s: a codec raised", place)
            failure = f"{place}: {type(e).__name__}: {e}"
        failures = [told for told in self.control.gather(failure) if told is not None]
        if failures:
            raise StageError(failures[0])

    def _make_codecs(self) -> list[Compressor]:
        max_tokens = max(m.num_tokens for m in self.microbatches)
        return make_codecs(self.config, self.plan, hidden_size=self.hidden_size, max_tokens=max_tokens)

    def _make_schedule(self, first: int) -> list[Action]:
        """This rank's actions."""
        world = self.control.world
        schedule = make_schedule(
            self.plan,
            len(self.microbatches),
            world_size=world.world_size,
            in_flight=self.in_flight,
            first_microbatch=first,
        )
        dry_run(schedule, receives_ahead=self.config.runtime.receives_ahead)
        return schedule[world.rank]

    def _frame_specs(self) -> list[FrameSpec]:
        dtype = TORCH_DTYPES[self.config.model.dtype]
        return frame_specs(self.plan, self.encoders, self.microbatches, hidden_size=self.hidden_size, dtype=dtype)

    def _make_runner(
        self, head: _Head | None, first: int, actions: Sequence[Action], specs: Sequence[FrameSpec]
    ) -> tuple[Runner, LinkEnds]:
        deployment = self.deployment
        links = make_links(
            self.plan,
            self.encoders,
            specs,
            self.control.world,
            devices=deployment.devices,
            backend=deployment.backend,
            receives_ahead=self.config.runtime.receives_ahead,
            first_microbatch=first,
            groups=deployment.groups,
        )
        runner = Runner(
            stages=deployment.stages,
            actions=actions,
            tokens=TokenWindows(self.text.ids, self.microbatches, self.text.bos_id),
            encoders=dict(enumerate(self.encoders)),
            decoders=dict(enumerate(self.decoders)),
            metrics=self.metrics,
            senders=links.senders,
            receivers=links.receivers,
            dtype=TORCH_DTYPES[self.config.model.dtype],
            on_start=head.journal.start if head else _only_on_rank_0,
            on_result=head.take if head else _only_on_rank_0,
            report=self.control.report,
            probes=self._make_probes(),
        )
        return runner, links

    def _make_probes(self) -> dict[int, Probe]:
        """What measures the reconstruction at this rank's sending ends, with decoders of their own."""
        if not self.config.measure_error:
            return {}

        def make_probe(index: int, decoder: Compressor) -> Probe:
            def probe(microbatch_index: int, hidden_states: torch.Tensor, payload: Payload) -> None:
                self.control.post(error_key(index, microbatch_index), squared_error(decoder, payload, hidden_states))

            return probe

        own = self.deployment.stages
        return {index: make_probe(index, codec) for index, codec in enumerate(self._make_codecs()) if index in own}

    def _one_token(self, runner: Runner) -> dict[str, Any]:
        """What a frame of one token costs at this rank's stages and sending ends; see docs/design.md, Records."""
        dtype = TORCH_DTYPES[self.config.model.dtype]
        stages, links = {}, {}
        for index, compute_s in self.deployment.one_token_compute_s.items():
            device, times = self.deployment.devices[index], {"compute_s": compute_s, "compress_s": 0.0, "decompress_s": 0.0}
            for link in self.plan.links:
                if index not in (link.index, link.index + 1):
                    continue
                token = runner.last_tokens.get(link.index)
                if token is None:  # every micro-batch was finished in an earlier session
                    token = torch.ones((1, 1, self.hidden_size), dtype=dtype, device=device)
                codecs = self.encoders[link.index], self.decoders[link.index]
                compress_s, decompress_s, payload_bytes = time_codec(*codecs, token)
                if index == link.index:
                    times["compress_s"] = compress_s
                    links[link.name] = {"payload_bytes": payload_bytes, "header_bytes": header_nbytes(link.index)}
                else:
                    times["decompress_s"] = decompress_s
            stages[str(index)] = times
        return {"stages": stages, "links": links}

    def _warm_up(self) -> None:
        """Run this rank's codecs once on a small tensor, so that compiling kernels is not timed with the run."""
        dtype = TORCH_DTYPES[self.config.model.dtype]
        for index in range(len(self.plan.links)):
            shape = (1, 2, self.hidden_size)
            device = self.deployment.devices.get(index, self.deployment.devices.get(index + 1))
            if device is not None:
                encoder = self.encoders[index]
                x = torch.ones(shape, dtype=dtype, device=device)
                payload = encoder.compress(x, **blank_side_inputs(encoder, x))
                self.decoders[index].decompress(payload, device, dtype)

    def _rank_report(self, runner: Runner, links: LinkEnds) -> dict[str, Any]:
        """What this rank tells rank 0 at the end, as JSON."""
        devices = self.deployment.devices
        gpus = {device for device in devices.values() if device.type == "cuda"}
        return {
            "rank": self.control.world.rank,
            "host": self.control.host,
            "threads": self.deployment.threads,
            "peak_rss_bytes": metrics.peak_rss_bytes(),
            "peak_cuda_bytes": sum(map(torch.cuda.max_memory_allocated, gpus)) if gpus else None,
            "stages": {
                str(index): {"device": str(devices[index]), **times.as_dict()} for index, times in runner.times.items()
            },
            "sent": {sender.spec.name: sender.traffic.as_dict() for sender in links.senders.values()},
        }


class _Head:
    """Rank 0's part: journal, progress, record."""

    def __init__(self, evaluation: Evaluation, resume: bool, sweep: str | None) -> None:
        self._evaluation = evaluation
        config = evaluation.config
        folder = Path(config.exp_dir)
        if not resume and Journal.exists(folder, evaluation.digest):
            logger.warning(
                "an unfinished run with this config is set aside as *.journal.old; --resume would have continued it"
            )
        self.journal = Journal.open(folder, evaluation.digest, resume=resume)
        if config.measure_error and any(done.squared_error is None for done in self.journal.finished):
            logger.warning("the unfinished run was started without measure_error; it starts over")
            self.journal.close()
            self.journal = Journal.open(folder, evaluation.digest, resume=False)
        if resume and self.journal.num_sessions > 1:
            done, total = len(self.journal.finished), len(evaluation.microbatches)
            logger.warning("resuming: %d of %d micro-batches were finished before", done, total)
        elif resume:
            logger.warning("nothing to resume: %s has no unfinished run with this config; starting anew", folder)
        codec_names = sorted({codec.name for codec in evaluation.encoders}) or ["unsplit"]
        self.run_id = make_run_id(model_label(config.model.name), "+".join(codec_names), evaluation.digest[:8])
        self._tracker = Tracker(
            config.wandb, run_id=self.run_id, config=config.as_dict(), folder=folder, group=sweep
        )
        self._folder, self._sweep = folder, sweep
        self._progress: Progress | None = None

    def begin(self) -> None:
        """The run proper begins: show progress, and start the clock."""
        evaluation = self._evaluation
        self._progress = Progress(
            num_tokens=sum(m.num_tokens for m in evaluation.microbatches),
            link_names=[link.name for link in evaluation.plan.links],
            tracker=self._tracker,
            in_sweep=self._sweep is not None,
        )
        for microbatch, done in zip(evaluation.microbatches, self.journal.finished):
            self._progress.add(
                num_tokens=microbatch.num_tokens, loss=done.loss, payload_bytes=done.payload_bytes, fresh=False
            )
        self.journal.restart_clock()

    def take(self, microbatch_index: int, scores: Scores, payload_bytes: tuple[int, ...]) -> None:
        """One micro-batch is finished (`runner.OnResult`)."""
        loss, top1 = scores.loss.numpy(), scores.top1.numpy()
        squared_error = None
        if self._evaluation.config.measure_error:
            keys = [error_key(index, microbatch_index) for index in range(len(payload_bytes))]
            squared_error = tuple(map(tuple, self._evaluation.control.take(keys)))
        self.journal.finish(FinishedMicroBatch(payload_bytes, loss, top1, squared_error))
        microbatch = self._evaluation.microbatches[microbatch_index]
        self._progress.add(num_tokens=microbatch.num_tokens, loss=loss, payload_bytes=payload_bytes)

    def finish(self, reports: Sequence[dict[str, Any]], first: int) -> Path:
        """Write the record; `first` is the micro-batch with which this session began."""
        time_run_s = self.journal.elapsed_s
        self._progress.close()
        self._check_traffic(reports, first)
        record = self._record(reports, time_run_s, first)
        path = write_record(self._folder, record, self._per_token())
        self.journal.remove()
        self._tracker.finish(record["results"] | record["traffic_totals"])
        return path

    def close(self) -> None:
        """Let go of what a run that has failed leaves open."""
        if self._progress is not None:
            self._progress.close()
        self.journal.close()
        self._tracker.finish({}, exit_code=1)

    def _check_traffic(self, reports: Sequence[dict[str, Any]], first: int) -> None:
        """What the frames told rank 0 must be what the senders counted."""
        counted = {name: traffic["payload_bytes"] for report in reports for name, traffic in report["sent"].items()}
        for link in self._evaluation.plan.links:
            told = sum(done.payload_bytes[link.index] for done in self.journal.finished[first:])
            if told != counted[link.name]:
                raise RuntimeError(
                    f"link {link.name}: its frames told of {told} payload bytes, its sender counted {counted[link.name]}"
                )

    def _per_token(self) -> dict[str, np.ndarray]:
        counts = [window.num_scored for window in self._evaluation.windows]
        return {
            "loss": np.concatenate([done.loss for done in self.journal.finished]),
            "top1": np.concatenate([done.top1 for done in self.journal.finished]),
            "window": np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        }

    def _record(self, reports: Sequence[dict[str, Any]], time_run_s: float, first: int) -> dict[str, Any]:
        evaluation, journal = self._evaluation, self.journal
        config, deployment, plan = evaluation.config, evaluation.deployment, evaluation.plan
        total_nll = metrics.sum_nll(float(loss) for done in journal.finished for loss in done.loss)
        num_scored = sum(m.num_scored for m in evaluation.microbatches)
        num_processed = sum(m.num_tokens for m in evaluation.microbatches)
        num_fresh = sum(m.num_tokens for m in evaluation.microbatches[first:])
        traffic = {link.name: metrics.LinkTraffic() for link in plan.links}
        for microbatch, done in zip(evaluation.microbatches, journal.finished):
            for link in plan.links:
                traffic[link.name].add(
                    num_tokens=microbatch.num_tokens,
                    payload_bytes=done.payload_bytes[link.index],
                    header_bytes=header_nbytes(link.index),
                )
        hidden_size = evaluation.hidden_size
        return {
            "run_id": self.run_id,
            "digest": evaluation.digest,
            "args": {**config.original_args(), "config": config.as_dict()},
            "results": {
                "avg_ppl": metrics.perplexity(total_nll, num_scored),
                "total_nll": total_nll,
                "total_loss_tokens": num_scored,
                "total_processed_tokens": num_processed,
                "num_windows": len(evaluation.windows),
                "num_microbatches": len(evaluation.microbatches),
            },
            "traffic_totals": metrics.traffic_totals(traffic, hidden_size=hidden_size, num_scored=num_scored),
            "traffic_other": self._other_traffic(reports),
            "traffic_per_link": {name: metrics.per_link_record(t, hidden_size) for name, t in traffic.items()},
            "time_run_s": time_run_s,
            "timed_tokens": num_fresh,
            "tokens_per_s": num_fresh / (time_run_s - journal.earlier_s),
            "causal": all(codec.causal for codec in evaluation.encoders) and not config.model.load_in_8bit,
            "notes": self._notes(),
            "codecs": {link.name: codec.config() for link, codec in zip(plan.links, evaluation.encoders)},
            "importance": {plan.links[i].name: metric.describe() for i, metric in evaluation.metrics.items()},
            "plan": [
                {"stage": s.stage_index, "node": s.node, "layers": [s.start, s.end]} for s in plan.stages
            ],
            "resumed": {
                "num_sessions": journal.num_sessions,
                "resent_microbatches": len(journal.interrupted),
                "resent_payload_bytes_at_most": sum(sum(journal.finished[m].payload_bytes) for m in journal.interrupted),
            },
            "stages": {index: stage for report in reports for index, stage in sorted(report["stages"].items())},
            "one_token": {
                part: {name: value for report in reports for name, value in report["one_token"][part].items()}
                for part in ("stages", "links")
            },
            "ranks": [
                {key: report[key] for key in ("rank", "host", "threads", "peak_rss_bytes", "peak_cuda_bytes", "warm_up_s")}
                for report in reports
            ],
            "schedule": {"in_flight": evaluation.in_flight, "receives_ahead": config.runtime.receives_ahead},
            "backend": deployment.backend,
            "model": {
                "model_type": deployment.model_config.model_type,
                "hidden_size": hidden_size,
                "num_hidden_layers": plan.num_layers,
                "checkpoint_fingerprint": deployment.checkpoint_digest,
            },
            "dataset": {
                "description": evaluation.text.description,
                "num_tokens": evaluation.text.ids.numel(),
                "text_sha256": evaluation.text.text_sha256,
                "ids_sha256": evaluation.text.ids_sha256,
            },
            "protocol": {
                "name": "token perplexity, sliding window",
                "max_length": config.dataset.max_length,
                "stride": config.dataset.stride,
                "bos": config.dataset.bos,
            },
            "versions": software_versions(),
            **self._reconstruction(),
        }

    def _reconstruction(self) -> dict[str, Any]:
        """Relative squared error of each link over all frames, where it was measured."""
        if not self._evaluation.config.measure_error:
            return {}
        errors = {}
        for link in self._evaluation.plan.links:
            error, power = zip(*(done.squared_error[link.index] for done in self.journal.finished))
            total, power = math.fsum(error), math.fsum(power)
            errors[link.name] = {"relative_squared_error": total / power if power else None}
        return {"reconstruction": errors}

    def _other_traffic(self, reports: Sequence[dict[str, Any]]) -> dict[str, int]:
        """Bytes beside the hidden states, of this session: losses on their way to rank 0, END frames, token ids."""
        evaluation = self._evaluation
        hidden = {link.name for link in evaluation.plan.links}
        results = [t for report in reports for name, t in report["sent"].items() if name not in hidden]
        num_ends = sum(len(report["sent"]) for report in reports)
        num_ids = evaluation.deployment.text.ids.numel()
        return {
            "result_bytes": sum(t["payload_bytes"] + t["header_bytes"] for t in results),
            "end_bytes": sum(header_nbytes(index) for index in range(num_ends)),
            "setup_bytes": 4 * num_ids * (evaluation.control.world.world_size - 1),
        }

    def _notes(self) -> list[str]:
        """Sentences that a reader of the numbers must know."""
        notes = [
            f"codec {codec.name} on {codec.link.name} is not causal: later tokens leak into the perplexity"
            for codec in self._evaluation.encoders
            if not codec.causal
        ]
        if self._evaluation.config.model.load_in_8bit:
            notes.append("8-bit bitsandbytes weights mix tokens inside the model: hidden states are not causal")
        return notes


def error_key(link_index: int, microbatch_index: int) -> str:
    """Under which a sender posts the squared error of a frame."""
    return f"squared_error/{link_index}/{microbatch_index}"


def _only_on_rank_0(*_: Any) -> None:
    raise RuntimeError("results belong to rank 0")
