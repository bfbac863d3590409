"""From a request's body to answers and what is told of them, and the end of it all.

On the server's thread, an asyncio loop. Answers' callbacks come on the ring's thread and are handed over. Prompts are
read and tokenised on a third one, so that a long one holds up neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.comm.watchdog import tell
from pipeline.config.schema import MAX_SEED
from pipeline.generation.answer import Answer
from pipeline.generation.record import Tally
from pipeline.generation.requests import Request, RequestMaker
from pipeline.generation.scheduler import Scheduler
from pipeline.serving.api_types import ChatBody, CompletionBody, SharedBody
from pipeline.serving.errors import ApiError, busy, failed, refused, shutting_down
from pipeline.serving.metrics import Metrics
from pipeline.serving.replies import ChatReply, Choice, CompletionReply, Reply
from pipeline.serving.token_text import TokenTexts, TokenTrail

__all__ = ["Service", "Ticket"]

DEFAULT_MAX_TOKENS = 16  # of a completion, as the API has it
MAX_LISTED = 1000  # of answers, whose figures the record has one by one
_LOOK_S = 0.02
_DROP_S = 5.0  # for answers that are dropped to leave the ring
_MAX_NAMED = 20  # of them


class Ticket:
    """An HTTP request that was taken: its answers, and what comes of them."""

    def __init__(self, reply: Reply, *, streams: bool) -> None:
        self.reply, self.streams = reply, streams
        self.choices: list[Choice] = []
        self._events: asyncio.Queue[tuple[Choice, str | None] | None] = asyncio.Queue()

    def put(self, choice: Choice, text: str | None) -> None:
        """On the loop: new text, or None for the end of a choice."""
        self._events.put_nowait((choice, text))

    def drop(self) -> None:
        """On the loop: nothing more will come."""
        self._events.put_nowait(None)

    async def events(self) -> AsyncIterator[tuple[Choice, str | None]]:
        """Until all choices have finished. Raises ApiError where one fails, or the server ends before."""
        num_left = len(self.choices)
        while num_left:
            event = await self._events.get()
            if event is None:
                raise shutting_down()
            choice, text = event
            if text is None:
                num_left -= 1
                if choice.answer.error is not None:
                    raise failed(choice.answer.error)
                if choice.answer.finish_reason == "cancelled":
                    raise shutting_down()
                if not choice.answer.is_scored:
                    raise failed("generation.deadline_s was over before the prompt's log-probabilities were there")
            yield choice, text

    def cancel(self) -> None:
        """Nobody waits for what has not finished."""
        for choice in self.choices:
            if not choice.answer.is_finished:
                choice.answer.cancel()


class Service:
    """The answers of a server, for as long as it serves.

    Args:
        loop: the server's, on which all else is called.
        model: the name under which the model is asked for.
        max_waiting: answers beside those that have a slot.

    Attributes:
        metrics: what `/metrics` tells.
        tally: of answers that have ended, for the record.
        is_stopping: whether no more requests are taken.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        maker: RequestMaker,
        link_names: Sequence[str],
        loop: asyncio.AbstractEventLoop,
        *,
        model: str,
        max_waiting: int,
    ) -> None:
        self.model, self.created = model, int(time.time())
        self.metrics = Metrics(scheduler, link_names)
        self.tally = Tally(max_listed=MAX_LISTED)
        self.is_stopping = self._is_closed = False
        self._scheduler, self._maker, self._link_names = scheduler, maker, link_names
        self._capacity, self._num_unfinished, self._num_taken = scheduler.num_slots + max_waiting, 0, 0
        self._tickets: set[Ticket] = set()
        self._texts = TokenTexts(maker.tokenizer)
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="requests")
        self._loop = loop

    async def take(self, read: Callable[[], SharedBody]) -> Ticket:
        """Submit the answers that a body, which `read` gives, asks for. Raises ApiError."""
        arrived_s = time.monotonic()
        self._check_room(1)
        loop = asyncio.get_running_loop()
        body = await loop.run_in_executor(self._reading, read)
        self.check_model(body.model)
        num_choices = _num_choices(body)
        if num_choices > self._capacity:
            raise refused(f"n times the prompts is {num_choices}, of at most {self._capacity} answers at once", "n")
        self._check_room(num_choices)
        self._num_unfinished += num_choices
        try:
            requests = await loop.run_in_executor(self._reading, self._requests, body)
            if self._is_closed:
                raise shutting_down()
            ticket = self._ticket(body, requests, arrived_s)
        except BaseException:
            self._left(num_choices)
            raise
        self._tickets.add(ticket)
        for choice in ticket.choices:
            self._scheduler.submit(choice.answer)
        return ticket

    def check_model(self, name: str) -> None:
        """Raise ApiError for another than there is."""
        if name != self.model:
            message = f"there is no model {name!r}, only {self.model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def end(self, ticket: Ticket) -> None:
        """Its client has all that it will get."""
        self._tickets.discard(ticket)
        ticket.cancel()

    async def stop(self, wait_s: float) -> None:
        """Take no more requests, let those under way come to their end for so long, then drop and name the others."""
        self.is_stopping = True
        if not await self._is_left(wait_s):
            self._drop()
            await self._is_left(_DROP_S)
        self._is_closed = True
        self._scheduler.close()
        self._reading.shutdown(wait=False)

    async def _is_left(self, wait_s: float) -> bool:
        """Whether no answer is under way any more, at the latest after `wait_s`."""
        end_s = time.monotonic() + wait_s
        while self._num_unfinished and time.monotonic() < end_s:
            await asyncio.sleep(_LOOK_S)
        return not self._num_unfinished

    def _drop(self) -> None:
        left = [(t, c) for t in self._tickets for c in t.choices if not c.answer.is_finished]
        for ticket, choice in left[:_MAX_NAMED]:
            num_tokens, most = len(choice.answer.token_ids), choice.answer.request.max_new_tokens
            tell(f"dropped: {ticket.reply.id}, choice {choice.index}, after {num_tokens} of at most {most} tokens\n")
        if len(left) > _MAX_NAMED:
            tell(f"dropped: {len(left) - _MAX_NAMED} more\n")
        for ticket in {ticket for ticket, _ in left}:
            ticket.drop()
            ticket.cancel()

    def _check_room(self, num_choices: int) -> None:
        if self.is_stopping:
            raise shutting_down()
        if self._num_unfinished + num_choices > self._capacity:
            raise busy(f"{self._num_unfinished} answers are under way or wait, of at most {self._capacity}; try again")

    def _left(self, num_choices: int) -> None:
        self._num_unfinished -= num_choices

    def _requests(self, body: SharedBody) -> list[Request]:
        """One for each prompt. Raises ApiError."""
        own = body.options()
        try:
            if isinstance(body, ChatBody):
                return [self._chat_request(body, own)]
            assert isinstance(body, CompletionBody)
            length = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
            own |= {"max_new_tokens": length, "logprobs": body.logprobs, "echo": bool(body.echo)}
            return [self._maker.make({"prompt": prompt, **own}) for prompt in body.prompts()]
        except ValueError as e:
            raise refused(str(e).replace("max_new_tokens", "max_tokens")) from e

    def _chat_request(self, body: ChatBody, own: dict[str, Any]) -> Request:
        """Without a length of its own it may fill its slot."""
        own |= {"logprobs": (body.top_logprobs or 0) if body.logprobs else None, "echo": False}
        length = body.max_completion_tokens or body.max_tokens
        messages = [message.as_plain() for message in body.messages]
        request = self._maker.make({"messages": messages, **own, "max_new_tokens": length or 1})
        if length is not None:
            return request
        return dataclasses.replace(request, max_new_tokens=self._maker.slot_length - len(request.prompt_ids))

    def _ticket(self, body: SharedBody, requests: Sequence[Request], arrived_s: float) -> Ticket:
        kind = ChatReply if isinstance(body, ChatBody) else CompletionReply
        reply = kind(self.model, self._texts, includes_usage=body.includes_usage)
        ticket = Ticket(reply, streams=bool(body.stream))
        first_seed = secrets.randbelow(MAX_SEED) if body.seed is None else body.seed
        for request in requests:
            echoed = self._echoed(body, request)
            for number in range(body.num_choices):
                seed = (first_seed + number) % (MAX_SEED + 1)
                self._num_taken += 1
                own = dataclasses.replace(
                    request, line=self._num_taken, sampling=dataclasses.replace(request.sampling, seed=seed)
                )
                ticket.choices.append(self._choice(ticket, own, echoed, arrived_s))
        return ticket

    def _echoed(self, body: SharedBody, request: Request) -> str | None:
        """What stands in front of answers to a prompt: of one that came as ids the text that they have in answers."""
        if not isinstance(body, CompletionBody) or not body.echo:
            return None
        if isinstance(body.prompt, str) or isinstance(body.prompt[0], str):
            return request.text
        ids, tokenizer = request.prompt_ids, self._maker.tokenizer
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _choice(self, ticket: Ticket, request: Request, echoed: str | None, arrived_s: float) -> Choice:
        def on_text(text: str) -> None:
            self._hand_over(ticket.put, choice, text)

        def on_finish(answer: Answer) -> None:
            self._hand_over(self._finished, ticket, choice, arrived_s)

        answer = Answer(
            request,
            self._maker.tokenizer,
            link_names=self._link_names,
            on_text=on_text if ticket.streams else _ignore,
            on_finish=on_finish,
        )
        trail = None
        if request.logprobs is not None:
            trail = TokenTrail(answer, self._maker.tokenizer, echoed=echoed)
        choice = Choice(len(ticket.choices), answer, trail, echoed or "")
        return choice

    def _hand_over(self, work: Callable[..., None], *arguments: Any) -> None:
        """From the ring's thread, which nothing here may stop."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(work, *arguments)

    def _finished(self, ticket: Ticket, choice: Choice, arrived_s: float) -> None:
        self._left(1)
        answer = choice.answer
        self.tally.add(answer.as_line(), answer.token_gaps_s)
        self.metrics.count_answer(answer, arrived_s)
        ticket.put(choice, None)


def _num_choices(body: SharedBody) -> int:
    return body.num_choices * (len(body.prompts()) if isinstance(body, CompletionBody) else 1)


def _ignore(text: str) -> None:
    pass
