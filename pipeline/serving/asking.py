"""Many requests from a thread beside the ring's: submitted a few at a time, a failed one raises.

In front of the scheduler, for programs that call and wait, such as lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from typing import Any

from pipeline.generation.answer import Answer
from pipeline.generation.requests import Request
from pipeline.generation.scheduler import MAX_LOOK, Scheduler

__all__ = ["Asking", "RequestFailed"]

_FINISHED = ("stop", "length")


class RequestFailed(RuntimeError):
    """A request that has no answer; the message names it."""


class Asking:
    """Requests in, answers out.

    Args:
        tokenizer: transformers'.
        link_names: of the links of hidden states.

    Attributes:
        num_requests, num_prompt_tokens, num_scored_tokens, num_generated_tokens: of all that were answered.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: Any, link_names: Sequence[str]) -> None:
        self.num_requests = self.num_prompt_tokens = self.num_scored_tokens = self.num_generated_tokens = 0
        self._scheduler, self._tokenizer, self._link_names = scheduler, tokenizer, link_names
        # As many as the scheduler looks at when it looks for what is shared.
        self._most = max(2 * scheduler.num_slots, MAX_LOOK)

    def ask(self, requests: Iterable[tuple[str, Request]], take: Callable[[int, Answer], None]) -> None:
        """Submit named requests in order, and call `take` with each one's place and its answer as answers come.

        Raises RequestFailed, naming the request, for the first that has no whole answer; the others are cancelled.
        """
        finished: SimpleQueue[int] = SimpleQueue()
        in_flight: dict[int, tuple[str, Answer]] = {}

        def take_one() -> None:
            place = finished.get()
            name, answer = in_flight.pop(place)
            self._check(name, answer)
            take(place, answer)

        try:
            for place, (name, request) in enumerate(requests):
                while len(in_flight) >= self._most:
                    take_one()
                answer = Answer(
                    request,
                    self._tokenizer,
                    link_names=self._link_names,
                    on_finish=lambda answer, place=place: finished.put(place),  # type: ignore[misc]
                )
                in_flight[place] = name, answer
                self._scheduler.submit(answer)
            while in_flight:
                take_one()
        finally:
            for _, answer in in_flight.values():
                answer.cancel()

    def _check(self, name: str, answer: Answer) -> None:
        request = answer.request
        if answer.error is not None or answer.finish_reason not in _FINISHED:
            raise RequestFailed(f"{name} has failed: {answer.error or answer.finish_reason}")
        num_scored = len(answer.prompt_logprobs)
        if not answer.is_scored:
            raise RequestFailed(f"{name} has {num_scored} log-probabilities, which are not all that were asked for")
        self.num_requests += 1
        self.num_prompt_tokens += len(request.prompt_ids)
        self.num_scored_tokens += num_scored
        self.num_generated_tokens += len(answer.token_ids)
