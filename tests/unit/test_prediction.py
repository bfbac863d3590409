"""The prediction against a simulated pipeline, event by event, whose ranks take what comes as the engine's do."""

import dataclasses
import heapq
import json
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.partition.plan import default_plan
from pipeline.records.run_record import Emulation
from pipeline.report.prediction import (
    Network,
    OneToken,
    PipelineCosts,
    Term,
    Way,
    emulated_network,
    predict_decode,
    predict_prefill,
    predict_run_s,
    predicted_run_s,
)
from pipeline.report.results import read_results
from tests.helpers.records import make_record, write_point


def simulate(plan, stage_s, frame_bytes, network, num_microbatches, in_flight):
    """Times at which node 0 has finished each micro-batch.

    A rank computes one stage at a time and takes frames in the order of their coming. While fewer than `in_flight`
    micro-batches are under way, rank 0 starts one after each frame, and more when none has come. A link carries one
    frame at a time and delivers it half a round trip after its last bit left. Losses return in frames without size.
    """
    num_stages, returns = len(plan.stages), plan.last_node != 0
    nodes = [stage.node for stage in plan.stages] + [0] * returns  # by place in the chain
    inboxes = [deque() for _ in range(plan.num_nodes)]  # places in the chain
    is_busy, link_free = [False] * plan.num_nodes, [0.0] * num_stages
    started, finished, may_start = 0, [], True
    events = []  # (time, count, node, place, whether it has arrived there or been computed)

    def at(time_s, node, place, has_arrived):
        at.count += 1
        heapq.heappush(events, (time_s, at.count, node, place, has_arrived))

    at.count = 0

    def work(now_s, node):
        nonlocal started, may_start
        if is_busy[node]:
            return
        has_credit = node == 0 and started < num_microbatches and started - len(finished) < in_flight
        if has_credit and (may_start or not inboxes[node]):
            place, started, may_start = 0, started + 1, False
        elif inboxes[node]:
            place, may_start = inboxes[node].popleft(), may_start or node == 0
        else:
            return
        is_busy[node] = True
        at(now_s + (stage_s[place] if place < num_stages else 0.0), node, place, False)

    work(0.0, 0)
    while events:
        now_s, _, node, place, has_arrived = heapq.heappop(events)
        if has_arrived:
            inboxes[node].append(place)
        else:
            is_busy[node] = False
            if place + 1 == len(nodes):
                finished.append(now_s)
            elif place + 1 < num_stages:
                way = network.way(plan.chain_names[place])
                link_free[place] = max(link_free[place], now_s) + 8 * frame_bytes[place] / way.bits_per_s
                at(link_free[place] + way.delay_s, nodes[place + 1], place + 1, True)
            else:
                at(now_s + network.way(plan.chain_names[place]).delay_s, 0, place + 1, True)
        work(now_s, node)
    assert len(finished) == num_microbatches
    return finished


def record_of(plan, stage_s, frame_bytes, microbatch_tokens, in_flight):
    """What a run would have recorded, with the seconds spread over phases."""
    num_microbatches = 3
    tokens = num_microbatches * microbatch_tokens
    times = [
        {
            "compute_s": 0.5 * s,
            "compress_s": 0.2 * s,
            "decompress_s": 0.2 * s,
            "importance_s": 0.1 * s,
            "wait_s": 9.0,
        }
        for s in stage_s[: len(plan.stages)]
    ]
    one_token = [{"compute_s": 0.6 * s, "compress_s": 0.2 * s, "decompress_s": 0.2 * s} for s in stage_s]
    return make_record(
        plan=plan,
        timed_tokens=tokens,
        results={"total_processed_tokens": tokens, "num_microbatches": num_microbatches},
        stages={str(i): {k: num_microbatches * v for k, v in t.items()} for i, t in enumerate(times)},
        traffic_per_link={
            link.name: {
                "bytes": num_microbatches * (frame_bytes[link.index] - 60),
                "header_bytes": num_microbatches * 50,
                "padding_bytes": num_microbatches * 10,
                "tokens": tokens,
            }
            for link in plan.links
        },
        schedule={"in_flight": in_flight},
        one_token={
            "stages": {str(s.stage_index): one_token[s.stage_index] for s in plan.stages},
            "links": {n.name: {"payload_bytes": frame_bytes[n.index] - 60, "header_bytes": 60} for n in plan.links},
        },
    )


