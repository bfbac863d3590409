"""What generating should have taken on the network that was emulated: seconds between tokens, and to the first one.

From a record's totals. With R rows in each of P passes of sampled tokens under way,

    lap  = sum of c_n + sum of 8 q_l / B_l + sum of d_l
    TPOT = max(lap, P c_n of each node, P 8 q_l / B_l of each link)
    TTFT = (prompt's seconds) + sum of 8 t_l / B_l + sum of d_l

with B_l, d_l and hops as in `prediction`; q_l are the bytes of such a pass, t_l those of the mean prompt, headers
included, c_n the seconds of a pass on node n: compute, head and sampling, encode, decode. A record has prompts and
tokens in one sum S_n of seconds over T decoding passes. A prompt of n tokens costs at least a pass of one row, which is
at least an R-th of a pass of R rows, and at most n / R passes of R rows, rounded up: so many tokens in so many
sequences. So c_n is between S_n / (T + sum of those) and S_n / (T + prompts / R). The middle of what the two ends
predict is shown, and nothing where they are more than `MAX_SPREAD` apart.

Nothing is predicted, either, where the sums do not tell what a pass was made of: prompts under way between tokens,
rows that end at different times, beginnings that were not computed again, failures, answers taken over from an earlier
session, another codec for tokens than for prompts, drafts, with which passes differ in size and in what they bring.
TTFT is that of a prompt in one pass and alone on its way. The bytes of results, which are few, are left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.records.generation_record import GenerationRecord
from pipeline.records.labels import chain_names
from pipeline.report.prediction import Network, emulated_network

__all__ = ["MAX_SPREAD", "predicted_tpot_s", "predicted_ttft_s"]

MAX_SPREAD = 0.1  # of the slower end over the faster one, less 1
MAX_UNEVEN = 0.05  # by which passes may lack rows on the mean


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """What was computed: prompts, each in one pass where `are_whole`, and passes of `rows` sampled tokens, `at_once` of
    them under way. The prompts cost as much as `least` to `most` of these passes.
    """

    num_prompts: int
    prompt_tokens: int
    are_whole: bool
    num_decodes: int
    rows: float
    at_once: int
    least: float
    most: float


def predicted_tpot_s(record: GenerationRecord) -> float | None:
    """Between tokens of one answer."""
    passes = _passes(record)
    if passes is None:
        return None
    network = emulated_network(record.emulation) if record.emulation else None
    if network is None:
        return None
    bits = {
        name: 8 * (link.payload_bytes / link.tokens * passes.rows + link.header_bytes / link.frames)
        for name, link in record.traffic_per_link.items()
    }
    link_s = {name: size / network.way(name).bits_per_s for name, size in bits.items()}
    node_s = _node_seconds(record)

    def tpot_s(num_passes: float) -> float:
        lap_s = sum(node_s.values()) / num_passes + sum(link_s.values()) + _delays_s(record, network)
        longest_s = max(*(seconds / num_passes for seconds in node_s.values()), *link_s.values())
        return max(lap_s, passes.at_once * longest_s)

    return _between(tpot_s, passes)


def predicted_ttft_s(record: GenerationRecord) -> float | None:
    """From having a slot to the first token, of the mean prompt."""
    passes = _passes(record)
    if passes is None or not passes.are_whole or record.emulation is None:
        return None
    if passes.num_prompts > 1 and record.schedule.max_slots > 1:
        return None  # they wait for each other
    network, tokens = emulated_network(record.emulation), passes.prompt_tokens / passes.num_prompts
    sent_s = sum(
        8 * (link.payload_bytes / link.tokens * tokens + link.header_bytes / link.frames) / network.way(name).bits_per_s
        for name, link in record.traffic_per_link.items()
    )
    all_s = sum(_node_seconds(record).values())

    def ttft_s(num_passes: float) -> float:
        prompts_s = all_s * (1 - passes.num_decodes / num_passes)
        return prompts_s / passes.num_prompts + sent_s + _delays_s(record, network)

    return _between(ttft_s, passes)


def _between(predict: Callable[[float], float], passes: _Passes) -> float | None:
    """The middle of what is predicted if prompts cost as little, or as much, as they can: as so many passes."""
    ends = sorted(predict(passes.num_decodes + extra) for extra in (passes.least, passes.most))
    return None if ends[1] > (1 + MAX_SPREAD) * ends[0] else sum(ends) / 2


def _passes(record: GenerationRecord) -> _Passes | None:
    """None where the record does not tell."""
    results, schedule, links = record.results, record.schedule, record.traffic_per_link
    requests, codecs = record.requests, (record.codecs, record.codecs_decode)
    if record.drafts is not None and record.drafts.were_sent:
        return None
    if not links or results.num_failed or results.num_taken_over or codecs[0] != codecs[1]:
        return None
    crossed = {(link.frames, link.tokens) for link in links.values()}
    num_frames, num_tokens = crossed.pop()
    num_chunks = sum(-(-request.num_prompt_tokens // max(1, schedule.prefill_chunk)) for request in requests)
    prompt_tokens = sum(request.num_prompt_tokens for request in requests)
    num_decodes, decoded = num_frames - num_chunks, sum(request.num_tokens - 1 for request in requests)
    if crossed or num_decodes <= 0 or decoded <= 0 or num_tokens != prompt_tokens + decoded:
        return None  # something was shared, sent twice or cut off, or there was nothing to decode
    active = min(len(requests), schedule.max_slots)
    at_once = max(1, min(schedule.passes, active))
    rows = active / at_once
    if active > 1 and len(requests) > active:
        return None
    if not (1 - MAX_UNEVEN) * rows <= decoded / num_decodes <= rows:
        return None
    return _Passes(
        num_prompts=len(requests),
        prompt_tokens=prompt_tokens,
        are_whole=num_chunks == len(requests),
        num_decodes=num_decodes,
        rows=rows,
        at_once=at_once,
        least=len(requests) / rows,
        most=sum(math.ceil(request.num_prompt_tokens / rows) for request in requests),
    )


def _node_seconds(record: GenerationRecord) -> dict[int, float]:
    """Of all passes, prompts included."""
    node_s: defaultdict[int, float] = defaultdict(float)
    for stage in record.plan:
        times = record.stages[str(stage.stage)]
        node_s[stage.node] += times.compute_s + times.head_s + times.compress_s + times.decompress_s
    return node_s


def _delays_s(record: GenerationRecord, network: Network) -> float:
    return sum(network.way(name).delay_s for name in chain_names(record))
