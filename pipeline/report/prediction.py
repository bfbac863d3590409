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

Left out: filling and draining, TCP/IP's own headers and slow start, links that share one uplink, receives
posted too late (runtime.receives_ahead), and machines faster or slower than the measured ones. Decoding is predicted
from forwards of one token over a short cache (in records of older versions without one): attention to a long text
comes on top, and so do sampling and the time of an importance metric.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.records.run_record import OneTokenStage, RunRecord, StageSeconds

__all__ = ["Decode", "Network", "OneToken", "PipelineCosts", "Prefill", "predict_decode", "predict_prefill"]


@dataclass(frozen=True, kw_only=True)
class Network:
    """Every link: `bits_per_s` each way, and the round-trip time between its two ends."""

    bits_per_s: float
    rtt_s: float


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
            one_token=measured
            and OneToken(
                seconds=sum(map(_stage_seconds, measured.stages.values())),
                nbytes=sum(link.payload_bytes + link.header_bytes for link in measured.links.values()),
            ),
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """`binds` is a node's name, a link's, or "in flight" where too few micro-batches are."""

    tokens_per_s: float
    binds: str


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Seconds per generated token, and what they consist of."""

    compute_s: float
    transfer_s: float
    round_trip_s: float

    @property
    def total_s(self) -> float:
        return self.compute_s + self.transfer_s + self.round_trip_s

    @property
    def binds(self) -> str:
        parts = {"compute": self.compute_s, "bandwidth": self.transfer_s, "round trips": self.round_trip_s}
        return max(parts, key=parts.__getitem__)


def predict_prefill(costs: PipelineCosts, network: Network) -> Prefill:
    """Long-run rate over a long text, and what limits it."""
    transfer_s = {name: 8 * nbytes / network.bits_per_s for name, nbytes in costs.link_bytes.items()}
    terms = costs.node_s | transfer_s
    wait_s = costs.num_hops * network.rtt_s / 2 / costs.microbatch_tokens
    terms["in flight"] = (sum(terms.values()) + wait_s) / costs.in_flight
    binds = max(terms, key=terms.__getitem__)
    return Prefill(tokens_per_s=1 / terms[binds] if terms[binds] else math.inf, binds=binds)


def predict_decode(costs: PipelineCosts, network: Network) -> Decode | None:
    """Latency of one generated token; None where the run timed no one-token forward."""
    if costs.one_token is None:
        return None
    return Decode(
        compute_s=costs.one_token.seconds,
        transfer_s=8 * costs.one_token.nbytes / network.bits_per_s,
        round_trip_s=costs.num_hops * network.rtt_s / 2,
    )


def _stage_seconds(times: StageSeconds | OneTokenStage) -> float:
    importance_s = times.importance_s if isinstance(times, StageSeconds) else 0.0
    return times.compute_s + times.compress_s + times.decompress_s + importance_s
