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

__all__ = ["ChatJob", "Conversation"]

GREETING = "Write to the model; an empty line or the end of input (Ctrl-D) ends the conversation."


class ChatJob:
    """A conversation until the input ends; `run` is called again where the ring was formed again."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._scheduler: Scheduler | None = None
        self._conversation: Conversation | None = None

    @property
    def progress(self) -> int | None:
        """On rank 0, as `Scheduler.progress`."""
        return self._scheduler.progress if self._scheduler else 0

    def run(self, deployment: Deployment) -> None:
        """Every rank calls it."""
        ring = GenerationRing(self._config, deployment)

        def prepare() -> tuple[None, None]:
            if deployment.control.world.rank == 0:
                self._prepare(ring)
            return None, None

        deployment.control.together(prepare)
        if self._conversation is not None and not self._conversation.has_begun:
            self._conversation.begin()
        ring.run(self._scheduler)
        ring.close()
        if self._conversation is not None and self._conversation.problem is not None:
            raise self._conversation.problem

    def _prepare(self, ring: GenerationRing) -> None:
        if self._scheduler is not None:
            self._scheduler.begin_again(ring.drafting)
            return
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 costs its turn, not the conversation
        maker = make_request_maker(ring)
        maker.make({"messages": [{"role": "user", "content": "Hello"}]})  # without a template, say so now
        if ring.deployment.control.came_before("conversation"):
            show("\n[rank 0 was started again; the conversation so far is lost]\n")
        self._scheduler = make_scheduler(ring)
        links = [link.name for link in ring.deployment.plan.links]
        self._conversation = Conversation(self._scheduler, maker, links, sys.stdin)


class Conversation:
    """What is said, on a thread of its own: the main thread drives the ring.

    `problem` is what ended it early, told on the main thread once the ring is at rest.
    """

    def __init__(self, scheduler: Scheduler, maker: RequestMaker, link_names: list[str], source: TextIO) -> None:
        self._scheduler, self._maker, self._link_names = scheduler, maker, link_names
        self._source = source
        self.problem: Exception | None = None
        self._messages: list[dict[str, str]] = []
        self.has_begun = False

    def begin(self) -> None:
        self.has_begun = True
        threading.Thread(target=self.run, name="conversation", daemon=True).start()

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
