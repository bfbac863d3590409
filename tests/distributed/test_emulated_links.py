"""Emulated links between real ranks: frames come in order, whole and none too early; numbers stay what they were."""

import datetime
import itertools
import json
import threading
import time

import torch
import torch.distributed as dist

from compressors.base import Payload
from pipeline.comm.emulation import Conditions
from pipeline.comm.link import HiddenSpec
from pipeline.comm.link_ends import Hop, open_links
from pipeline.comm.wire import WireFormat
from pipeline.comm.world import World
from pipeline.partition.passes import Pass, PassKind
from pipeline.partition.plan import default_plan
from pipeline.records.store import read_per_token, read_record
from tests.distributed.test_generation import answers, arguments, prompts_file
from tests.helpers.launch import call_on_ranks, run_alone, run_ranks
from tests.helpers.tiny_models import tiny_arguments, tiny_model

NAMES = default_plan(6, 4).chain_names  # of the tiny models
NUM_FRAMES = 1_000
LENGTHS = [1 + 37 * i % 64 for i in range(NUM_FRAMES)]  # tokens of 16 float32
CONDITIONS = Conditions(bits_per_s=20e6, delay_s=0.05, jitter_s=0.01)


def spec(index):
    return HiddenSpec(
        name=f"layer:{index}:node{index}->node{1 - index}",
        wire=WireFormat(link_index=index, num_trail=0, codec_ids=(5,), dtype=torch.float32),
        hidden_size=16,
        bound=lambda kind, shape: 4 * shape[0] * shape[1] * shape[2],
        microbatch_shapes=[(1, length) for length in LENGTHS],
    )


def exchange(rank):
    """1,000 frames each way at once; each rank checks what comes and when, by the sender's clock, which is its own."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    hops = [Hop(0, 1), Hop(1, 0)]
    emulated = dict.fromkeys((0, 1), CONDITIONS)
    world = World(rank=rank, world_size=2, local_world_size=2)
    specs = {i: spec(i) for i in (0, 1)}
    ends = open_links(hops, specs, world, receives_ahead=64, emulated=emulated)
    start_s = time.monotonic()
    dist.barrier()  # so that the other rank sends nothing before
    sender = ends.senders[rank]

    def send():
        for i, length in enumerate(LENGTHS):
            data = (torch.arange(64 * length) * (i + 3) % 251).to(torch.uint8)
            sender.send(Pass(kind=PassKind.SCORE, microbatch_index=i), Payload(data, (1, length, 16)), ())

    sending = threading.Thread(target=send)
    sending.start()
    came_s = []
    for i, length in enumerate(LENGTHS):
        arrival = ends.take()
        came_s.append(time.monotonic() - start_s)
        assert arrival.frame.work.microbatch_index == i
        expected = (torch.arange(64 * length) * (i + 3) % 251).to(torch.uint8)
        assert torch.equal(arrival.frame.payload.data, expected)
        ends.release(arrival)
    bits = 8 * sum(64 * length + 16 for length in LENGTHS)
    assert came_s[0] >= CONDITIONS.delay_s - CONDITIONS.jitter_s
    assert came_s[-1] >= bits / CONDITIONS.bits_per_s + CONDITIONS.delay_s - CONDITIONS.jitter_s
    # All were on their way together: one after the other they would have taken their delays besides.
    assert came_s[-1] < bits / CONDITIONS.bits_per_s + 0.2 * NUM_FRAMES * CONDITIONS.delay_s
    sending.join()
    sender.end()
    assert ends.take().frame is None
    ends.receivers[1 - rank].close()
    ends.flush()
    dist.barrier()
    dist.destroy_process_group()


def test_a_thousand_frames_each_way_in_order_and_none_too_early():
    outcomes = call_on_ranks(2, exchange, timeout_s=120)
    assert [o.returncode for o in outcomes] == [0, 0], "\n".join(o.stderr for o in outcomes)


def share_a_wire(rank):
    """Two links from rank 0 to rank 1; a frame of the one that is sent late does not hold up those of the other."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    world = World(rank=rank, world_size=2, local_world_size=2)
    emulated = dict.fromkeys((0, 1), Conditions(bits_per_s=1e6, delay_s=4.0))
    specs = {i: spec(i) for i in (0, 1)}
    ends = open_links([Hop(0, 1), Hop(0, 1)], specs, world, receives_ahead=3, emulated=emulated)
    dist.barrier()
    start_s = time.monotonic()
    data = torch.zeros(64, dtype=torch.uint8)
    if rank == 0:
        ends.senders[0].send(Pass(kind=PassKind.SCORE, microbatch_index=0), Payload(data, (1, 1, 16)), ())
        second = Payload(data.repeat(LENGTHS[1]), (1, LENGTHS[1], 16))
        ends.senders[0].send(Pass(kind=PassKind.SCORE, microbatch_index=1), second, ())
        time.sleep(3)  # the first frame is still held back
        ends.senders[1].send(Pass(kind=PassKind.SCORE, microbatch_index=0), Payload(data, (1, 1, 16)), ())
        for sender in ends.senders.values():
            sender.end()
    else:
        came_s = {}
        while len(came_s) < 3:
            arrival = ends.take()
            if arrival.frame is not None:
                came_s[arrival.link_index, arrival.frame.work.microbatch_index] = time.monotonic() - start_s
                ends.release(arrival)
        assert 3.5 < came_s[0, 0] < 6 and 3.5 < came_s[0, 1] < 6 and came_s[1, 0] > 6.5
        for receiver in ends.receivers.values():
            receiver.close()
    ends.flush()
    dist.barrier()
    dist.destroy_process_group()


