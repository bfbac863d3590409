"""Answer a list of prompts: one that is shown while it comes, or many from a file."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from compressors.console import show
from pipeline.comm.watchdog import bounded
from pipeline.config.schema import ConfigError, RunConfig
from pipeline.data.text import load_tokenizer
from pipeline.drafting.policy import Drafting
from pipeline.generation.answer import Answer, refusal_line
from pipeline.generation.answers_file import AnswersFile
from pipeline.generation.record import Session, Tally, generation_record
from pipeline.generation.requests import RefusedRequest, Request, RequestMaker
from pipeline.generation.ring import GenerationRing
from pipeline.generation.scheduler import Scheduler, SchedulerConfig
from pipeline.records.files import RecordError
from pipeline.records.generation_record import Interruptions
from pipeline.records.identity import digest_of
from pipeline.records.store import write_generation
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.placement import balanced_layers

__all__ = ["Generated", "GenerationJob", "make_request_maker", "make_scheduler", "session_digest"]


@dataclass(frozen=True)
class Generated:
    """Where the record and the answers are, and the lines of requests that failed."""

    record: Path
    answers: Path
    failed: list[dict[str, Any]]


def make_scheduler(ring: GenerationRing) -> Scheduler:
    """For rank 0."""
    config = SchedulerConfig(
        num_slots=ring.config.generation.max_slots,
        slot_length=ring.slot_length,
        prefill_chunk=ring.prefill_chunk,
        passes=ring.passes,
        shares_prefixes=not ring.mixes_tokens,
        shares_answers=ring.decode_codecs is ring.codecs,
        shares_passes=not ring.mixes_tokens,
    )
    return Scheduler(config, ring.drafting)


def make_request_maker(ring: GenerationRing) -> RequestMaker:
    """For rank 0: loads the checkpoint's tokenizer."""
    config, deployment = ring.config, ring.deployment
    return RequestMaker(
        tokenizer=load_tokenizer(deployment.model.directory, trust_remote_code=config.model.trust_remote_code),
        generation=config.generation,
        defaults=ring.defaults,
        vocab_size=deployment.model.config.vocab_size,
        slot_length=ring.slot_length,
    )


def session_digest(ring: GenerationRing, requests: Sequence[Request | RefusedRequest] | None) -> str:
    """Of all that decides over answers; None for requests that come as they come."""
    config, deployment = ring.config, ring.deployment
    return digest_of(
        {
            **config.numerics(balanced_layers(config, deployment.plan)),
            "checkpoint": deployment.model.weights_digest,
            "requests": None if requests is None else [dataclasses.asdict(request) for request in requests],
        }
    )


class _Batch:
    """Rank 0's part: which requests are left, the file of answers, what is seen.

    Requests are a list, or come while the ring runs, and are then taken in on a thread of its own.
    """

    def __init__(
        self,
        ring: GenerationRing,
        requests: Iterable[Request | RefusedRequest],
        tokenizer: Any,
        *,
        resume: bool,
        is_shown: bool,
    ) -> None:
        config, deployment = ring.config, ring.deployment
        known = requests if isinstance(requests, list) else None
        self.digest = session_digest(ring, known)
        self.file = AnswersFile(Path(config.exp_dir), self.digest, resume=resume)
        if strange := self.file.done.keys() - {request.line for request in known or ()}:
            raise RecordError(
                f"{self.file.path} has an answer to line {min(strange)}, which is no prompt; delete the file to start "
                "over"
            )
        self.scheduler = make_scheduler(ring)
        self.tally = Tally()
        self.failed: list[dict[str, Any]] = []
        self._tokenizer, self._shows = tokenizer, is_shown
        self._links = [link.name for link in deployment.plan.links]
        self._bar = tqdm(
            total=None if known is None else len(known),
            initial=len(self.file.done),
            unit="prompt",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=self._shows,
        )
        self._writing = threading.Lock()
        self._start_s = time.monotonic()
        self._problem: Exception | None = None
        if known is None:
            threading.Thread(target=self._take_as_they_come, args=[requests], name="requests", daemon=True).start()
        else:
            self._take(known)
            self.scheduler.close()

    def close(self) -> None:
        """Raises what was wrong with the requests' source."""
        bounded(self._bar.close)
        self.file.close()
        if self._problem is not None:
            raise self._problem

    def _take_as_they_come(self, requests: Iterable[Request | RefusedRequest]) -> None:
        try:
            self._take(requests)
        except Exception as e:  # told on the main thread, once the ring is at rest
            self._problem = e
        finally:
            self.scheduler.close()

    def _take(self, requests: Iterable[Request | RefusedRequest]) -> None:
        for request in requests:
            if request.line in self.file.done:
                continue
            if isinstance(request, RefusedRequest):
                self._write(refusal_line(request))
                continue
            answer = Answer(
                request,
                self._tokenizer,
                link_names=self._links,
                on_text=show if self._shows else _ignore,
                on_finish=lambda answer: self._write(answer.as_line(), answer.token_gaps_s),
            )
            self.scheduler.submit(answer)

    def _write(self, line: dict[str, Any], gaps_s: Sequence[float] = ()) -> None:
        with self._writing:
            self.tally.add(line, gaps_s)
            if line["error"] is not None:
                self.failed.append(line)
            self.file.add(line)
            num_tokens = self.tally.generated_tokens
            rate = num_tokens / max(time.monotonic() - self._start_s, 1e-9)
            words = [f"{num_tokens} tokens", f"{rate:.1f} tokens/s", *_worth(self.scheduler.drafting)]
            self._bar.set_postfix_str(", ".join(words), refresh=False)
            self._bar.update()


