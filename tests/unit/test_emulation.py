"""What is emulated, in numbers: when frames arrive, which configs say so, how long phases take."""

import dataclasses
import itertools
import random
import time

import pytest
import torch

from pipeline.comm.emulation import STAMP_NBYTES, Conditions, EmulatedWire, hold, read_stamp, write_stamp
from pipeline.comm.mailbox import FrameMemory
from pipeline.comm.world import World
from pipeline.config.reading import load_config
from pipeline.config.schema import ConfigError
from pipeline.partition.plan import default_plan
from pipeline.runtime.emulation import check_emulation, emulated_links, receives_ahead_of, slowdown_of
from pipeline.runtime.stage_times import StageTimes

MS = 1_000_000
FOUR = World(rank=2, world_size=4, local_world_size=4)


def test_frames_follow_each_other_at_the_rate_and_are_on_their_way_together():
    wire = EmulatedWire(Conditions(bits_per_s=8e6, delay_s=0.05))  # a byte a microsecond
    assert wire.arrival_ns(0, 10_000) == 60 * MS
    assert wire.arrival_ns(1 * MS, 10_000) == 70 * MS  # waits 9 ms for the first, not for its arrival
    assert wire.arrival_ns(100 * MS, 1_000) == 151 * MS  # the link has been idle


def test_the_rate_holds_over_many_frames():
    wire, rng = EmulatedWire(Conditions(bits_per_s=1e6)), random.Random(1)
    sizes = [rng.randrange(1, 5_000) for _ in range(1_000)]
    arrivals = [wire.arrival_ns(0, nbytes) for nbytes in sizes]
    assert arrivals[-1] == pytest.approx(8_000 * sum(sizes), rel=1e-9)
    assert arrivals == sorted(arrivals)


def test_without_a_rate_there_is_only_the_delay():
    wire = EmulatedWire(Conditions(delay_s=0.02))
    assert wire.arrival_ns(5, 2**40) == 5 + 20 * MS


def test_jitter_stays_within_its_bounds_and_keeps_the_order():
    wire = EmulatedWire(Conditions(delay_s=0.02, jitter_s=0.005), seed=3)
    sent = [i * 10 * MS for i in range(500)]
    late = [wire.arrival_ns(at, 1) - at for at in sent]
    assert min(late) < 16 * MS and max(late) > 24 * MS
    assert all(15 * MS <= each <= 25 * MS for each in late)
    close = EmulatedWire(Conditions(delay_s=0.02, jitter_s=0.02))
    arrivals = [close.arrival_ns(i, 1) for i in range(500)]
    assert arrivals == sorted(arrivals) and arrivals[0] >= 0


def test_wires_with_another_seed_have_another_jitter():
    conditions = Conditions(delay_s=0.02, jitter_s=0.01)
    arrivals = {EmulatedWire(conditions, seed).arrival_ns(0, 1) for seed in range(4)}
    assert len(arrivals) == 4


def test_a_stamp_stands_in_front_of_the_frame():
    buffer = FrameMemory(100, 10, stamped=True).allocate()
    buffer.host[:] = torch.arange(len(buffer.host)).to(torch.uint8)
    write_stamp(buffer.stamped, 2**62 + 77)
    assert read_stamp(buffer.message) == 2**62 + 77
    assert torch.equal(buffer.message[STAMP_NBYTES:], torch.arange(len(buffer.host)).to(torch.uint8))


def test_a_frame_is_held_until_it_is_due_and_no_longer_when_it_is_late():
    buffer = FrameMemory(100, 10, stamped=True).allocate()
    start_ns = time.monotonic_ns()
    write_stamp(buffer.stamped, start_ns + 30 * MS)
    hold(buffer.stamped)
    assert time.monotonic_ns() - start_ns >= 30 * MS
    start_s = time.monotonic()
    hold(buffer.stamped)  # its time has passed
    assert time.monotonic() - start_s < 0.03


def config_of(*overrides):
    return load_config(None, overrides)


def test_links_have_conditions_of_their_own():
    plan = default_plan(30, 4)
    names = plan.chain_names
    config = config_of(
        ("links", {"rate": "10mbit", "delay": "20ms"}),
        ("links_per_link", {names[1]: {"rate": "1mbit"}, names[2]: {"delay": "0", "rate": None}}),
    )
    conditions = emulated_links(config, plan)
    both = Conditions(bits_per_s=1e7, delay_s=0.02)
    assert conditions == {0: both, 1: dataclasses.replace(both, bits_per_s=1e6), 3: both}  # 2 is as the machine is


