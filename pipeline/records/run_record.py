"""The record of an evaluation: what it was, what it scored, what crossed the links, where the time went.

Made by `evaluation.recorder`, written and read by `store`, shown by `report`. Losses and top-1 ids by token are in a
file of their own beside it. A key more or less is a new `schema_version` and a step in `migrations`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self

from pydantic import Field, JsonValue, model_validator

from pipeline.records.base import Amount, CodecSpec, Count, OpenPart, Part, Positive, Timestamp, Words

__all__ = [
    "RUN_KIND",
    "SCHEMA_VERSION",
    "Args",
    "CodecConfig",
    "Dataset",
    "EmulatedLink",
    "Emulation",
    "LinkTotals",
    "MeasuredRank",
    "Model",
    "OneToken",
    "OneTokenLink",
    "OneTokenStage",
    "OtherTraffic",
    "PlannedStage",
    "Protocol",
    "RecordedConfig",
    "Reconstruction",
    "Resumed",
    "RunLink",
    "RunRank",
    "RunRecord",
    "RunResults",
    "RunSchedule",
    "SessionEnvironment",
    "StageSeconds",
    "WeightBlocks",
    "check_emulation",
    "check_plan",
    "check_ratio",
]

SCHEMA_VERSION: Final = 5
RUN_KIND: Final = "thinwire run"
RESULT_LINK: Final = "result:"  # how the name of the link begins that results take where the head is not on node 0

Perplexity = Annotated[float, Field(ge=0.5)]  # 1 at best, but for rounding
Layers = Annotated[tuple[Count, Count], Field(description="[start, end)")]


class RecordedModel(OpenPart):
    """The config's section `model`, as far as it tells settings apart."""

    load_in_8bit_threshold: Amount


class RecordedImportance(OpenPart):
    """The config's section `importance`; no seed where it had none yet."""

    seed: int | None = None


class RecordedConfig(OpenPart):
    """The whole config (`config.schema.RunConfig.as_dict`), with the keys that readers know."""

    compressor: CodecSpec
    compressor_per_link: Mapping[str, CodecSpec]
    compressor_decode: CodecSpec | None
    model: RecordedModel
    importance: RecordedImportance


class Args(Part):
    """The original benchmark's flags (`config.schema.FLAG_KEYS`), and the config that they and others have made."""

    model_name: str
    model_dir: str | None
    dtype: str
    load_in_8bit: bool
    load_in_4bit: bool
    compressor: CodecSpec
    batch_size: Positive
    first_k_tokens: Count
    max_length: Count
    stride: Count
    exp_dir: str
    wandb: bool
    wandb_project: str
    wandb_run_name: str | None
    config: RecordedConfig


class RunResults(Part):
    """`total_nll` in nats, over the scored tokens. Both figures are null where they are not finite."""

    avg_ppl: Perplexity | None
    total_nll: float | None
    total_loss_tokens: Count
    total_processed_tokens: Count
    num_windows: Count
    num_microbatches: Positive


class LinkTotals(Part):
    """Sums over links. `bytes_per_token` is per link crossing, `payload_bytes_per_scored_token` is not. Null where
    nothing crossed, or nothing was scored.
    """

    total_bytes: Count
    total_tokens: Count
    total_tx: Count
    bytes_per_token: Amount | None
    bits_per_value: Amount | None
    payload_bytes_per_scored_token: Amount | None
    header_bytes: Count
    padding_bytes: Count


class RunLink(Part):
    """What one link carried; `bytes` are a codec's bytes, `tx` frames."""

    bytes: Count
    tokens: Positive
    tx: Count
    bytes_per_token: Amount
    bits_per_value: Amount
    header_bytes: Count
    padding_bytes: Count


class OtherTraffic(Part):
    """Bytes beside the hidden states, of the last session."""

    result_bytes: Count
    end_bytes: Count
    setup_bytes: Count


class CodecConfig(OpenPart):
    """A codec with its options, which are its own."""

    name: str


class PlannedStage(Part):
    stage: Count
    node: Count
    layers: Layers

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        start, end = self.layers
        if start > end:
            raise ValueError(f"layers of stage {self.stage} are [{start}, {end}], not a start and an end")
        return self


class SessionEnvironment(OpenPart):
    """What the micro-batches from this one on ran on: words by key."""

    from_microbatch: Count


class Resumed(Part):
    """`environments` of the sessions, where they differ."""

    num_sessions: Positive
    environments: tuple[SessionEnvironment, ...] | None
    resent_microbatches: Count
    resent_payload_bytes_at_most: Count