seconds = st.floats(0.001, 0.1)
mbits_of_links = st.lists(st.sampled_from([1, 10, 100, 1000]), min_size=5, max_size=5)
delays_of_links = st.lists(st.sampled_from([0.0, 0.02, 0.15]), min_size=5, max_size=5)


def network_of(plan, mbits, delays_s):
    """One way per link, results' included; what is given for all links is not used."""
    ways = [Way(bits_per_s=m * 1e6, delay_s=d) for m, d in zip(mbits, delays_s, strict=True)]
    return Network(bits_per_s=1.0, rtt_s=99.0, links=dict(zip(plan.chain_names, ways, strict=False)))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    num_nodes=st.integers(2, 4),
    wrap=st.booleans(),
    stage_s=st.lists(seconds, min_size=5, max_size=5),
    frame_bytes=st.lists(st.integers(100, 500_000), min_size=5, max_size=5),
    mbits=st.sampled_from([10, 100, 1000]),
    rtt_s=st.sampled_from([0.0, 0.001, 0.04, 0.3]),
    in_flight=st.integers(1, 7),
)
def test_prefill_is_the_simulated_rate(num_nodes, wrap, stage_s, frame_bytes, mbits, rtt_s, in_flight):
    plan = default_plan(8, num_nodes, wrap=wrap)
    network = Network(bits_per_s=mbits * 1e6, rtt_s=rtt_s)
    costs = PipelineCosts.of(record_of(plan, stage_s, frame_bytes, 512, in_flight))
    # Queues in front of a stage that is slower by a share d take in_flight / d steps to fill, before which the rate is
    # off by up to d: after 4,000 steps that is less than the tolerance.
    finished = simulate(plan, stage_s, frame_bytes, network, 4000, in_flight)
    num_measured = 420  # a multiple of every in_flight: the pipeline's rhythm repeats with it
    end = len(finished) - 1 - in_flight  # after that the pipeline drains
    rate = 512 * num_measured / (finished[end] - finished[end - num_measured])
    assert predict_prefill(costs, network).tokens_per_s == pytest.approx(rate, rel=3e-3)


@settings(max_examples=40, deadline=None)
@given(
    num_nodes=st.integers(2, 4),
    wrap=st.booleans(),
    stage_s=st.lists(seconds, min_size=5, max_size=5),
    frame_bytes=st.lists(st.integers(100, 5000), min_size=5, max_size=5),
    mbits=st.sampled_from([1, 10, 1000]),
    rtt_s=st.sampled_from([0.0, 0.001, 0.04, 0.3]),
)
def test_decode_is_the_simulated_latency_of_one_token_after_another(
    num_nodes, wrap, stage_s, frame_bytes, mbits, rtt_s
):
    plan = default_plan(8, num_nodes, wrap=wrap)
    network = Network(bits_per_s=mbits * 1e6, rtt_s=rtt_s)
    costs = PipelineCosts.of(record_of(plan, stage_s, frame_bytes, 1, 1))
    finished = simulate(plan, stage_s, frame_bytes, network, 6, in_flight=1)
    assert predict_decode(costs, network).s_per_token == pytest.approx(finished[-1] - finished[-2])


