"""Runs that generated, read from their records: what was asked for, how fast it came, what crossed the links.

`generation_columns` says how they are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.records.drafts import DrafterFigures, Drafts, DraftsAtDepth
from pipeline.records.generation_record import GenerationRecord
from pipeline.records.labels import (
    chain_names,
    codec_label,
    emulation_label,
    model_label,
    network_text,
    slowdown_text,
    weights_label,
)
from pipeline.report.columns import MISSING, number
from pipeline.report.generation_prediction import predicted_tpot_s, predicted_ttft_s

__all__ = ["GeneratedRun", "drafter_table"]

_SHOWN_DEPTHS = 8


@dataclass(frozen=True, kw_only=True)
class GeneratedRun:
    """One record. `ttft_s`, `tpot_s` and `tpot_p95_s` (seconds to the first token, between tokens) are None where no
    request came that far, bytes per token of a link where nothing crossed one, predictions where nothing was emulated
    or the record does not tell enough, and what interruptions cost where an older record does not tell. `network` and
    `slowdown` are empty where nothing was emulated; `drafts` is None where there was no drafter.
    """

    label: str
    model: str
    weights: str
    num_requests: int
    num_failed: int
    num_tokens: int
    tokens_per_s: float
    ttft_s: float | None
    tpot_s: float | None
    tpot_p95_s: float | None
    predicted_ttft_s: float | None
    predicted_tpot_s: float | None
    network: str
    slowdown: str
    payload_bytes_per_token: float | None
    header_bytes_per_token: float | None
    num_interruptions: int | None
    pause_s: float | None
    tokens_prefilled_again: int | None
    drafts: Drafts | None
    cache_bytes: int
    max_rows: int
    passes: int
    run_id: str
    notes: tuple[str, ...]

    @classmethod
    def of(cls, record: GenerationRecord) -> GeneratedRun:
        interruptions = record.interruptions
        results, links, schedule = record.results, record.traffic_per_link.values(), record.schedule
        crossings, chain = sum(link.tokens for link in links), chain_names(record)
        return cls(
            label=f"{codec_label(record)} {emulation_label(record.emulation, chain)}".rstrip(),
            model=model_label(record.args.model_name),
            weights=weights_label(record),
            num_requests=results.num_requests,
            num_failed=results.num_failed,
            num_tokens=results.generated_tokens,
            tokens_per_s=results.tokens_per_s,
            ttft_s=results.ttft_s.median if results.ttft_s else None,
            tpot_s=results.tpot_s.median if results.tpot_s else None,
            tpot_p95_s=results.tpot_s.p95 if results.tpot_s else None,
            predicted_ttft_s=predicted_ttft_s(record),
            predicted_tpot_s=predicted_tpot_s(record),
            network=network_text(record.emulation, chain),
            slowdown=slowdown_text(record.emulation),
            payload_bytes_per_token=sum(link.payload_bytes for link in links) / crossings if crossings else None,
            header_bytes_per_token=sum(link.header_bytes for link in links) / crossings if crossings else None,
            num_interruptions=interruptions.count if interruptions else None,
            pause_s=interruptions.pause_s if interruptions else None,
            tokens_prefilled_again=interruptions.tokens_prefilled_again if interruptions else None,
            drafts=record.drafts,
            cache_bytes=sum(rank.cache_bytes for rank in record.ranks),
            max_rows=schedule.max_slots,
            passes=schedule.passes,
            run_id=record.run_id,
            notes=record.notes,
        )


def drafter_table(runs: Sequence[GeneratedRun]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row per run and drafter: how often its drafts were right, by depth. No rows without drafters.

    A draft at depth 2 counts where the one before it was right.
    """
    drafters = [(run, drafter) for run in runs if run.drafts for drafter in run.drafts.drafters]
    deepest = max((len(drafter.by_depth) for _, drafter in drafters), default=0)
    headings = ["codec", "drafter", "ms/draft", *(f"depth {d}" for d in range(1, 1 + min(deepest, _SHOWN_DEPTHS)))]
    headings += ["deeper"] if deepest > _SHOWN_DEPTHS else []
    return headings, [
        [run.label, drafter.spec, number(".2f")(1e3 * drafter.draft_s), *_shares(drafter, len(headings) - 3)]
        for run, drafter in drafters
    ]


def _shares(drafter: DrafterFigures, num_cells: int) -> list[str]:
    cells = [[at_depth] for at_depth in drafter.by_depth[:_SHOWN_DEPTHS]]
    cells += [list(drafter.by_depth[_SHOWN_DEPTHS:])]
    cells += [[] for _ in range(num_cells - len(cells))]
    return [_share(cell) for cell in cells[:num_cells]]


def _share(counts: Sequence[DraftsAtDepth]) -> str:
    judged = sum(count.judged for count in counts)
    return f"{sum(count.right for count in counts) / judged:.1%} of {judged:,}" if judged else MISSING
