"""The record of a run that answered prompts: totals, a line of figures per request, what crossed the links.

Made by `generation.record`, written and read by `store`, shown by `report.generation`. The answers themselves are in
`answers-*.jsonl` (`generation.answers_file`). A key more or less is a new `schema_version` and a step in `migrations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, Self

from pydantic import model_validator

from pipeline.records.base import Amount, Count, Part, Positive, Words
from pipeline.records.drafts import Drafts
from pipeline.records.run_record import (
    SCHEMA_VERSION,
    Args,
    CodecConfig,
    Emulation,
    MeasuredRank,
    Model,
    PlannedStage,
    StageSeconds,
    check_emulation,
    check_plan,
    check_ratio,
)

__all__ = [
    "GENERATION_KIND",
    "GenerationLink",
    "GenerationRank",
    "GenerationRecord",
    "GenerationResults",
    "GenerationSchedule",
    "Interruptions",
    "RequestFigures",
    "Spread",
]

GENERATION_KIND: Final = "thinwire generation"


class Spread(Part):
    """Of seconds: the median, and what 95% do not exceed."""

    median: Amount
    p95: Amount


class GenerationResults(Part):
    """`ttft_s`: from having a slot to the first token; `tpot_s`: between tokens, where those of one
    pass share its time; null where there was none.
    """

    num_requests: Count
    num_failed: Count
    num_taken_over: Count
    prompt_tokens: Count
    generated_tokens: Count
    tokens_per_s: Amount
    ttft_s: Spread | None
    tpot_s: Spread | None


class GenerationLink(Part):
    """What one link carried, by its sender's count; null where no token crossed it."""

    payload_bytes: Count
    header_bytes: Count
    control_bytes: Count
    frames: Count
    tokens: Count
    bytes_per_token: Amount | None
    header_bytes_per_token: Amount | None


class RequestFigures(Part):
    """One request. Null seconds: it did not come that far. `bytes_per_link` are payload bytes, of passes that it
    shared its share. `num_passes` have brought it tokens, `num_drafts_accepted` of these had gone ahead as drafts;
    null in records that are older than drafts.
    """

    line: Count
    finish_reason: str
    num_prompt_tokens: Count
    num_tokens: Count
    queued_s: Amount | None
    ttft_s: Amount | None
    tpot_s: Spread | None
    bytes_per_link: Mapping[str, Amount]
    num_passes: Count | None
    num_drafts_accepted: Count | None
    error: Words | None


class GenerationRank(MeasuredRank):
    cache_bytes: Count


class GenerationSchedule(Part):
    max_slots: Positive
    slot_length: Count
    prefill_chunk: Count
    passes: Count
    in_flight: Positive
    receives_ahead: Count


class Interruptions(Part):
    """How often the ring was formed again, for how long no pass could go around, and positions computed once more.

    `started_again`: rank 0's process itself was, and what was so before it is not counted.
    """

    count: Count
    pause_s: Amount
    tokens_prefilled_again: Count
    started_again: bool


class GenerationRecord(Part):
    """One session of requests. Links and stages are named as in the plan; `codecs_decode` are of sampled tokens.
    `requests` are all that `results` count, or the last of those that a server has answered, which `notes` then says.
    Null `emulation`: nothing was emulated; null `drafts`: there was no drafter.
    """

    schema_version: Literal[5] = SCHEMA_VERSION
    kind: Literal["thinwire generation"] = GENERATION_KIND
    run_id: str
    digest: str
    args: Args
    results: GenerationResults
    traffic_per_link: Mapping[str, GenerationLink]
    requests: tuple[RequestFigures, ...]
    time_run_s: Amount
    codecs: Mapping[str, CodecConfig]
    codecs_decode: Mapping[str, CodecConfig]
    plan: tuple[PlannedStage, ...]
    stages: Mapping[str, StageSeconds]
    ranks: tuple[GenerationRank, ...]
    schedule: GenerationSchedule
    interruptions: Interruptions | None
    drafts: Drafts | None
    backend: str
    emulation: Emulation | None
    model: Model
    notes: tuple[Words, ...]
    versions: Mapping[str, str]
    environment: Mapping[str, str]

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        check_plan(self.plan, self.stages)
        if not self.traffic_per_link.keys() == self.codecs.keys() == self.codecs_decode.keys():
            raise ValueError("traffic_per_link, codecs and codecs_decode name other links")
        check_emulation(self.emulation, self.plan, self.codecs)
        if not self.ranks:
            raise ValueError("ranks is empty")
        self._check_totals()
        return self

    def _check_totals(self) -> None:
        requests = self.requests
        sums = {
            "num_requests": len(requests),
            "num_failed": sum(request.error is not None for request in requests),
            "prompt_tokens": sum(request.num_prompt_tokens for request in requests),
            "generated_tokens": sum(request.num_tokens for request in requests),
        }
        lists_all = self.results.num_requests == len(requests)
        for key, over_requests in sums.items():
            total = getattr(self.results, key)
            if total < over_requests or (lists_all and total > over_requests):
                raise ValueError(f"results.{key} is {total}, the sum over requests {over_requests}")
        for request in requests:
            accepted = request.num_drafts_accepted or 0
            if accepted > request.num_tokens or (accepted and self.drafts is None):
                raise ValueError(
                    f"num_drafts_accepted of line {request.line} is {accepted}, of {request.num_tokens} tokens"
                    + ("" if self.drafts else " without a drafter")
                )
        for name, link in self.traffic_per_link.items():
            where = f"traffic_per_link.{name}"
            check_ratio(f"{where}.bytes_per_token", link.bytes_per_token, link.payload_bytes, link.tokens)
            check_ratio(f"{where}.header_bytes_per_token", link.header_bytes_per_token, link.header_bytes, link.tokens)