@settings(max_examples=60, deadline=None)
@given(
    num_nodes=st.integers(2, 4),
    wrap=st.booleans(),
    stage_s=st.lists(seconds, min_size=5, max_size=5),
    frame_bytes=st.lists(st.integers(100, 50_000), min_size=5, max_size=5),
    mbits=mbits_of_links,
    delays_s=delays_of_links,
)
def test_every_link_has_its_own_rate_and_delay(num_nodes, wrap, stage_s, frame_bytes, mbits, delays_s):
    plan = default_plan(8, num_nodes, wrap=wrap)
    network = network_of(plan, mbits, delays_s)
    one_by_one = PipelineCosts.of(record_of(plan, stage_s, frame_bytes, 512, 1))
    finished = simulate(plan, stage_s, frame_bytes, network, 5, in_flight=1)
    assert predict_run_s(one_by_one, network, 5) == pytest.approx(finished[-1])
    assert predict_prefill(one_by_one, network).tokens_per_s == pytest.approx(512 / (finished[-1] - finished[-2]))
    assert predict_decode(one_by_one, network).s_per_token == pytest.approx(finished[-1] - finished[-2])


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    num_nodes=st.integers(2, 4),
    wrap=st.booleans(),
    stage_s=st.lists(seconds, min_size=5, max_size=5),
    frame_bytes=st.lists(st.integers(100, 50_000), min_size=5, max_size=5),
    mbits=mbits_of_links,
    delays_s=delays_of_links,
    num_microbatches=st.integers(1, 40),
    in_flight=st.integers(1, 7),
)
def test_a_whole_run_fills_works_and_drains(
    num_nodes, wrap, stage_s, frame_bytes, mbits, delays_s, num_microbatches, in_flight
):
    """Exact where no node has two stages, which it may take in an order that costs time."""
    plan = default_plan(8, num_nodes, wrap=wrap)
    network = network_of(plan, mbits, delays_s)
    costs = PipelineCosts.of(record_of(plan, stage_s, frame_bytes, 512, in_flight))
    finished = simulate(plan, stage_s, frame_bytes, network, num_microbatches, in_flight)
    predicted = predict_run_s(costs, network, num_microbatches)
    if num_microbatches == 1 or plan.last_node != 0:
        assert predicted == pytest.approx(finished[-1])
    assert 0.8 * finished[-1] < predicted <= finished[-1] * (1 + 1e-9)


COSTS = PipelineCosts(
    stage_s=(("node 0", 1.5e-3), ("node 1", 1e-3), ("node 0", 0.5e-3)),
    link_bytes={"a": 1000.0, "b": 500.0},
    microbatch_tokens=100,
    in_flight=4,
    hops=("a", "b"),
    one_token=None,
)


def test_what_binds_is_named():
    assert predict_prefill(COSTS, Network(bits_per_s=1e9, rtt_s=0.0)).binds == "node 0"
    slow = predict_prefill(COSTS, Network(bits_per_s=1e6, rtt_s=0.0))
    assert (slow.binds, slow.tokens_per_s) == ("a", pytest.approx(125))
    assert predict_prefill(COSTS, Network(bits_per_s=1e9, rtt_s=2.0)).binds == "in flight"


def test_stages_of_a_node_add_up():
    plan = default_plan(8, 4)
    costs = PipelineCosts.of(record_of(plan, [0.1, 0.2, 0.3, 0.4, 0.5], [1000] * 5, 10, 6))
    expected = {"node 0": 0.06, "node 1": 0.02, "node 2": 0.03, "node 3": 0.04}
    assert costs.node_s == pytest.approx(expected)
    assert costs.hops == tuple(link.name for link in plan.links)
    assert costs.link_bytes[plan.links[0].name] == pytest.approx(100)


def test_without_a_one_token_forward_there_is_no_latency():
    assert predict_decode(COSTS, Network(bits_per_s=1e9, rtt_s=0.0)) is None
    record = record_of(default_plan(8, 4), [0.1] * 5, [1000] * 5, 10, 6).model_copy(update={"one_token": None})
    assert PipelineCosts.of(record).one_token is None


def test_a_term_is_linear_in_what_the_network_costs():
    term = Term(name="x", seconds=0.5, bits={"a": 2e6, "b": 1e6}, hops={"a": 1.0, "result": 2.0})
    assert term.on(Network(bits_per_s=1e6, rtt_s=0.2)) == pytest.approx(0.5 + 3.0 + 0.3)
    assert term.on(Network(bits_per_s=2e6, rtt_s=0.0)) == pytest.approx(0.5 + 1.5)


def test_the_terms_of_both_predictions():
    costs = dataclasses.replace(COSTS, one_token=OneToken(seconds=0.25, link_bytes={"a": 500.0, "b": 200.0}))
    *resources, lap = costs.prefill_terms
    assert resources == [
        Term(name="node 0", seconds=2e-3),
        Term(name="node 1", seconds=1e-3),
        Term(name="a", bits={"a": 8000.0}),
        Term(name="b", bits={"b": 4000.0}),
    ]
    assert (lap.name, lap.seconds) == ("in flight", pytest.approx(3e-3 / 4))
    assert lap.bits == {"a": 2000.0, "b": 1000.0} and lap.hops == pytest.approx({"a": 1 / 400, "b": 1 / 400})
    parts = [Term(name="compute", seconds=0.25), Term(name="bandwidth", bits={"a": 4000.0, "b": 1600.0})]
    assert costs.decode_terms == [*parts, Term(name="round trips", hops={"a": 1.0, "b": 1.0})]
    network = Network(bits_per_s=5600.0, rtt_s=0.5)
    latency = predict_decode(costs, network)
    assert (latency.s_per_token, latency.binds) == (pytest.approx(1.75), "bandwidth")


