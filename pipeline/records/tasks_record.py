"""The record of a run of lm-evaluation-harness' tasks: their scores, sample by sample too, and what crossed the links.

Made by `serving.harness_record`, written and read by `store`, shown by `report.tasks`. The harness' own results are in
a file beside it, as the harness writes them. A key more or less is a new `schema_version` and a step in `migrations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from pipeline.records.base import Amount, Bounded, Count, Part, Positive, Timestamp, Words
from pipeline.records.generation_record import GenerationLink, GenerationRank, GenerationSchedule, Interruptions
from pipeline.records.run_record import (
    SCHEMA_VERSION,
    Args,
    CodecConfig,
    Emulation,
    Model,
    PlannedStage,
    StageSeconds,
    check_emulation,
    check_plan,
    check_ratio,
)

__all__ = ["TASKS_KIND", "HarnessRun", "TaskMetric", "TaskScores", "TasksLink", "TasksRecord", "TasksTotals"]

TASKS_KIND: Final = "thinwire tasks"


class HarnessRun(Part):
    """What the harness was asked for. Null `limit`: all samples; null `num_fewshot`: each task's own number.
    `max_length` is how many tokens of context and continuation are in front of a scored one, at most.
    """

    version: str
    tasks: tuple[str, ...]
    limit: Annotated[float, Field(gt=0)] | None
    num_fewshot: Count | None
    apply_chat_template: bool
    max_length: Positive
    results_file: str


class TaskMetric(Part):
    """A score of a task, as the harness gives it; null where it is not finite, as is a standard error that there is
    none of. `samples` are those whose mean it is, in the order of the documents; null where it is no mean of numbers.
    """

    name: str
    filter: str
    value: Bounded | None
    stderr: Amount | None
    higher_is_better: bool | None
    samples: tuple[Bounded, ...] | None


class TaskScores(Part):
    """A task. Two runs scored the same where `docs_sha256`, of documents, targets and all that was asked, is equal."""

    name: Words
    version: Words
    num_fewshot: Count
    num_samples: Positive
    docs_sha256: str
    metrics: tuple[TaskMetric, ...]

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        for metric in self.metrics:
            if metric.samples is not None and len(metric.samples) != self.num_samples:
                where = f"{metric.name} of {self.name}"
                raise ValueError(f"{where} has {len(metric.samples)} samples, the task {self.num_samples}")
        return self


class TasksTotals(Part):
    num_requests: Count
    prompt_tokens: Count
    scored_tokens: Count
    generated_tokens: Count


class TasksLink(GenerationLink):
    bits_per_value: Amount | None


class TasksRecord(Part):
    """One run of tasks. Links and stages are named as in the plan; `codecs_decode` are of sampled tokens. `digest` is
    of all that decides over the answers but the tasks' documents. Null `emulation`: nothing was emulated.
    """

    schema_version: Literal[5] = SCHEMA_VERSION
    kind: Literal["thinwire tasks"] = TASKS_KIND
    run_id: str
    digest: str
    finished_at: Timestamp
    args: Args
    harness: HarnessRun
    tasks: tuple[TaskScores, ...]
    totals: TasksTotals
    traffic_per_link: Mapping[str, TasksLink]
    time_run_s: Amount
    codecs: Mapping[str, CodecConfig]
    codecs_decode: Mapping[str, CodecConfig]
    plan: tuple[PlannedStage, ...]
    stages: Mapping[str, StageSeconds]
    ranks: tuple[GenerationRank, ...]
    schedule: GenerationSchedule
    interruptions: Interruptions
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
        if not self.tasks:
            raise ValueError("tasks is empty")
        for name, link in self.traffic_per_link.items():
            where, num_values = f"traffic_per_link.{name}", link.tokens * self.model.hidden_size
            check_ratio(f"{where}.bytes_per_token", link.bytes_per_token, link.payload_bytes, link.tokens)
            check_ratio(f"{where}.header_bytes_per_token", link.header_bytes_per_token, link.header_bytes, link.tokens)
            check_ratio(f"{where}.bits_per_value", link.bits_per_value, 8 * link.payload_bytes, num_values)
        return self
