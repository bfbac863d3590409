"""What would my link do? Speed on another network, from one run's measured times and bytes.

Read from a record: seconds of each stage, bytes of each link (payload and headers), micro-batches in flight.
Link l has a bandwidth B_l, and what leaves it arrives d_l later: half the round-trip time R. Then

    s_n    = (compute + encode + decode + importance seconds of all stages of node n) / tokens
    b_l    = bytes per token of link l
    lap    = m (sum of s_n + sum of 8 b_l / B_l) + sum of d_l
    prefill seconds per token = max(s_n of each node, 8 b_l / B_l of each link, lap / (D m))

    decode seconds per token  = one-token seconds of all stages + sum of 8 p_l / B_l + sum of d_l

m is the mean number of tokens of a micro-batch, D the number in flight. The delays of a lap are those of the links, and
of one hop back to node 0 where the last stage is on another node. p_l are the bytes of a frame of one token. The
largest term of the prefill formula is the resource that binds; it is the exact long-run rate of a
pipeline in which nodes and links work in the order of the schedule and never fail.

A run of N micro-batches also fills and drains. With r = m times the largest s_n or 8 b_l / B_l, v the same with each
stage by itself in place of its node, J the whole part of (N - 1) / D, and f, e the seconds of the first and the last
stage for a micro-batch, it takes the longest of

    lap + (N - 1) v
    (J + 1) lap + (N - 1 - J D) r                        where N > D
    N m s_n + max(0, lap - e - f min(N, D))              where the first and the last stage are on one node n

in seconds; in the last case the node works on the first stage for others while the first micro-batch goes round. It is
exact where no node has two stages, else at most some per cent too short. This is set against the measured time where a
network was emulated, and s_n then has the seconds in which the run measured errors, too.

Every term is seconds + sum over links of bits / B_l + hops x d_l. `PipelineCosts` has the terms; prefill is the
largest, decoding their sum. The page embeds the same terms for its script, which evaluates them for the reader's
network.

Left out: TCP/IP's own headers and slow start, links that share one uplink, receives posted too late
(runtime.receives_ahead), jitter, and machines faster or slower than the measured ones. Decoding is predicted
from forwards of one token over a short cache (in records of older versions without one): attention to a long text
comes on top, and so do sampling and the time of an importance metric.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.records.labels import chain_names
from pipeline.records.run_record import Emulation, OneTokenStage, RunRecord, StageSeconds

__all__ = [
    "Network",
    "OneToken",
    "PipelineCosts",
    "Prediction",
    "Term",
    "Way",
    "emulated_network",
    "predict_decode",
    "predict_prefill",
    "predict_run_s",
    "predicted_run_s",
]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way of a link: `bits_per_s` (infinity: as fast as the machine), seconds from one end to the other."""

    bits_per_s: float
    delay_s: float


@dataclass(frozen=True, kw_only=True)
class Network:
    """`links` by name; every other one has `bits_per_s` each way, and the round-trip time between its two ends."""

    bits_per_s: float
    rtt_s: float
    links: Mapping[str, Way] = field(default_factory=dict)

    def way(self, link: str) -> Way:
        return self.links.get(link) or Way(bits_per_s=self.bits_per_s, delay_s=self.rtt_s / 2)


@dataclass(frozen=True, kw_only=True)
class Term:
    """Seconds per token that one resource takes: its own, and by link the bits that cross and how often a way is gone.

    A link that only the way is gone of has no bits, and the other way round.
    """

    name: str
    seconds: float = 0.0
    bits: Mapping[str, float] = field(default_factory=dict)
    hops: Mapping[str, float] = field(default_factory=dict)

    def on(self, network: Network) -> float:
        """Seconds."""
        bits_s = sum(bits / network.way(link).bits_per_s for link, bits in self.bits.items())
        return self.seconds + bits_s + sum(hops * network.way(link).delay_s for link, hops in self.hops.items())


