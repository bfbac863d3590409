"""What the endpoint tells Prometheus: a registry of its own, counted on the server's thread, read by `/metrics`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.generation.answer import Answer
from pipeline.generation.scheduler import Scheduler

__all__ = ["Metrics"]

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class Metrics:
    """Counters of requests, tokens, bytes and times; slots, queue and drafts are read from the scheduler when asked.

    `requests` has the labels `endpoint` and `outcome`.
    """

    def __init__(self, scheduler: Scheduler, link_names: Sequence[str]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "thinwire_requests",
            "HTTP requests by what came of them: completed, refused (4xx), busy (429), failed (5xx), cancelled",
            ["endpoint", "outcome"],
            registry=self._registry,
        )
        self._prompt_tokens = self._counter("thinwire_prompt_tokens", "Tokens of prompts that got a slot")
        self._generated_tokens = self._counter("thinwire_generated_tokens", "Tokens of answers")
        self._ttft_s = Histogram(
            "thinwire_time_to_first_token_seconds",
            "From a request's arrival to the first token of an answer, its waiting for a slot included",
            buckets=_TTFT_S,
            registry=self._registry,
        )
        self._tpot_s = Histogram(
            "thinwire_time_per_output_token_seconds",
            "Between tokens of an answer; those of one pass share its time",
            buckets=_TPOT_S,
            registry=self._registry,
        )
        self._link_nbytes = Counter(
            "thinwire_link_payload_bytes",
            "Payload bytes that answers sent over a link, counted at their end",
            ["link"],
            registry=self._registry,
        )
        for name in link_names:
            self._link_nbytes.labels(name)
        self._registry.register(_SchedulerCollector(scheduler))

    def count_answer(self, answer: Answer, arrived_s: float) -> None:
        """An answer has ended whose request came at `arrived_s` (`time.monotonic`)."""
        self._generated_tokens.inc(len(answer.token_ids))
        if answer.has_begun:
            self._prompt_tokens.inc(len(answer.prompt_ids))
        if answer.first_token_s is not None:
            self._ttft_s.observe(answer.first_token_s - arrived_s)
        for gap_s in answer.token_gaps_s:
            self._tpot_s.observe(gap_s)
        for name, nbytes in answer.bytes_per_link.items():
            self._link_nbytes.labels(name).inc(nbytes)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, meaning: str) -> Counter:
        return Counter(name, meaning, registry=self._registry)


class _SchedulerCollector(Collector):
    """Of the scheduler, which the ring's thread changes meanwhile: single numbers, each right by itself."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterable[Metric]:
        scheduler = self._scheduler
        yield GaugeMetricFamily("thinwire_slots", "Sequences that there is room for", scheduler.num_slots)
        yield GaugeMetricFamily("thinwire_slots_in_use", "Answers under way", scheduler.num_active)
        yield GaugeMetricFamily("thinwire_answers_waiting", "Answers that wait for a slot", scheduler.num_waiting)
        judged, accepted = (0, 0) if scheduler.drafting is None else scheduler.drafting.figures.num_judged_and_right()
        yield CounterMetricFamily("thinwire_drafts_judged", "Drafts whose place has got its token", judged)
        yield CounterMetricFamily("thinwire_drafts_accepted", "Drafts that were that token", accepted)