def test_unlike_links_by_hand():
    network = Network(bits_per_s=1e9, rtt_s=0.0, links={"b": Way(bits_per_s=4e5, delay_s=0.3)})
    *_, link_a, link_b, lap = COSTS.prefill_terms
    assert link_a.on(network) == pytest.approx(8000 / 1e9) and link_b.on(network) == pytest.approx(4000 / 4e5)
    lap_s = 100 * (3e-3 + 8000 / 1e9 + 0.01) + 0.3
    assert lap.on(network) == pytest.approx(lap_s / 4 / 100)
    assert predict_prefill(COSTS, network).binds == "b"
    # Nine of them: b takes 1 s each, of which the lap of 1.6 s has one; four are under way, more than 1.6 / 1.
    assert predict_run_s(COSTS, network, 9) == pytest.approx(lap_s + 8 * 1.0)
    far = Network(bits_per_s=1e9, rtt_s=0.0, links={"b": Way(bits_per_s=4e5, delay_s=9.3)})
    assert predict_run_s(COSTS, far, 9) == pytest.approx(3 * (lap_s + 9))  # four, four and one


def test_the_network_of_a_record():
    plan = default_plan(8, 4)
    names = plan.chain_names
    links = {names[0]: {"bits_per_s": None, "delay_s": 0.02, "jitter_s": 0.01}}
    network = emulated_network(Emulation.from_plain({"links": links, "slowdown": []}))
    assert network.way(names[0]) == Way(bits_per_s=float("inf"), delay_s=0.02)
    assert network.way(names[1]) == Way(bits_per_s=float("inf"), delay_s=0.0)


def test_a_run_is_predicted_under_the_network_that_it_was_under():
    plan = default_plan(8, 4)
    links = {name: {"bits_per_s": 1e5, "delay_s": 0.5, "jitter_s": 0.0} for name in plan.chain_names}
    emulation = {"links": links, "slowdown": []}
    record = record_of(plan, [0.1] * 5, [1000] * 5, 10, 1)  # 3 micro-batches, one under way
    assert predicted_run_s(record) is None
    emulated = make_emulated(record, emulation)
    lap_s = 5 * 0.1 + 4 * (8000 / 1e5 + 0.5)
    assert predicted_run_s(emulated) == pytest.approx(3 * lap_s)
    half = emulated.model_copy(update={"timed_tokens": 20})  # of a session that had two of them left
    stages = {i: t.model_copy(update=scaled(t, 2 / 3)) for i, t in record.stages.items()}
    assert predicted_run_s(half.model_copy(update={"stages": stages})) == pytest.approx(2 * lap_s)
    measuring = {i: t.model_copy(update={"measure_s": 0.6}) for i, t in record.stages.items()}
    assert predicted_run_s(emulated.model_copy(update={"stages": measuring})) == pytest.approx(3 * lap_s + 5 * 0.6)
    decoding = emulated.protocol.model_copy(update={"mode": "decode"})
    assert predicted_run_s(emulated.model_copy(update={"protocol": decoding})) is None
    assert predicted_run_s(emulated.model_copy(update={"timed_tokens": 0})) is None


def make_emulated(record, emulation):
    return record.model_copy(update={"emulation": Emulation.from_plain(emulation)})


def scaled(times, factor):
    return {key: factor * value for key, value in times.model_dump().items() if key.endswith("_s")}


def test_a_record_of_micro_batches_without_a_token_is_skipped(tmp_path):
    path = write_point(tmp_path)
    record = json.loads(path.read_text())
    record["results"]["total_processed_tokens"] = 0
    path.write_text(json.dumps(record))
    results = read_results([tmp_path])
    assert results.points == [] and "more than results.total_processed_tokens, 0" in results.skipped[0]
