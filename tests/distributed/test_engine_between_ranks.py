"""The engine over Gloo, with stages that only add one: many passes, many failures, many jobs on the same links."""

import datetime
import random
import threading
import time

import pytest
import torch
import torch.distributed as dist

from pipeline.comm.link_ends import forward_hops, open_links
from pipeline.comm.mailbox import Arrivals, BodyChannel
from pipeline.comm.world import World
from pipeline.partition.schedule import max_in_flight
from pipeline.runtime.engine import Engine, Failure
from tests.helpers.adding_stages import PLANS, Adding, Windows, expected, places_of_failure, some_sleep, specs
from tests.helpers.launch import call_on_ranks
from tests.helpers.mailboxes import num_free

NUM_RANKS = 3


def join(plan, apart):
    """What carries each link's bodies, where they go apart."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    if not apart:
        return {}
    groups = {link.index: dist.new_group([link.src_node, link.dst_node]) for link in plan.links}
    return {index: BodyChannel(group, torch.device("cpu"), timeout_s=60) for index, group in groups.items()}


def run_job(plan, rank, worker, source, *, channels, depth, credits):
    ends = open_links(
        forward_hops(plan, devices={}, channels=channels),
        specs(plan),
        World(rank=rank, world_size=NUM_RANKS),
        receives_ahead=depth,
    )
    Engine(worker, ends, lambda where, **how: f"rank {rank}, {where}", source=source, credits=credits).run()
    for index, sender in ends.senders.items():
        num_buffers = max(2, depth) if index in channels else 2
        assert num_free(sender.outbox, num_buffers) == num_buffers, "a buffer was lost"
    return ends


def run_jobs(rank, name, apart, depth, jobs):
    """Jobs one after the other, each of (number of passes, share that fails, most seconds of sleep)."""
    plan, inboxes = PLANS[name], [thread.name for thread in threading.enumerate()]
    channels, limit = join(plan, apart), max_in_flight(plan, receives_ahead=depth)
    for seed, (num_passes, failing, sleep_s) in enumerate(jobs):
        rng = random.Random(seed)  # alike on every rank
        places = list(places_of_failure(plan))
        fails = {index: rng.choice(places) for index in range(num_passes) if rng.random() < failing}
        worker = Adding(plan, rank, fails=fails, sleep=some_sleep(100 * seed + rank, sleep_s))
        source = Windows(num_passes, limit) if rank == 0 else None
        run_job(plan, rank, worker, source, channels=channels, depth=depth, credits=limit)
        left = [thread.name for thread in threading.enumerate() if thread.name.startswith("inbox")]
        assert left == [], left
        if source is not None:
            assert len(source.results) == num_passes
            assert {i for i, result in enumerate(source.results) if isinstance(result, Failure)} == set(fails)
            assert all(source.results[i] == expected(plan, i) for i in range(num_passes) if i not in fails)
    dist.barrier()
    dist.destroy_process_group()
    assert [thread.name for thread in threading.enumerate()] == inboxes


def run_late_jobs(rank, name, apart, depth, jobs):
    """Where rank 0 learns late of what has come."""
    put = Arrivals.put

    def put_late(arrivals, link_index, item):
        time.sleep(0.004 * (rank == 0))
        put(arrivals, link_index, item)

    Arrivals.put = put_late
    run_jobs(rank, name, apart, depth, jobs)


def check(outcomes):
    assert [o.returncode for o in outcomes] == [0] * len(outcomes), "\n".join(o.stderr[-3000:] for o in outcomes)


@pytest.mark.parametrize("apart", [False, True], ids=["whole", "bodies apart"])
@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("name", PLANS)
def test_jobs_one_after_the_other_with_as_many_passes_in_flight_as_the_links_hold(name, depth, apart):
    jobs = [(0, 0.0, 0.0), (150, 0.0, 0.002), (1, 0.0, 0.0), (100, 0.3, 0.001), (20, 1.0, 0.0), (50, 0.0, 0.0)]
    check(call_on_ranks(NUM_RANKS, run_jobs, name, apart, depth, jobs, timeout_s=100))


@pytest.mark.parametrize("apart", [False, True], ids=["whole", "bodies apart"])
def test_links_hold_as_many_passes_as_are_let_in_where_one_rank_is_late(apart):
    """What is late piles up: with two buffers a link for bodies apart, all ranks waited for one."""
    check(call_on_ranks(NUM_RANKS, run_late_jobs, "ring", apart, 4, [(150, 0.3, 0.002)], timeout_s=100))