class GenerationJob:
    """Requests to be answered, on whatever ring there is: `run` is called again where it was formed again.

    With `shown`, the answer is printed behind it while it comes. `read`, called on rank 0, gives the requests: a list,
    or what gives them as they come, which cannot be resumed.
    """

    def __init__(
        self,
        config: RunConfig,
        read: Callable[[RequestMaker], Iterable[Request | RefusedRequest]],
        *,
        resume: bool,
        shown: str | None = None,
    ) -> None:
        self._config, self._read, self._resume, self._shown = config, read, resume, shown
        self._batch: _Batch | None = None
        self._result: Generated | None = None
        self._first_start_s: float | None = None
        self._was_started_again = False

    @property
    def progress(self) -> int | None:
        """On rank 0, as `Scheduler.progress`."""
        return self._batch.scheduler.progress if self._batch else 0

    def run(self, deployment: Deployment) -> Generated | None:
        """Answer what is left; None on other ranks than 0."""
        control = deployment.control
        ring = GenerationRing(self._config, deployment)
        control.report("reading prompts")
        batch, _ = control.together(lambda: (self._prepare(ring), None))
        start_s = time.perf_counter()
        self._first_start_s = self._first_start_s or start_s
        reports = ring.run(batch.scheduler if batch else None)
        ring.close()
        if batch is not None and self._result is None:
            self._result = self._finish(batch, ring, reports, earlier_s=start_s - self._first_start_s)
        return self._result

    def _finish(
        self, batch: _Batch, ring: GenerationRing, reports: Sequence[Mapping[str, Any]], *, earlier_s: float
    ) -> Generated:
        batch.close()
        control = ring.deployment.control
        session = Session(
            digest=batch.digest,
            tally=batch.tally,
            num_taken_over=len(batch.file.done),
            earlier_s=earlier_s,
            interruptions=Interruptions(
                count=control.num_interruptions,
                pause_s=control.pause_s,
                tokens_prefilled_again=batch.scheduler.num_prefilled_again,
                started_again=self._was_started_again,
            ),
            drafting=batch.scheduler.drafting,
        )
        path = write_generation(Path(self._config.exp_dir), generation_record(ring, session, reports))
        return Generated(path, batch.file.path, batch.failed)

    def _prepare(self, ring: GenerationRing) -> _Batch | None:
        control = ring.deployment.control
        if control.world.rank != 0:
            return None
        if self._batch is not None:
            self._batch.scheduler.begin_again(ring.drafting)
            return self._batch
        maker = make_request_maker(ring)
        requests = self._read(maker)
        self._was_started_again = control.came_before("requests")
        if self._was_started_again and not isinstance(requests, list):
            raise ConfigError(
                "rank 0 was started again, and cannot read standard input once more: lines that had been read and have "
                f"no answer in {self._config.exp_dir} are lost; write prompts to a .jsonl file, which is gone on with"
            )
        resume = self._resume or self._was_started_again
        self._batch = _Batch(ring, requests, maker.tokenizer, resume=resume, is_shown=self._shown is not None)
        if self._shown is not None:
            if self._was_started_again:
                show("\n[rank 0 was started again; an answer that was not finished begins anew]\n")
            show(self._shown)
        return self._batch


def _worth(drafting: Drafting | None) -> list[str]:
    """Of drafts so far, in words."""
    if drafting is None or not drafting.figures.passes:
        return []
    figures = drafting.figures
    num_judged, num_right = figures.num_judged_and_right()
    accepted = [f"{num_right / num_judged:.0%} of drafts right"] if num_judged else []
    return [f"{figures.tokens / figures.passes:.2f} tokens/pass", *accepted]


def _ignore(text: str) -> None:
    pass