@dataclass(frozen=True, kw_only=True)
class OneToken:
    """A forward of a single token: seconds over all stages, bytes by link."""

    seconds: float
    link_bytes: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class PipelineCosts:
    """What one run measured, per token: all that a prediction needs. `hops` are the links of a lap, results' too."""

    stage_s: tuple[tuple[str, float], ...]  # (node, seconds), in their order
    link_bytes: dict[str, float]
    microbatch_tokens: float
    in_flight: int
    hops: tuple[str, ...]
    one_token: OneToken | None

    @classmethod
    def of(cls, record: RunRecord, *, measuring: bool = False) -> PipelineCosts | None:
        """Of a record with links and timed tokens; None where it lacks either. With `measuring`, nodes also have the
        seconds in which they measured errors.
        """
        plan, tokens, results = record.plan, record.timed_tokens, record.results
        traffic, measured = record.traffic_per_link, record.one_token
        if not traffic or not tokens:
            return None
        times = [record.stages[str(stage.stage)] for stage in plan]
        seconds = [_stage_seconds(t) + (t.measure_s if measuring else 0.0) for t in times]
        return cls(
            stage_s=tuple((f"node {stage.node}", s / tokens) for stage, s in zip(plan, seconds, strict=True)),
            link_bytes={
                name: (link.bytes + link.header_bytes + link.padding_bytes) / link.tokens
                for name, link in traffic.items()
            },
            microbatch_tokens=results.total_processed_tokens / results.num_microbatches,
            in_flight=record.schedule.in_flight,
            hops=chain_names(record),
            one_token=None
            if measured is None
            else OneToken(
                seconds=sum(map(_stage_seconds, measured.stages.values())),
                link_bytes={
                    name: float(link.payload_bytes + link.header_bytes) for name, link in measured.links.items()
                },
            ),
        )

    @property
    def node_s(self) -> dict[str, float]:
        node_s: defaultdict[str, float] = defaultdict(float)
        for node, seconds in self.stage_s:
            node_s[node] += seconds
        return dict(node_s)

    @property
    def resources(self) -> list[Term]:
        """Nodes and links, each of which works on one micro-batch at a time."""
        return [
            *(Term(name=name, seconds=seconds) for name, seconds in self.node_s.items()),
            *(Term(name=name, bits={name: 8 * nbytes}) for name, nbytes in self.link_bytes.items()),
        ]

    @property
    def prefill_terms(self) -> list[Term]:
        """Of a long text; the largest one binds: a node, a link, or "in flight" where too few micro-batches are."""
        lap = Term(
            name="in flight",
            seconds=sum(self.node_s.values()) / self.in_flight,
            bits={name: 8 * nbytes / self.in_flight for name, nbytes in self.link_bytes.items()},
            hops=dict.fromkeys(self.hops, 1 / self.microbatch_tokens / self.in_flight),
        )
        return [*self.resources, lap]

    @property
    def decode_terms(self) -> list[Term]:
        """Of one token after another, which add up; none where the run timed no one-token forward."""
        if self.one_token is None:
            return []
        return [
            Term(name="compute", seconds=self.one_token.seconds),
            Term(name="bandwidth", bits={name: 8 * nbytes for name, nbytes in self.one_token.link_bytes.items()}),
            Term(name="round trips", hops=dict.fromkeys(self.hops, 1.0)),
        ]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds per token on a network, and the name of the largest term."""

    s_per_token: float
    binds: str

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.s_per_token if self.s_per_token else math.inf


def emulated_network(emulation: Emulation) -> Network:
    """The network that a run was under, without its jitter."""
    return Network(
        bits_per_s=math.inf,
        rtt_s=0.0,
        links={
            name: Way(bits_per_s=math.inf if link.bits_per_s is None else link.bits_per_s, delay_s=link.delay_s)
            for name, link in emulation.links.items()
        },
    )


def predict_prefill(costs: PipelineCosts, network: Network) -> Prediction:
    """Long-run rate over a long text, and what limits it."""
    largest = max(costs.prefill_terms, key=lambda term: term.on(network))
    return Prediction(s_per_token=largest.on(network), binds=largest.name)


def predict_run_s(costs: PipelineCosts, network: Network, num_microbatches: int) -> float:
    """Seconds of a whole run of equal micro-batches, filling and draining included."""
    tokens, in_flight = costs.microbatch_tokens, costs.in_flight
    lap_s = costs.prefill_terms[-1].on(network) * in_flight * tokens
    link_s = max(term.on(network) for term in costs.resources if term.bits) * tokens
    stage_s, node_s = [s * tokens for _, s in costs.stage_s], {n: s * tokens for n, s in costs.node_s.items()}
    limits = [lap_s + (num_microbatches - 1) * max(link_s, *stage_s)]
    num_laps, rest = divmod(num_microbatches - 1, in_flight)
    if num_laps:
        limits.append((num_laps + 1) * lap_s + rest * max(link_s, *node_s.values()))
    (first, _), (last, _) = costs.stage_s[0], costs.stage_s[-1]
    if first == last:
        idle_s = lap_s - stage_s[-1] - stage_s[0] * min(num_microbatches, in_flight)
        limits.append(num_microbatches * node_s[first] + max(0.0, idle_s))
    return max(limits)


def predicted_run_s(record: RunRecord) -> float | None:
    """What the timed part of a run should have taken on the network that it was under; None where nothing was
    emulated or timed, or a text was scored token by token, whose passes are unlike each other.
    """
    costs = PipelineCosts.of(record, measuring=True)
    if costs is None or record.emulation is None or record.protocol.mode == "decode":
        return None
    num_microbatches = max(1, round((record.timed_tokens or 0) / costs.microbatch_tokens))
    return predict_run_s(costs, emulated_network(record.emulation), num_microbatches)


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
