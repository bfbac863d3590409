"""Answer a list of prompts: one that is shown while it comes, or many from a file."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from compressors.console import show
from pipeline.comm.watchdog import bounded
from pipeline.config.schema import RunConfig
from pipeline.data.text import load_tokenizer
from pipeline.generation.answer import Answer, refusal_line
from pipeline.generation.answers_file import AnswersFile
from pipeline.generation.record import generation_record
from pipeline.generation.requests import RefusedRequest, Request, RequestMaker
from pipeline.generation.ring import GenerationRing
from pipeline.generation.scheduler import Scheduler
from pipeline.records.files import RecordError
from pipeline.records.identity import digest_of
from pipeline.records.store import write_generation
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.placement import balanced_layers

__all__ = ["Generated", "generate", "make_request_maker", "make_scheduler"]


@dataclass(frozen=True)
class Generated:
    """Where the record and the answers are, and the lines of requests that failed."""

    record: Path
    answers: Path
    failed: list[dict[str, Any]]


def make_scheduler(ring: GenerationRing) -> Scheduler:
    """For rank 0."""
    return Scheduler(
        num_slots=ring.config.generation.max_slots,
        slot_length=ring.slot_length,
        prefill_chunk=ring.prefill_chunk,
        passes=ring.passes,
        shares_prefixes=not ring.mixes_tokens,
        shares_answers=ring.decode_codecs is ring.codecs,
        shares_passes=not ring.mixes_tokens,
    )


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
        shown: str | None,
    ) -> None:
        config, deployment = ring.config, ring.deployment
        known = requests if isinstance(requests, list) else None
        self.digest = digest_of(
            {
                **config.numerics(balanced_layers(config, deployment.plan)),
                "checkpoint": deployment.model.checkpoint_digest,
                "requests": None if known is None else [dataclasses.asdict(request) for request in known],
            }
        )
        self.file = AnswersFile(Path(config.exp_dir), self.digest, resume=resume)
        if strange := self.file.done.keys() - {request.line for request in known or ()}:
            raise RecordError(
                f"{self.file.path} has an answer to line {min(strange)}, which is no prompt; delete the file to start "
                "over"
            )
        self.scheduler = make_scheduler(ring)
        self.lines: list[dict[str, Any]] = []
        self.answers: list[Answer] = []
        self._tokenizer, self._shows = tokenizer, shown is not None
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
        self._num_tokens, self._start_s = 0, time.monotonic()
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
                on_finish=lambda answer: self._write(answer.as_line()),
            )
            self.answers.append(answer)
            self.scheduler.submit(answer)

    def _write(self, line: dict[str, Any]) -> None:
        with self._writing:
            self._num_tokens += len(line["token_ids"])
            self.lines.append(line)
            self.file.add(line)
            rate = self._num_tokens / max(time.monotonic() - self._start_s, 1e-9)
            self._bar.set_postfix_str(f"{self._num_tokens} tokens, {rate:.1f} tokens/s", refresh=False)
            self._bar.update()


def generate(
    config: RunConfig,
    deployment: Deployment,
    read: Callable[[RequestMaker], Iterable[Request | RefusedRequest]],
    *,
    resume: bool,
    shown: str | None = None,
) -> Generated | None:
    """Answer requests; None on other ranks than 0. With `shown`, the answer is printed behind it while it comes.

    `read`, called on rank 0, gives the requests: a list, or what gives them as they come, which cannot be resumed.
    """
    control = deployment.control
    ring = GenerationRing(config, deployment)

    def prepare() -> tuple[_Batch | None, None]:
        if control.world.rank != 0:
            return None, None
        maker = make_request_maker(ring)
        return _Batch(ring, read(maker), maker.tokenizer, resume=resume, shown=shown), None

    control.report("reading prompts")
    batch, _ = control.together(prepare)
    if shown is not None and batch is not None:
        show(shown)
    reports = ring.run(batch.scheduler if batch else None)
    ring.close()
    if batch is None:
        return None
    batch.close()
    record = generation_record(ring, batch.lines, batch.answers, len(batch.file.done), reports, batch.digest)
    path = write_generation(Path(config.exp_dir), record)
    return Generated(path, batch.file.path, [line for line in batch.lines if line["error"] is not None])


def _ignore(text: str) -> None:
    pass
