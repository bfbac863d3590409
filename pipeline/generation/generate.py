"""Answer a list of prompts: one that is shown while it comes, or many from a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.comm.watchdog import bounded
from pipeline.config.schema import RunConfig
from pipeline.generation.answer import Answer
from pipeline.generation.answers_file import AnswersFile
from pipeline.generation.record import generation_record, write_generation_record
from pipeline.generation.requests import Request
from pipeline.generation.ring import GenerationRing
from pipeline.generation.scheduler import Scheduler
from pipeline.records.store import digest_of
from pipeline.runtime.deployment import Deployment

__all__ = ["generate", "make_scheduler"]


def make_scheduler(ring: GenerationRing) -> Scheduler:
    """For rank 0."""
    return Scheduler(
        num_slots=ring.config.generation.max_slots,
        slot_length=ring.slot_length,
        prefill_chunk=ring.prefill_chunk,
        passes=ring.passes,
        shares_prefixes=not ring.mixes_tokens,
    )


class _Batch:
    """Rank 0's part: which requests are left, the file of answers, what is seen."""

    def __init__(self, ring: GenerationRing, requests: Sequence[Request], tokenizer: Any, *, resume: bool) -> None:
        self._ring, self._requests = ring, requests
        config, deployment = ring.config, ring.deployment
        self.digest = digest_of(
            {
                **config.numerics(),
                "generation": config.as_dict()["generation"],
                "checkpoint": deployment.checkpoint_digest,
                "requests": [request.as_json() for request in requests],
            }
        )
        self.file = AnswersFile(Path(config.exp_dir), self.digest, resume=resume)
        self.scheduler = make_scheduler(ring)
        self._is_streamed = len(requests) == 1
        self._bar = tqdm(
            total=len(requests),
            initial=len(self.file.done),
            unit="prompt",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=self._is_streamed,
        )
        self._num_tokens, self._start_s = 0, time.monotonic()
        self.answers: list[Answer] = []
        links = [link.name for link in deployment.plan.links]
        for request in requests:
            if request.index in self.file.done:
                continue
            answer = Answer(
                request,
                tokenizer,
                eos_ids=ring.eos_ids,
                link_names=links,
                on_text=_show if self._is_streamed else _ignore,
                on_finish=self._finish,
            )
            self.answers.append(answer)
            error = request.error or self._misfit(request)
            if error is None:
                self.scheduler.submit(answer)
            else:
                answer.finish("error", error)
        self.scheduler.close()

    def _misfit(self, request: Request) -> str | None:
        num_prompt, room = len(request.prompt_ids), self._ring.slot_length
        if num_prompt > room:
            return (
                f"the prompt has {num_prompt} tokens, a slot has room for {room} (generation.max_length), the answer "
                "included"
            )
        return None

    def _finish(self, answer: Answer) -> None:
        self.file.add(answer.as_line())
        self._num_tokens += len(answer.token_ids)
        rate = self._num_tokens / max(time.monotonic() - self._start_s, 1e-9)
        self._bar.set_postfix_str(f"{self._num_tokens} tokens, {rate:.1f} tokens/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        bounded(self._bar.close)
        self.file.close()


def generate(
    config: RunConfig,
    deployment: Deployment,
    read_requests: Callable[[GenerationRing], tuple[Sequence[Request], Any]],
    *,
    resume: bool,
) -> tuple[Path, Path, list[dict[str, Any]]] | None:
    """Answer requests; on rank 0 the record, the file of answers and the lines of those that failed, else None.

    `read_requests`, called on rank 0, gives the requests and the tokenizer.
    """
    control = deployment.control
    ring = GenerationRing(config, deployment)

    def prepare() -> tuple[_Batch | None, None]:
        if control.world.rank != 0:
            return None, None
        requests, tokenizer = read_requests(ring)
        return _Batch(ring, requests, tokenizer, resume=resume), None

    control.report("reading prompts")
    batch, _ = control.together(prepare)
    reports = ring.run(batch.scheduler if batch else None)
    ring.close()
    if batch is None:
        return None
    batch.close()
    record = generation_record(ring, batch.answers, list(batch.file.done.values()), reports, batch.digest)
    path = write_generation_record(Path(config.exp_dir), record)
    return path, batch.file.path, [a.as_line() for a in batch.answers if a.error is not None]


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _ignore(text: str) -> None:
    pass