class StageSeconds(Part):
    """Seconds of the last session by phase (`runtime.stage_times.StageTimes`)."""

    device: str
    compute_s: Amount
    importance_s: Amount
    compress_s: Amount
    decompress_s: Amount
    wait_s: Amount
    measure_s: Amount
    head_s: Amount


class OneTokenStage(Part):
    """Median seconds for one token."""

    compute_s: Amount
    compress_s: Amount
    decompress_s: Amount


class OneTokenLink(Part):
    """A frame of one token."""

    payload_bytes: Count
    header_bytes: Count


class OneToken(Part):
    """Null `cached_tokens`: timed without a cache."""

    cached_tokens: Count | None
    stages: Mapping[str, OneTokenStage]
    links: Mapping[str, OneTokenLink]


class Reconstruction(Part):
    """Sum of (x - x')^2 over sum of x^2, all frames; null where it is not finite."""

    relative_squared_error: Annotated[float, Field(ge=0)] | None


class MeasuredRank(Part):
    """A process at its end. Null: it has no GPU, the system does not tell, or the run is older than the figure."""

    rank: Count
    host: str
    threads: Count
    gpu: str | None
    peak_rss_bytes: Count
    pss_bytes: Count | None
    peak_cuda_bytes: Count | None
    cuda_in_use_bytes: Count | None


class RunRank(MeasuredRank):
    warm_up_s: Amount | None


class RunSchedule(Part):
    in_flight: Positive
    receives_ahead: Count


class EmulatedLink(Part):
    """One way of a link; null `bits_per_s`: as fast as the machine."""

    bits_per_s: Annotated[float, Field(gt=0)] | None
    delay_s: Amount
    jitter_s: Amount


class Emulation(Part):
    """What a run's times are under that the machine is not: links by name, and how many times as long nodes take."""

    links: Mapping[str, EmulatedLink]
    slowdown: tuple[Annotated[float, Field(ge=1)], ...]


class WeightBlocks(Part):
    """What matrices were held as: types of GGUF's blocks of few bits, the checkpoint's own unless `made_at_load`."""

    types: Annotated[tuple[str, ...], Field(min_length=1)]
    made_at_load: bool


class Model(Part):
    """Null `blocks`: all weights were in `args.dtype`, or bitsandbytes'."""

    model_type: str
    hidden_size: Positive
    num_hidden_layers: Count
    checkpoint_fingerprint: str
    blocks: WeightBlocks | None


class Dataset(Part):
    description: Words
    num_tokens: Count
    text_sha256: str
    ids_sha256: str


class Protocol(Part):
    """How the text was scored; `decode_chunk` in mode `decode` only."""

    name: str
    mode: Literal["window", "decode"]
    decode_chunk: Positive | None
    max_length: Count
    stride: Count
    bos: str


