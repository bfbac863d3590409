"""The columns of a table of runs that generated; all but the run's id are shown everywhere, some where a network was
emulated or there were drafts.

The counterpart of `point_columns`; `generation` reads what stands in them.
"""

from __future__ import annotations

from collections.abc import Callable

from pipeline.records.drafts import Drafts
from pipeline.report.columns import EMULATION_COLUMNS, MISSING, Column, Value, number
from pipeline.report.generation import GeneratedRun

__all__ = ["COLUMNS", "SHOWN_COLUMNS"]


def _ms(name: str) -> Callable[[GeneratedRun], Value]:
    def value(run: GeneratedRun) -> Value:
        seconds = getattr(run, name)
        return None if seconds is None else 1e3 * seconds

    return value


def _ratio(predicted: str, measured: str) -> Callable[[GeneratedRun], Value]:
    def value(run: GeneratedRun) -> Value:
        seconds, measured_s = getattr(run, predicted), getattr(run, measured)
        return seconds / measured_s if seconds and measured_s else None

    return value


def _of_drafts(value: Callable[[Drafts], Value]) -> Callable[[GeneratedRun], Value]:
    return lambda run: None if run.drafts is None else value(run.drafts)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _first_right(drafts: Drafts) -> float | None:
    first = [drafter.by_depth[0] for drafter in drafts.drafters if drafter.by_depth]
    return _share(sum(counts.right for counts in first), sum(counts.judged for counts in first))


COLUMNS: tuple[Column[GeneratedRun], ...] = (
    Column(key="codec", heading="codec", meaning="what was on the links", value=lambda r: r.label, is_text=True),
    Column(key="model", heading="model", meaning="its name without the folder", value=lambda r: r.model, is_text=True),
    Column(
        key="weights",
        heading="weights",
        meaning="their dtype, and the blocks of few bits that matrices were held as",
        value=lambda r: r.weights,
        is_text=True,
    ),
    Column(
        key="num_requests", heading="requests", meaning="lines of the answers' file", value=lambda r: r.num_requests
    ),
    Column(key="num_failed", heading="failed", meaning="requests that ended in an error", value=lambda r: r.num_failed),
    Column(key="generated_tokens", heading="tokens", meaning="generated, all requests", value=lambda r: r.num_tokens),
    Column(
        key="tokens_per_s",
        heading="tokens/s",
        meaning="generated tokens per second of the whole run, the time of prompts included",
        value=lambda r: r.tokens_per_s,
        form=number(".2f"),
    ),
    Column(
        key="ttft_ms_median",
        heading="TTFT, ms",
        meaning="from having a slot to the first token, median over requests",
        value=_ms("ttft_s"),
        form=number(".1f"),
    ),
    Column(
        key="ms_per_token_median",
        heading="ms/token",
        meaning="between tokens of one answer, median; those of one pass share its time",
        value=_ms("tpot_s"),
        form=number(".1f"),
    ),
    Column(
        key="ms_per_token_p95",
        heading="ms/token, 95%",
        meaning="between tokens of one answer, 95th percentile",
        value=_ms("tpot_p95_s"),
        form=number(".1f"),
    ),
    Column(
        key="predicted_ttft_ms",
        heading="predicted TTFT, ms",
        meaning="of the mean prompt on the emulated network, where the record tells enough",
        value=_ms("predicted_ttft_s"),
        form=number(".1f"),
        if_any=True,
    ),
    Column(
        key="predicted_over_measured_ttft",
        heading="predicted/measured TTFT",
        meaning="that over the measured median",
        value=_ratio("predicted_ttft_s", "ttft_s"),
        form=number(".3f"),
        if_any=True,
    ),
    Column(
        key="predicted_ms_per_token",
        heading="predicted ms/token",
        meaning="between tokens of one answer on the emulated network, where the record tells enough",
        value=_ms("predicted_tpot_s"),
        form=number(".1f"),
        if_any=True,
    ),
    Column(
        key="predicted_over_measured_ms_per_token",
        heading="predicted/measured ms/token",
        meaning="that over the measured median",
        value=_ratio("predicted_tpot_s", "tpot_s"),
        form=number(".3f"),
        if_any=True,
    ),
    *EMULATION_COLUMNS,
    Column(
        key="drafters",
        heading="drafters",
        meaning="what guessed tokens that a pass then verified",
        value=_of_drafts(lambda drafts: ", ".join(drafter.spec for drafter in drafts.drafters)),
        form=lambda specs: specs or MISSING,
        is_text=True,
        if_any=True,
    ),
    Column(
        key="tokens_per_pass",
        heading="tokens/pass",
        meaning="that a pass of sampled tokens has brought a sequence, passes of no use included",
        value=_of_drafts(lambda drafts: drafts.tokens_per_pass),
        form=number(".2f"),
        if_any=True,
    ),
    Column(
        key="first_draft_accepted",
        heading="first draft right",
        meaning="share of the drafts behind a certain token that the model chose",
        value=_of_drafts(_first_right),
        form=number(".1%"),
        if_any=True,
    ),
    Column(
        key="drafts_accepted",
        heading="drafts right",
        meaning="share of the drafts that were judged, since all before them were right",
        value=_of_drafts(lambda drafts: _share(drafts.num_right, drafts.num_judged)),
        form=number(".1%"),
        if_any=True,
    ),
    Column(
        key="void_passes",
        heading="void passes",
        meaning="share of the passes of sampled tokens that were of no use: what they took for granted was wrong",
        value=_of_drafts(lambda drafts: _share(drafts.void, drafts.passes)),
        form=number(".1%"),
        if_any=True,
    ),
    Column(
        key="bytes_per_token_per_link",
        heading="bytes/token per link",
        meaning="payload bytes per token that crosses a link, prompts included, mean over links",
        value=lambda r: r.payload_bytes_per_token,
        form=number(",.1f"),
    ),
    Column(
        key="header_bytes_per_token_per_link",
        heading="header bytes/token",
        meaning="the frames' headers per token that crosses a link",
        value=lambda r: r.header_bytes_per_token,
        form=number(",.1f"),
    ),
    Column(
        key="num_interruptions",
        heading="breaks",
        meaning="how often the ring was formed again",
        value=lambda r: r.num_interruptions,
    ),
    Column(
        key="pause_s",
        heading="pauses, s",
        meaning="while it was, in all",
        value=lambda r: r.pause_s,
        form=number(".1f"),
    ),
    Column(
        key="tokens_prefilled_again",
        heading="tokens again",
        meaning="computed once more after a break",
        value=lambda r: r.tokens_prefilled_again,
    ),
    Column(
        key="cache_mib",
        heading="cache, MiB",
        meaning="keys and values on all ranks together",
        value=lambda r: r.cache_bytes / 2**20,
        form=number(",.1f"),
    ),
    Column(
        key="max_rows", heading="rows, at most", meaning="sequences that may share a pass", value=lambda r: r.max_rows
    ),
    Column(
        key="passes", heading="passes, at most", meaning="of sampled tokens under way at once", value=lambda r: r.passes
    ),
    Column(key="run_id", heading="", meaning="", value=lambda r: r.run_id, is_text=True),
)

SHOWN_COLUMNS = tuple(column for column in COLUMNS if column.heading)