def test_results_have_a_link_of_their_own_without_wrap():
    plan = default_plan(30, 4, wrap=False)
    conditions = emulated_links(config_of(("links.delay", "20ms")), plan)
    assert sorted(conditions) == [0, 1, 2, 3] and plan.chain_names[3] == "result:node3->node0"


def test_nothing_is_emulated_by_default():
    config = config_of()
    assert emulated_links(config, default_plan(30, 4)) == {}
    check_emulation(config, World())
    assert receives_ahead_of(config, {}, credits=9) == config.runtime.receives_ahead == 2
    assert "links" not in config.numerics()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("links.rate", "ten")], "links.rate: 'ten' is not a rate"),
        ([("links.rate", "0mbit")], "links.rate: a rate must be at least 1 bit/s"),
        ([("links.delay", "20")], "links.delay: '20' is not a time"),
        ([("links.delay", "2000s")], "links.delay must be at most 60 s"),
        ([("links.jiter", "2ms")], "unknown key links.jiter; did you mean links.jitter?"),
        ([("links_per_link", {"a": {"rat": "1mbit"}})], "unknown key links_per_link.a.rat; did you mean"),
        ([("links_per_link", {"a": {"rate": "1mbyte"}})], "links_per_link.a.rate: '1mbyte' is not a rate"),
        ([("links_per_link", {"a": 3})], "links_per_link.a must be a mapping"),
        ([("partition.nodes", [{"slowdown": 0.5}] * 4)], r"partition.nodes\[0\].slowdown must be at least 1"),
    ],
)
def test_bad_values_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config_of(*overrides)


SLOW = ("partition.nodes", [{}, {}, {"slowdown": 3}, {}])


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        ([("links.rate", "1mbit")], World(), "links emulates nodes apart, but one process plays all 4"),
        ([SLOW], World(), r"partition.nodes\[2\].slowdown emulates nodes apart"),
        ([("links.rate", "1mbit")], World(world_size=4, local_world_size=2), "these ranks are on several"),
        ([("links.rate", "1mbit"), ("runtime.backend", "nccl")], FOUR, "not over NCCL"),
    ],
)
def test_what_cannot_be_emulated_is_refused(overrides, world, message):
    with pytest.raises(ConfigError, match=message):
        check_emulation(config_of(*overrides), world)


def test_the_name_of_no_link_is_refused():
    config = config_of(("links_per_link", {"layer:9:node0->node1": {"rate": "1mbit"}}))
    with pytest.raises(ConfigError, match="links_per_link has 'layer:9:node0->node1'; this plan's links are: layer:2"):
        emulated_links(config, default_plan(30, 4))


def test_slow_nodes_on_several_machines_are_welcome():
    check_emulation(config_of(SLOW), World(world_size=4, local_world_size=1))
    assert [slowdown_of(config_of(SLOW), World(rank=rank, world_size=4)) for rank in range(4)] == [1, 1, 3, 1]


def test_what_is_emulated_is_another_run():
    several = [], [("links.rate", "1mbit")], [("links.rate", "2mbit")], [SLOW]
    numerics = [config_of(*overrides).numerics() for overrides in several]
    assert all(a != b for a, b in itertools.combinations(numerics, 2))


def test_a_slow_device_takes_so_many_times_as_long():
    times, cpu = StageTimes(slowdown=3), torch.device("cpu")
    start_s = time.perf_counter()
    with times.measure("compute", cpu):
        time.sleep(0.02)
        with times.measure("importance", cpu, within="compute"):
            time.sleep(0.01)
    with times.measure("measure", cpu):
        time.sleep(0.01)
    total_s = time.perf_counter() - start_s
    seconds = times.as_dict()
    assert 0.06 <= seconds["compute_s"] and 0.03 <= seconds["importance_s"]
    assert seconds["compute_s"] + seconds["importance_s"] + seconds["measure_s"] == pytest.approx(total_s, abs=0.005)
    assert 0.01 <= seconds["measure_s"] < 0.03