def test_frames_of_two_links_cross_one_wire_in_the_order_in_which_they_were_sent():
    outcomes = call_on_ranks(2, share_a_wire, timeout_s=120)
    assert [o.returncode for o in outcomes] == [0, 0], "\n".join(o.stderr for o in outcomes)


def end_at_once(rank):
    """END alone, over a delay that a loaded machine does not reach."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    world = World(rank=rank, world_size=2, local_world_size=2)
    emulated = dict.fromkeys((0, 1), Conditions(delay_s=5.0))
    specs = {i: spec(i) for i in (0, 1)}
    ends = open_links([Hop(0, 1), Hop(1, 0)], specs, world, receives_ahead=3, emulated=emulated)
    dist.barrier()
    start_s = time.monotonic()
    ends.senders[rank].end()
    assert ends.take().frame is None
    ends.receivers[1 - rank].close()
    assert time.monotonic() - start_s < 4
    ends.flush()
    dist.barrier()
    dist.destroy_process_group()


def test_the_end_is_not_held_back_or_runs_would_seem_a_lap_longer():
    outcomes = call_on_ranks(2, end_at_once, timeout_s=120)
    assert [o.returncode for o in outcomes] == [0, 0], "\n".join(o.stderr for o in outcomes)


def test_results_are_bit_equal_and_the_record_says_what_was_emulated(tmp_path):
    sweep = tmp_path / "sweep.yaml"
    links = {"rate": "20mbit", "delay": "15ms", "jitter": "5ms"}
    points = [
        {"for": {"codec": ["none", "nf4"]}, "compressor": "{codec}"},
        {"for": {"codec": ["none", "nf4"]}, "compressor": "{codec}", "links": links},
        {"compressor": "nf4", "links.delay": "1ms", "links_per_link": {NAMES[1]: {"rate": "8mbit"}}},
    ]
    sweep.write_text(json.dumps({"name": "thin", "points": points}))
    words = tiny_arguments(tmp_path / "out", "--sweep", str(sweep), num_tokens=500)
    run_ranks([words] * 4, timeout_s=240)[0].check()
    records = {path: read_record(path) for path in (tmp_path / "out").glob("*.json")}
    assert len(records) == 5 == len({record.digest for record in records.values()})
    for (path, record), (other, its) in itertools.combinations(records.items(), 2):
        same_codec = record.args.config.compressor == its.args.config.compressor
        losses = [read_per_token(each)["loss"].tobytes() for each in (path, other)]
        assert (losses[0] == losses[1]) == same_codec
        if same_codec:
            assert record.traffic_per_link == its.traffic_per_link
    emulated = [record for record in records.values() if record.emulation is not None]
    for record in emulated:
        conditions = {name: link.model_dump() for name, link in record.emulation.links.items()}
        if len({str(each) for each in conditions.values()}) == 1:
            assert conditions == dict.fromkeys(NAMES, {"bits_per_s": 2e7, "delay_s": 0.015, "jitter_s": 0.005})
            num_laps = -(-record.results.num_microbatches // record.schedule.in_flight)
            assert record.time_run_s >= num_laps * 4 * 0.010
        else:
            assert [conditions[name]["bits_per_s"] for name in NAMES] == [None, 8e6, None, None]
            assert {each["delay_s"] for each in conditions.values()} == {0.001}
        assert record.schedule.receives_ahead == record.schedule.in_flight == 6
    assert len(emulated) == 3


def test_tokens_are_the_same_and_take_the_way_around(tmp_path):
    model, prompts = tiny_model("llama"), prompts_file(tmp_path)
    run_ranks([arguments(model, tmp_path / "a", prompts)] * 4, timeout_s=120)[0].check()
    far = arguments(model, tmp_path / "b", prompts, "links.delay=20ms", "partition.wrap=false")
    run_ranks([far] * 4, timeout_s=120)[0].check()
    near, far = answers(tmp_path / "a"), answers(tmp_path / "b")
    assert [near[i]["token_ids"] for i in near] == [far[i]["token_ids"] for i in near]
    # Three links of hidden states, and the one that brings the result back.
    assert all(line["tpot_s"]["median"] >= 4 * 0.020 for line in far.values() if line["tpot_s"])


def test_a_slow_node_is_slow_and_changes_nothing(tmp_path):
    nodes = "partition.nodes=[{}, {slowdown: 20}, {}, {}]"
    run_ranks([tiny_arguments(tmp_path / "a", num_tokens=500)] * 4, timeout_s=120)[0].check()
    run_ranks([tiny_arguments(tmp_path / "b", "--set", nodes, num_tokens=500)] * 4, timeout_s=120)[0].check()
    (path,), (slow_path,) = (list((tmp_path / each).glob("*.json")) for each in "ab")
    record, slow = read_record(path), read_record(slow_path)
    assert read_per_token(path)["loss"].tobytes() == read_per_token(slow_path)["loss"].tobytes()
    assert slow.emulation.slowdown == (1, 20, 1, 1) and slow.emulation.links == {}
    others = [slow.stages[i].compute_s for i in ("0", "2", "3", "4")]
    assert slow.stages["1"].compute_s > 4 * max(others)
    assert slow.one_token.stages["1"].compute_s > 4 * record.one_token.stages["1"].compute_s


def test_one_process_does_not_pretend(tmp_path):
    outcome = run_alone(*tiny_arguments(tmp_path, "--set", "links.rate=1mbit"), timeout_s=60)
    assert outcome.returncode != 0
    assert "links emulates nodes apart, but one process plays all 4: start torchrun with" in outcome.stderr


def test_one_process_does_not_pretend_in_a_sweep_either(tmp_path):
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(json.dumps({"points": [{"compressor": "none"}, {"links": {"rate": "1mbit"}}]}))
    outcome = run_alone(*tiny_arguments(tmp_path / "out", "--sweep", str(sweep), num_tokens=300), timeout_s=60)
    assert outcome.returncode == 3
    (record,) = (read_record(path) for path in (tmp_path / "out").glob("*.json") if "failed" not in path.name)
    assert record.emulation is None
    (failure,) = (tmp_path / "out").glob("failed*.json")
    assert "links emulates nodes apart" in json.loads(failure.read_text())["error"]
