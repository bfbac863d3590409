"""What a run of prompts leaves: one JSON with totals and a line of figures per request."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.drafting.figures import DepthCounts
from pipeline.drafting.policy import Drafting
from pipeline.generation.answer import quantile
from pipeline.generation.ring import GenerationRing
from pipeline.records.drafts import (
    DrafterFigures,
    Drafts,
    DraftsAtDepth,
    RecordedCosts,
    RecordedLimits,
    Undrafted,
)
from pipeline.records.environment import software_versions
from pipeline.records.generation_record import (
    GenerationLink,
    GenerationRank,
    GenerationRecord,
    GenerationResults,
    GenerationSchedule,
    Interruptions,
    RequestFigures,
    Spread,
)
from pipeline.records.identity import make_run_id
from pipeline.records.labels import model_label
from pipeline.records.run_record import Args
from pipeline.runtime.record_parts import codec_configs, emulation, planned_stages, recorded_model, stage_seconds

__all__ = [
    "Session",
    "Tally",
    "generation_record",
    "interruption_notes",
    "recorded_drafts",
    "recorded_link",
    "recorded_ranks",
    "recorded_schedule",
]

_GAPS_LISTED = 100  # tokens


class Tally:
    """What came of requests, added up: totals of all, and of each its figures.

    With `max_listed`, which bounds what it takes, these are those of the last requests, and times those of the last
    `_GAPS_LISTED` tokens of as many requests.
    """

    def __init__(self, max_listed: int | None = None) -> None:
        self.num_requests = self.num_failed = self.prompt_tokens = self.generated_tokens = 0
        self.listed: deque[RequestFigures] = deque(maxlen=max_listed)
        self._ttft_s: deque[float] = deque(maxlen=max_listed)
        self._gaps_s: deque[float] = deque(maxlen=None if max_listed is None else _GAPS_LISTED * max_listed)

    def add(self, line: Mapping[str, Any], gaps_s: Iterable[float] = ()) -> None:
        """A line of the file of answers, and the seconds between its tokens."""
        self.num_requests += 1
        self.num_failed += line["error"] is not None
        self.prompt_tokens += line["num_prompt_tokens"]
        self.generated_tokens += len(line["token_ids"])
        self.listed.append(_request(line))
        self._gaps_s.extend(gaps_s)
        if line["ttft_s"] is not None:
            self._ttft_s.append(line["ttft_s"])

    def results(self, *, num_taken_over: int, run_s: float) -> GenerationResults:
        return GenerationResults(
            num_requests=self.num_requests,
            num_failed=self.num_failed,
            num_taken_over=num_taken_over,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            tokens_per_s=self.generated_tokens / run_s,
            ttft_s=_spread(self._ttft_s),
            tpot_s=_spread(self._gaps_s),
        )

    @property
    def notes(self) -> list[str]:
        if len(self.listed) == self.num_requests:
            return []
        return [
            f"of {self.num_requests} requests the last {len(self.listed)} are listed; ttft_s and tpot_s are of the "
            "last ones, too"
        ]


@dataclass(frozen=True, kw_only=True)
class Session:
    """What came of requests.

    `digest` is of all that decides over the answers. `earlier_s` passed from the first forming of the ring to the last.
    """

    digest: str
    tally: Tally
    num_taken_over: int
    earlier_s: float
    interruptions: Interruptions
    drafting: Drafting | None


def generation_record(
    ring: GenerationRing, session: Session, reports: Sequence[Mapping[str, Any]]
) -> GenerationRecord:
    """Of this session; `reports` are what the ranks tell at its end. Bytes are what the senders counted."""
    config, deployment, plan = ring.config, ring.deployment, ring.deployment.plan
    tally, digest = session.tally, session.digest
    run_s = max(report["run_s"] for report in reports) + session.earlier_s
    sent = {name: traffic for report in reports for name, traffic in report["sent"].items()}
    codec_names = sorted({codec.name for codec in ring.codecs.facts}) or ["unsplit"]
    return GenerationRecord(
        run_id=make_run_id("generation", model_label(config.model.name), "+".join(codec_names), digest[:8]),
        digest=digest,
        args=Args.from_plain(config.original_args() | {"config": config.as_dict()}),
        results=tally.results(num_taken_over=session.num_taken_over, run_s=run_s),
        traffic_per_link={link.name: recorded_link(sent[link.name]) for link in plan.links},
        requests=tuple(tally.listed),
        time_run_s=run_s,
        codecs=codec_configs(plan, ring.codecs),
        codecs_decode=codec_configs(plan, ring.decode_codecs),
        plan=planned_stages(plan),
        stages=stage_seconds(reports),
        ranks=recorded_ranks(reports),
        schedule=recorded_schedule(ring),
        backend=deployment.backend,
        emulation=emulation(config, plan, ring.emulated_links),
        model=recorded_model(config, deployment),
        interruptions=session.interruptions,
        drafts=recorded_drafts(session.drafting, config.generation.draft) if session.drafting else None,
        notes=(*deployment.model.notes, *ring.notes, *interruption_notes(session.interruptions), *tally.notes),
        versions=software_versions(),
        environment=dict(deployment.environment),
    )


def recorded_schedule(ring: GenerationRing) -> GenerationSchedule:
    return GenerationSchedule(
        max_slots=ring.config.generation.max_slots,
        slot_length=ring.slot_length,
        prefill_chunk=ring.prefill_chunk,
        passes=ring.passes,
        in_flight=ring.credits,
        receives_ahead=ring.receives_ahead,
    )


def recorded_ranks(reports: Sequence[Mapping[str, Any]]) -> tuple[GenerationRank, ...]:
    return tuple(GenerationRank(**{key: report[key] for key in GenerationRank.model_fields}) for report in reports)


def recorded_drafts(drafting: Drafting, specs: Sequence[str]) -> Drafts:
    """What came of drafts so far; `specs` are those of the drafters, in their order."""
    figures = drafting.figures
    return Drafts(
        drafters=tuple(
            DrafterFigures(name=name, spec=spec, draft_s=draft_s, by_depth=_by_depth(figures.counts.get(name, {})))
            for spec, (name, draft_s) in zip(specs, drafting.draft_s.items(), strict=True)
        ),
        passes=figures.passes,
        void=figures.void,
        tokens=figures.tokens,
        tokens_per_pass=_ratio(figures.tokens, figures.passes),
        rows_by_tokens=_dense(figures.depths),
        rows_by_in_flight=_dense(figures.in_flight),
        undrafted=Undrafted(none=figures.undrafted["none"], cost=figures.undrafted["cost"]),
        limits=RecordedLimits(**asdict(drafting.limits)),
        costs=RecordedCosts(**asdict(drafting.costs)),
        away_s=drafting.away_s,
    )


def _by_depth(counts: Mapping[int, DepthCounts]) -> tuple[DraftsAtDepth, ...]:
    depths = range(1, 1 + max(counts, default=0))
    return tuple(DraftsAtDepth(**asdict(counts.get(depth, DepthCounts()))) for depth in depths)


def _dense(counts: Mapping[int, int]) -> tuple[int, ...]:
    return tuple(counts.get(number, 0) for number in range(1 + max(counts, default=-1)))


def interruption_notes(interruptions: Interruptions) -> list[str]:
    """What a reader of the figures must know."""
    notes = []
    if interruptions.count:
        notes.append(
            f"the ring was formed again {interruptions.count} times: bytes and frames of links and seconds of stages "
            "are those since the last time"
        )
    if interruptions.started_again:
        notes.append(
            "rank 0 was started again: answers that were not finished before began anew, which no figure here has"
        )
    return notes


def recorded_link(sent: Mapping[str, int]) -> GenerationLink:
    """Of `LinkTraffic.as_dict`."""
    return GenerationLink(
        payload_bytes=sent["payload_bytes"],
        header_bytes=sent["header_bytes"],
        control_bytes=sent["control_bytes"],
        frames=sent["num_frames"],
        tokens=sent["num_tokens"],
        bytes_per_token=_ratio(sent["payload_bytes"], sent["num_tokens"]),
        header_bytes_per_token=_ratio(sent["header_bytes"], sent["num_tokens"]),
    )


def _request(line: Mapping[str, Any]) -> RequestFigures:
    """Of a line of the file of answers."""
    return RequestFigures(
        line=line["line"],
        finish_reason=line["finish_reason"],
        num_prompt_tokens=line["num_prompt_tokens"],
        num_tokens=len(line["token_ids"]),
        queued_s=line["queued_s"],
        ttft_s=line["ttft_s"],
        tpot_s=None if line["tpot_s"] is None else Spread(**line["tpot_s"]),
        bytes_per_link=line["bytes_per_link"],
        num_passes=line["num_passes"],
        num_drafts_accepted=line["num_drafts_accepted"],
        error=line["error"],
    )


def _spread(values: Collection[float]) -> Spread | None:
    return Spread(median=statistics.median(values), p95=quantile(list(values), 0.95)) if values else None


def _ratio(a: float, b: float) -> float | None:
    return a / b if b else None