class RunRecord(Part):
    """One evaluation.

    Links and stages are named as in the plan. `timed_tokens` are those of the last session, to which the stages' times
    belong. `finite`: whether perplexity, losses and reconstruction errors were. Null: `codecs_decode` in mode `window`,
    `reconstruction` where it was not measured, `emulation` where nothing was emulated; `finished_at`, `traffic_other`,
    `timed_tokens`, `one_token` and `environment` in records that are older than these.
    """

    schema_version: Literal[5] = SCHEMA_VERSION
    kind: Literal["thinwire run"] = RUN_KIND
    run_id: str
    digest: str
    finished_at: Timestamp | None
    per_token_file: str
    finite: bool
    args: Args
    results: RunResults
    traffic_totals: LinkTotals
    traffic_other: OtherTraffic | None
    traffic_per_link: Mapping[str, RunLink]
    time_run_s: Amount
    timed_tokens: Count | None
    tokens_per_s: Amount
    causal: bool
    notes: tuple[Words, ...]
    codecs: Mapping[str, CodecConfig]
    codecs_decode: Mapping[str, CodecConfig] | None
    importance: Mapping[str, Mapping[str, JsonValue]]
    plan: tuple[PlannedStage, ...]
    resumed: Resumed
    stages: Mapping[str, StageSeconds]
    one_token: OneToken | None
    reconstruction: Mapping[str, Reconstruction] | None
    ranks: tuple[RunRank, ...]
    schedule: RunSchedule
    backend: str
    emulation: Emulation | None
    model: Model
    dataset: Dataset
    protocol: Protocol
    versions: Mapping[str, str]
    environment: Mapping[str, str] | None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        check_plan(self.plan, self.stages)
        if self.traffic_per_link.keys() != self.codecs.keys():
            raise ValueError(f"links are {_names(self.traffic_per_link)}, those with codecs {_names(self.codecs)}")
        _check_names("codecs_decode", self.codecs_decode, self.codecs)
        _check_names("reconstruction", self.reconstruction, self.codecs)
        check_emulation(self.emulation, self.plan, self.codecs)
        if self.one_token:
            _check_names("one_token.stages", self.one_token.stages, self.stages)
            _check_names("one_token.links", self.one_token.links, self.codecs)
        self._check_traffic()
        if not self.ranks:
            raise ValueError("ranks is empty")
        if (self.timed_tokens or 0) > self.results.total_processed_tokens:
            raise ValueError(
                f"timed_tokens is {self.timed_tokens}, more than results.total_processed_tokens, "
                f"{self.results.total_processed_tokens}"
            )
        if self.finite and self.results.avg_ppl is None:
            raise ValueError("finite is true, but results.avg_ppl is null")
        return self


    def _check_traffic(self) -> None:
        """A report shows the totals, and predicts from the links: both must be of one run."""
        totals, links = self.traffic_totals, self.traffic_per_link
        for key, of_link in _TOTALS.items():
            total, over_links = getattr(totals, key), sum(getattr(link, of_link) for link in links.values())
            if total != over_links:
                raise ValueError(f"traffic_totals.{key} is {total}, the sum over links {over_links}")
        hidden_size, num_scored = self.model.hidden_size, self.results.total_loss_tokens
        check_ratio("traffic_totals.bytes_per_token", totals.bytes_per_token, totals.total_bytes, totals.total_tokens)
        check_ratio(
            "traffic_totals.bits_per_value",
            totals.bits_per_value,
            8 * totals.total_bytes,
            totals.total_tokens * hidden_size,
        )
        scored = totals.payload_bytes_per_scored_token
        check_ratio("traffic_totals.payload_bytes_per_scored_token", scored, totals.total_bytes, num_scored)
        for name, link in links.items():
            where = f"traffic_per_link.{name}"
            check_ratio(f"{where}.bytes_per_token", link.bytes_per_token, link.bytes, link.tokens)
            check_ratio(f"{where}.bits_per_value", link.bits_per_value, 8 * link.bytes, link.tokens * hidden_size)


# Of LinkTotals and RunLink.
_TOTALS = {
    "total_bytes": "bytes",
    "total_tokens": "tokens",
    "total_tx": "tx",
    "header_bytes": "header_bytes",
    "padding_bytes": "padding_bytes",
}


def check_ratio(key: str, told: float | None, count: int, per: int) -> None:
    """Raises ValueError where a figure is not that of its counts, but for rounding."""
    expected = count / per if per else None
    agree = told == expected if told is None or expected is None else math.isclose(told, expected, rel_tol=1e-6)
    if not agree:
        raise ValueError(f"{key} is {told}, its counts give {expected}")


def check_plan(plan: tuple[PlannedStage, ...], stages: Mapping[str, StageSeconds]) -> None:
    """Raises ValueError where the times are of other stages than the plan's, or there is none."""
    planned = {str(stage.stage): None for stage in plan}
    if not planned or planned.keys() != stages.keys():
        raise ValueError(f"stages are {_names(stages)}, those of the plan {_names(planned)}")
    if len(planned) < len(plan):
        raise ValueError("a stage stands twice in plan")


def check_emulation(
    emulation: Emulation | None, plan: tuple[PlannedStage, ...], links: Mapping[str, object]
) -> None:
    """Raises ValueError where it is of other nodes or links than the run had; results may have a link of their own."""
    if emulation is None:
        return
    num_nodes = 1 + max(stage.node for stage in plan)
    if emulation.slowdown and len(emulation.slowdown) != num_nodes:
        raise ValueError(f"emulation.slowdown has {len(emulation.slowdown)} nodes, the plan {num_nodes}")
    strange = [name for name in emulation.links if name not in links and not name.startswith(RESULT_LINK)]
    if strange:
        raise ValueError(f"emulation.links has {strange[0]!r}, which is no link of the run")


def _check_names(key: str, parts: Mapping[str, object] | None, expected: Mapping[str, object]) -> None:
    """Figures of other stages or links than the run had would be added up, or left out, without a word."""
    if parts is not None and parts.keys() != expected.keys():
        raise ValueError(f"{key} has {_names(parts)}, the run {_names(expected)}")


def _names(parts: Mapping[str, object]) -> str:
    return repr(", ".join(parts)[:80])
