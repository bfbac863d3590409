"""The ring behind the endpoint: the main thread drives it, whoever asks, and however often it is formed again."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressors.console import show
from pipeline.comm.watchdog import tell
from pipeline.config.schema import RunConfig
from pipeline.generation.generate import make_request_maker, make_scheduler, session_digest
from pipeline.generation.record import Session, generation_record
from pipeline.generation.ring import GenerationRing
from pipeline.generation.scheduler import Scheduler
from pipeline.records.generation_record import Interruptions
from pipeline.records.labels import model_label
from pipeline.records.store import write_generation
from pipeline.runtime.deployment import Deployment
from pipeline.serving.app import make_app
from pipeline.serving.server import HttpServer, bind, read_key, warn_of_exposure
from pipeline.serving.service import Service

__all__ = ["ServeJob"]


class ServeJob:
    """An endpoint until a signal ends it; `run` is called again where the ring was formed again.

    Made on every rank, opened on rank 0. Raises ConfigError for an address or a key that cannot be used.
    """

    def __init__(self, config: RunConfig, *, is_first: bool) -> None:
        self._config = config
        self._bound: socket.socket | None = None
        if is_first:
            self._key = read_key(config.serving)
            self._bound = bind(config.serving)
            warn_of_exposure(self._bound, has_key=self._key is not None)
        self._front: _Front | None = None
        self._first_start_s: float | None = None
        self._is_ready = False
        self._was_started_again = False

    @property
    def progress(self) -> int | None:
        """On rank 0, as `Scheduler.progress`."""
        return self._front.scheduler.progress if self._front else 0

    def run(self, deployment: Deployment) -> Path | None:
        """Until a signal ends it; the record on rank 0, None on the others. Every rank calls it."""
        control = deployment.control
        ring = GenerationRing(self._config, deployment)
        front, _ = control.together(lambda: (self._prepare(ring), None))
        control.watchdog.let_stop(self._stop)
        start_s = time.perf_counter()
        self._first_start_s = self._first_start_s or start_s
        self._is_ready = True
        try:
            reports = ring.run(front.scheduler if front else None)
        finally:
            self._is_ready = False
        ring.close()
        if front is None:
            return None
        front.server.join()
        if front.server.problem is not None:
            raise front.server.problem
        return self._record(front, ring, reports, earlier_s=start_s - self._first_start_s)

    def _prepare(self, ring: GenerationRing) -> _Front | None:
        control = ring.deployment.control
        if self._bound is None:
            return None
        if self._front is not None:
            self._front.scheduler.begin_again(ring.drafting)
            return self._front
        self._was_started_again = control.came_before("serving")
        server, scheduler = HttpServer(self._bound), make_scheduler(ring)
        control.own_ports.add(server.port)
        serving = self._config.serving
        service = Service(
            scheduler,
            make_request_maker(ring),
            [link.name for link in ring.deployment.plan.links],
            server.loop,
            model=model_label(self._config.model.name),
            max_waiting=serving.max_waiting,
        )
        app = make_app(
            service,
            api_key=self._key,
            is_local=server.is_local,
            max_body_nbytes=serving.max_body_nbytes,
            is_ready=lambda: self._is_ready,
        )
        server.start(app, max_answers=scheduler.num_slots + serving.max_waiting, on_end=scheduler.close)
        show(f"{service.model} answers at {server.url}/v1; Ctrl-C ends it\n")
        self._front = _Front(scheduler, service, server)
        return self._front

    def _stop(self) -> None:
        """A signal has come, here or, on rank 0, on another rank."""
        if self._front is not None:
            self._front.server.call(self._end)

    async def _end(self) -> None:
        assert self._front is not None
        wait_s = self._config.serving.shutdown_s
        tell(f"\nno more requests are taken; those under way have {wait_s:g} s; a second Ctrl-C ends at once\n")
        await self._front.service.stop(wait_s)
        self._front.server.stop()

    def _record(
        self, front: _Front, ring: GenerationRing, reports: Sequence[Mapping[str, Any]], *, earlier_s: float
    ) -> Path:
        control = ring.deployment.control
        session = Session(
            digest=session_digest(ring, None),
            tally=front.service.tally,
            num_taken_over=0,
            earlier_s=earlier_s,
            interruptions=Interruptions(
                count=control.num_interruptions,
                pause_s=control.pause_s,
                tokens_prefilled_again=front.scheduler.num_prefilled_again,
                started_again=self._was_started_again,
            ),
            drafting=front.scheduler.drafting,
        )
        return write_generation(Path(self._config.exp_dir), generation_record(ring, session, reports))


@dataclass(frozen=True)
class _Front:
    """Rank 0's part, which outlives a ring."""

    scheduler: Scheduler
    service: Service
    server: HttpServer
