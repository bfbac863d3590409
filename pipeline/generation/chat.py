"""A conversation in the terminal: lines in, answers as they come, the ring idle in between.

Each turn sends the whole conversation through the model's chat template; what a slot holds of it already is not
computed again.
"""

from __future__ import annotations

import io
import sys
import threading
from typing import TextIO

from compressors.console import show
from pipeline.config.schema import RunConfig
from pipeline.generation.answer import Answer
from pipeline.generation.generate import make_request_maker, make_scheduler
from pipeline.generation.requests import RequestMaker
from pipeline.generation.ring import GenerationRing
from pipeline.generation.scheduler import Scheduler
from pipeline.runtime.deployment import Deployment

__all__ = ["Conversation", "chat"]

GREETING = "Write to the model; an empty line or the end of input (Ctrl-D) ends the conversation."


def chat(config: RunConfig, deployment: Deployment) -> None:
    """Talk until the input ends; every rank calls it."""
    control = deployment.control
    ring = GenerationRing(config, deployment)

    def prepare() -> tuple[tuple[Scheduler, RequestMaker] | None, None]:
        if control.world.rank != 0:
            return None, None
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 costs its turn, not the conversation
        maker = make_request_maker(ring)
        maker.make({"messages": [{"role": "user", "content": "Hello"}]})  # without a template, say so now
        return (make_scheduler(ring), maker), None

    prepared, _ = control.together(prepare)
    if prepared is None:
        ring.run(None)
    else:
        scheduler, maker = prepared
        links = [link.name for link in deployment.plan.links]
        conversation = Conversation(scheduler, maker, links, sys.stdin)
        threading.Thread(target=conversation.run, name="conversation", daemon=True).start()
        ring.run(scheduler)
        if conversation.problem is not None:
            raise conversation.problem
    ring.close()


class Conversation:
    """What is said, on a thread of its own: the main thread drives the ring.

    `problem` is what ended it early, told on the main thread once the ring is at rest.
    """

    def __init__(self, scheduler: Scheduler, maker: RequestMaker, link_names: list[str], source: TextIO) -> None:
        self._scheduler, self._maker, self._link_names = scheduler, maker, link_names
        self._source = source
        self.problem: Exception | None = None
        self._messages: list[dict[str, str]] = []

    def run(self) -> None:
        """Until the input ends; then the scheduler is closed."""
        try:
            show(f"{GREETING}\n")
            while line := self._read():
                self._messages.append({"role": "user", "content": line})
                answer = self._answer()
                if answer is None:
                    self._messages.pop()
                else:
                    self._messages.append({"role": "assistant", "content": answer})
        except Exception as e:
            self.problem = e
        finally:
            self._scheduler.close()

    def _read(self) -> str:
        show("\n> ")
        return self._source.readline().strip()

    def _answer(self) -> str | None:
        """Of the conversation so far; None where there is none."""
        finished = threading.Event()
        try:
            request = self._maker.make({"messages": self._messages})
        except ValueError as e:
            show(f"[{e}]\n")
            return None
        answer = Answer(
            request,
            self._maker.tokenizer,
            link_names=self._link_names,
            on_text=show,
            on_finish=lambda answer: finished.set(),
        )
        self._scheduler.submit(answer)
        finished.wait()
        if answer.error is not None:
            show(f"\n[{answer.error}]\n")
            return None
        show("\n" if answer.finish_reason == "stop" else f" [{answer.finish_reason}]\n")
        return answer.text
