"""Log-probabilities of prompts: each told once, in order, whatever chunks, failures and new rings there are.

In a ring of checksums (`tests.helpers.checksum_ring`), where a slot that holds anything but its sequence gives others.
"""

import random

import pytest

from pipeline.generation.scheduler import Scheduler, SchedulerConfig
from pipeline.models.sampling import SamplingOptions
from tests.helpers.checksum_ring import PLANS, Asked, Ring, expected, expected_told

GREEDY = SamplingOptions()


def make_ring(plan, *, chunk=48, num_slots=2, credits=3, scheduler=None, **options):
    config = SchedulerConfig(num_slots=num_slots, slot_length=48, prefill_chunk=chunk, **{"passes": 2, **options})
    scheduler = scheduler or Scheduler(config)
    return scheduler, Ring(
        PLANS[plan], random.Random(0), scheduler, num_slots=num_slots, slot_length=48, credits=credits, failing=0
    )


def run(scheduler, ring, *everyone):
    for asked in everyone:
        scheduler.submit(asked)
    scheduler.close()
    ring.start()
    while ring.step():
        pass
    assert scheduler.is_done and not ring.in_flight


def check(plan, *everyone):
    for asked in everyone:
        assert asked.reason == "length" and asked.ids == expected(PLANS[plan], asked, asked.num_tokens)
        check_told(plan, asked, whole=True)


def check_told(plan, asked, *, whole):
    right = expected_told(PLANS[plan], asked) if asked.scored_from is not None else []
    told = [(token.token_id, token.logprob) for token in asked.told]
    assert len(told) == len(right) or not whole
    for own, other in zip(told, right, strict=False):
        assert own == (other[0], pytest.approx(other[1], abs=1e-12))


def prompt_of(length, last=0):
    return [*(number % 11 for number in range(length - 1)), last]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 48])
def test_every_position_is_told(plan, chunk):
    """Also beside answers, of a prompt that fills its slot, of one with two tokens."""
    scheduler, ring = make_ring(plan, chunk=chunk)
    cases = [(2, 1, 0), (2, 1, 3), (9, 1, 0), (9, 8, 0), (9, 4, 2), (48, 47, 0), (48, 30, 1), (48, 1, 0), (15, 8, 0)]
    everyone = [Asked(prompt_of(length, n), GREEDY, wanted, at) for n, (length, at, wanted) in enumerate(cases)]
    run(scheduler, ring, *everyone)
    check(plan, *everyone)
    assert all(work.num_tokens <= max(2, chunk) for work in ring.sent)


@pytest.mark.parametrize("scored_from", [-1, 0, 5, 6])
def test_positions_that_cannot_be_told_are_refused(scored_from):
    scheduler, _ = make_ring("one")
    with pytest.raises(ValueError, match=f"scored_from is {scored_from}; in a prompt of 5 tokens, 1 to 4"):
        scheduler.submit(Asked(prompt_of(5), GREEDY, 0, scored_from))
    with pytest.raises(ValueError, match="no token is wanted"):
        scheduler.submit(Asked(prompt_of(5), GREEDY, 0))
    with pytest.raises(ValueError, match="in a prompt of 1 tokens"):
        scheduler.submit(Asked([1], GREEDY, 1, 1))
    assert scheduler.progress is None


@pytest.mark.parametrize("chunk", [20, 48])
def test_a_context_is_computed_once_for_all_its_continuations(chunk):
    scheduler, ring = make_ring("ring", chunk=chunk, num_slots=4)
    context = prompt_of(40)
    everyone = [Asked([*context, n, *[n] * n], GREEDY, 0, 40) for n in range(1, 7)]
    run(scheduler, ring, *everyone)
    check("ring", *everyone)
    plain = [work for work in ring.sent if not work.echoes]
    assert sum(len(work.rows) * work.num_tokens for work in plain) == 39
    assert min(row.start for work in ring.sent if work.echoes for row in work.rows) == 39
