"""Runs that generated, as rows of a table: what was asked for, how fast it came, what crossed the links."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.records.generation_record import GenerationRecord
from pipeline.records.labels import codec_label, model_label

__all__ = ["HEADINGS", "GeneratedRun"]

HEADINGS = (
    *("codec", "model", "requests", "failed", "tokens", "tokens/s", "TTFT ms", "ms/token", "ms/token p95"),
    *("bytes/token/link", "header bytes/token", "cache MiB", "rows, passes"),
)


@dataclass(frozen=True, kw_only=True)
class GeneratedRun:
    """One record, already in words: a cell per heading, and where its other figures are."""

    cells: tuple[str, ...]
    run_id: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, record: GenerationRecord) -> GeneratedRun:
        results, links, schedule = record.results, record.traffic_per_link.values(), record.schedule
        crossings = sum(link.tokens for link in links)
        payload = sum(link.payload_bytes for link in links)
        headers = sum(link.header_bytes for link in links)
        cells = (
            codec_label(record),
            model_label(record.args.model_name),
            str(results.num_requests),
            str(results.num_failed),
            str(results.generated_tokens),
            f"{results.tokens_per_s:.2f}",
            _milliseconds(results.ttft_s and results.ttft_s.median),
            _milliseconds(results.tpot_s and results.tpot_s.median),
            _milliseconds(results.tpot_s and results.tpot_s.p95),
            f"{payload / crossings:.1f}" if crossings else "-",
            f"{headers / crossings:.1f}" if crossings else "-",
            f"{sum(rank.cache_bytes for rank in record.ranks) / 2**20:.1f}",
            f"up to {schedule.max_slots}, {schedule.passes}",
        )
        return cls(cells=cells, run_id=record.run_id, notes=record.notes)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f}"
