"""What would my link do? Speed on another network, from one run's measured times and bytes.

Read from a record: seconds of each stage, bytes of each link (payload and headers), micro-batches in flight.
Each link is given a bandwidth B of its own and the round-trip time R. Then

    s_n    = (compute + encode + decode + importance seconds of all stages of node n) / tokens
    b_l    = bytes per token of link l
    lap    = m (sum of s_n + sum of 8 b_l / B) + H R / 2
    prefill seconds per token = max(s_n of each node, 8 b_l / B of each link, lap / (D m))

    decode seconds per token  = one-token seconds of all stages + sum of 8 p_l / B + H R / 2

m is the mean number of tokens of a micro-batch, D the number in flight, H the number of hops of a lap: the
links, and one hop back to node 0 where the last stage is on another node. p_l are the bytes of a frame of one
token. The largest term of the prefill formula is the resource that binds; it is the exact long-run rate of a
pipeline in which nodes and links work in the order of the schedule and never fail.

Every term is seconds + bits / B + round trips x R. `PipelineCosts` has the terms; prefill is the largest, decoding
their sum. The page embeds the same terms for its script, which evaluates them for the reader's network.

Left out: filling and draining, TCP/IP's own headers and slow start, links that share one uplink, receives
posted too late (runtime.receives_ahead), and machines faster or slower than the measured ones. Decoding is predicted
from forwards of one token over a short cache (in records of older versions without one): attention to a long text
comes on top, and so do sampling and the time of an importance metric.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from pipeline.records.run_record import OneTokenStage, RunRecord, StageSeconds

__all__ = ["Network", "OneToken", "PipelineCosts", "Prediction", "Term", "predict_decode", "predict_prefill"]


@dataclass(frozen=True, kw_only=True)
class Network:
    """Every link: `bits_per_s` each way, and the round-trip time between its two ends."""

    bits_per_s: float
    rtt_s: float


@dataclass(frozen=True, kw_only=True)
class Term:
    """Seconds per token that one resource takes: `seconds` + `bits` / bandwidth + `round_trips` x round-trip time."""

    name: str
    seconds: float = 0.0
    bits: float = 0.0
    round_trips: float = 0.0

    def on(self, network: Network) -> float:
        """Seconds."""
        return self.seconds + self.bits / network.bits_per_s + self.round_trips * network.rtt_s


@dataclass(frozen=True, kw_only=True)
class OneToken:
    """A forward of a single token: seconds over all stages, bytes over all links."""

    seconds: float
    nbytes: float


@dataclass(frozen=True, kw_only=True)
class PipelineCosts:
    """What one run measured, per token: all that a prediction needs."""

    node_s: dict[str, float]
    link_bytes: dict[str, float]
    microbatch_tokens: float
    in_flight: int
    num_hops: int
    one_token: OneToken | None

    @classmethod
    def of(cls, record: RunRecord) -> PipelineCosts | None:
        """Of a record with links and timed tokens; None where it lacks either."""
        plan, tokens, results = record.plan, record.timed_tokens, record.results
        traffic, measured = record.traffic_per_link, record.one_token
        if not traffic or not tokens:
            return None
        node_s: defaultdict[str, float] = defaultdict(float)
        for stage in plan:
            node_s[f"node {stage.node}"] += _stage_seconds(record.stages[str(stage.stage)]) / tokens
        return cls(
            node_s=dict(node_s),
            link_bytes={
                name: (link.bytes + link.header_bytes + link.padding_bytes) / link.tokens
                for name, link in traffic.items()
            },
            microbatch_tokens=results.total_processed_tokens / results.num_microbatches,
            in_flight=record.schedule.in_flight,
            num_hops=len(traffic) + (plan[-1].node != plan[0].node),
            one_token=None
            if measured is None
            else OneToken(
                seconds=sum(map(_stage_seconds, measured.stages.values())),
                nbytes=sum(link.payload_bytes + link.header_bytes for link in measured.links.values()),
            ),
        )

    @property
    def prefill_terms(self) -> list[Term]:
        """Of a long text; the largest one binds: a node, a link, or "in flight" where too few micro-batches are."""
        resources = [
            *(Term(name=name, seconds=seconds) for name, seconds in self.node_s.items()),
            *(Term(name=name, bits=8 * nbytes) for name, nbytes in self.link_bytes.items()),
        ]
        lap = Term(
            name="in flight",
            seconds=sum(term.seconds for term in resources) / self.in_flight,
            bits=sum(term.bits for term in resources) / self.in_flight,
            round_trips=self.num_hops / 2 / self.microbatch_tokens / self.in_flight,
        )
        return [*resources, lap]

    @property
    def decode_terms(self) -> list[Term]:
        """Of one token after another, which add up; none where the run timed no one-token forward."""
        if self.one_token is None:
            return []
        return [
            Term(name="compute", seconds=self.one_token.seconds),
            Term(name="bandwidth", bits=8 * self.one_token.nbytes),
            Term(name="round trips", round_trips=self.num_hops / 2),
        ]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds per token on a network, and the name of the largest term."""

    s_per_token: float
    binds: str

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.s_per_token if self.s_per_token else math.inf


def predict_prefill(costs: PipelineCosts, network: Network) -> Prediction:
    """Long-run rate over a long text, and what limits it."""
    largest = max(costs.prefill_terms, key=lambda term: term.on(network))
    return Prediction(s_per_token=largest.on(network), binds=largest.name)


def predict_decode(costs: PipelineCosts, network: Network) -> Prediction | None:
    """Latency of one generated token, and what most of it is; None where the run timed no one-token forward."""
    terms = costs.decode_terms
    if not terms:
        return None
    largest = max(terms, key=lambda term: term.on(network))
    return Prediction(s_per_token=sum(term.on(network) for term in terms), binds=largest.name)


def _stage_seconds(times: StageSeconds | OneTokenStage) -> float:
    importance_s = times.importance_s if isinstance(times, StageSeconds) else 0.0
    return times.compute_s + times.compress_s + times.decompress_s + importance_s
