"""Requests through scheduler, engines, workers, caches and head, in one thread that moves frames as chance wants."""

import random
import statistics
import tracemalloc
from types import SimpleNamespace

import pytest
import torch

from pipeline.generation import scheduler as module
from pipeline.generation.scheduler import Scheduler, SchedulerConfig
from pipeline.generation.sequences import shared_length
from pipeline.models.sampling import SamplingOptions
from pipeline.partition.passes import Pass, PassKind, Row
from pipeline.runtime.engine import Result
from pipeline.runtime.head import Head, begin_note
from tests.helpers.checksum_ring import NO_TEXT, PLANS, VOCABULARY, Asked, Ring, expected, simulate


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("failing", "cancels"), [(0, 0), (0.003, 0), (0.003, 0.03)])
def test_every_answer_is_that_of_its_prompt(plan, failing, cancels):
    num_failed = num_errors = 0
    for seed in range(8 if failing else 4):
        everyone, ring = simulate(PLANS[plan], seed, failing=failing, cancels=cancels)
        num_failed += ring.num_failed
        for asked in everyone:
            assert asked.ids == expected(PLANS[plan], asked, len(asked.ids)), seed
            if asked.reason == "length":
                num_positions = len(asked.prompt_ids) + len(asked.ids)
                assert len(asked.ids) == asked.num_tokens or num_positions == ring.slot_length + 1, seed
            elif asked.reason == "error":
                num_errors += 1
                assert "Refused" in asked.error, (seed, asked.error)
            else:
                assert cancels, (seed, asked.reason)
    assert num_errors <= num_failed and bool(num_failed) == bool(failing)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_answers_go_on_where_they_are_in_a_ring_that_was_formed_again(plan):
    for seed in range(3):
        everyone, _ = simulate(PLANS[plan], seed, failing=0, cancels=0, breaks=0.03)
        assert len(everyone) == 30
        for asked in everyone:
            assert asked.ids == expected(PLANS[plan], asked, len(asked.ids)), seed
            assert asked.reason == "length" and asked.error is None


@pytest.mark.parametrize("num_breaks", [1, 2])
def test_what_is_prefilled_again_is_counted(num_breaks):
    scheduler, ring = make_ring("ring", passes=1)
    asked = Asked(range(10), SamplingOptions(temperature=1.0), 12)
    scheduler.submit(asked)
    scheduler.close()
    ring.start()
    while len(asked.ids) < 5:
        assert ring.step()
    assert scheduler.progress == 5 and scheduler.num_prefilled_again == 0
    for count in range(num_breaks):
        scheduler.begin_again()
        _, ring = make_ring("ring", passes=1, scheduler=scheduler)
        ring.start()
        assert scheduler.num_prefilled_again == 15 * (count + 1)  # 10 of the prompt, 5 of the answer, one under way
    while ring.step():
        pass
    assert scheduler.is_done and asked.ids == expected(PLANS["ring"], asked, 12)


def make_ring(plan, scheduler=None, **options):
    scheduler = scheduler or Scheduler(SchedulerConfig(num_slots=2, slot_length=48, prefill_chunk=48, **options))
    return scheduler, Ring(PLANS[plan], random.Random(0), scheduler, num_slots=2, slot_length=48, credits=1, failing=0)


@pytest.mark.parametrize("plan", ["ring", "no wrap", "explicit"])
def test_a_copy_that_was_not_made_serves_no_other_request(plan):
    """It failed on an earlier rank; further on, the slot still has what it held before, and the request has ended."""
    scheduler, ring = make_ring(plan, passes=1)
    greedy, system = SamplingOptions(), [number % 11 for number in range(20)]
    first, other = Asked([*system, 1], greedy, 25), Asked([5] * 30, greedy, 1)
    for asked in (first, other):
        scheduler.submit(asked)
    ring.start()
    while not other.is_finished:
        assert ring.step()
    copied, last = Asked([*system, 2], greedy, 3), Asked([*system, 3], greedy, 3)
    scheduler.submit(copied)
    while ring.in_flight[0].work.kind is not PassKind.PREFILL:
        assert ring.step()
    assert ring.in_flight[0].work.rows[0].from_slot == 0
    ring.failing = 1
    assert ring.step() and ring.num_failed == 1
    ring.failing = 0
    copied.finish("cancelled")
    scheduler.submit(last)
    scheduler.close()
    while ring.step():
        assert not first.is_finished or last.ids, "the other slot was to be taken"
    for asked in (first, last):
        assert asked.ids == expected(PLANS[plan], asked, asked.num_tokens)


def test_a_failed_decode_of_a_shared_prompt_is_no_new_beginning():
    """What it has been given already would come twice."""
    scheduler, ring = make_ring("ring", passes=1)
    prompt = [number % 11 for number in range(20)]
    scheduler.submit(before := Asked(prompt, SamplingOptions(), 1))
    ring.start()
    while not before.is_finished:
        assert ring.step()
    scheduler.submit(asked := Asked([*prompt, 1], SamplingOptions(), 9))
    scheduler.close()
    ring.start()
    while len(asked.ids) < 4:
        assert ring.step()
    ring.failing = 1
    assert ring.step()
    ring.failing = 0
    while ring.step():
        pass
    assert asked.reason == "error" and "Refused" in asked.error
    assert asked.ids == expected(PLANS["ring"], asked, 4)


@pytest.mark.parametrize("fails_together", [False, True])
def test_nobody_waits_for_anothers_answer(fails_together):
    """With fewer passes in the ring than are meant to be, and when those of several rows fail."""
    num_slots = 4
    scheduler = Scheduler(SchedulerConfig(
        num_slots=num_slots, slot_length=48, prefill_chunk=48, passes=1 if fails_together else 4, shares_prefixes=False
    ))
    rng = random.Random(0)
    ring = Ring(PLANS["ring"], rng, scheduler, num_slots=num_slots, slot_length=48, credits=1, failing=0)
    everyone = [Asked([number] * (number + 1), SamplingOptions(), 20) for number in range(num_slots)]
    for asked in everyone:
        scheduler.submit(asked)
    ring.start()
    has_failed = not fails_together
    while not any(len(asked.ids) > 10 for asked in everyone):
        if not has_failed and len(ring.in_flight[0].work.rows) == 3:  # the fourth joins, and goes on
            ring.failing = 1
            has_failed = True
        assert ring.step()
        ring.failing = 0
    numbers = [len(asked.ids) for asked in everyone]
    assert has_failed and max(numbers) - min(numbers) <= 4, numbers


@pytest.mark.parametrize("shares_answers", [True, False])
def test_an_answer_serves_a_prompt_only_where_prompts_have_its_codec(shares_answers):
    scheduler, ring = make_ring("ring", passes=1, shares_answers=shares_answers)
    scheduler.submit(first := Asked([number % 11 for number in range(20)], SamplingOptions(), 10))
    ring.start()
    while ring.step():
        pass
    scheduler.submit(Asked([*first.prompt_ids, *first.ids, 1], SamplingOptions(), 1))
    ring.start()
    (row,) = ring.in_flight[0].work.rows
    assert row.start == (29 if shares_answers else 20)  # the last token has never been sent


def test_requests_that_wait_for_a_prompt_are_compared_once(monkeypatch):
    """Not again with each of its chunks: prompts have thousands of tokens, and the ring waits meanwhile."""
    compared = []
    monkeypatch.setattr(module, "shared_length", lambda *ids: compared.append(1) or shared_length(*ids))
    scheduler = Scheduler(SchedulerConfig(num_slots=4, slot_length=900, prefill_chunk=8, passes=1))
    ring = Ring(PLANS["ring"], random.Random(0), scheduler, num_slots=4, slot_length=900, credits=1, failing=0)
    system = [number % 11 for number in range(800)]
    everyone = [Asked([*system, number], SamplingOptions(), 1) for number in range(20)]
    for asked in everyone:
        scheduler.submit(asked)
    scheduler.close()
    ring.start()
    while not everyone[0].is_finished:
        assert ring.step()
    assert 20 <= len(compared) < 20 * 2 * (4 + 1), "100 passes, of which each asked 19 others"
    while ring.step():
        pass
    assert [asked.ids for asked in everyone] == [expected(PLANS["ring"], asked, 1) for asked in everyone]


def test_a_shared_beginning_is_waited_for_no_longer_than_it_takes():
    """Of a long prompt whose first tokens it shares, a request wants those alone."""
    scheduler = Scheduler(SchedulerConfig(num_slots=2, slot_length=900, prefill_chunk=8, passes=1))
    system = [number % 11 for number in range(40)]
    long, short = Asked([*system, *[5] * 800], SamplingOptions(), 1), Asked([*system, 3, 4], SamplingOptions(), 1)
    for asked in (long, short):
        scheduler.submit(asked)
    num_sent = 0
    while not short.has_begun:
        work = scheduler.next().work
        num_sent += work.num_tokens
        scheduler.take(work, Result(None, ()))
    assert 24 < num_sent <= 40


def test_where_the_model_mixes_sequences_each_decodes_alone():
    scheduler = Scheduler(SchedulerConfig(num_slots=4, slot_length=48, prefill_chunk=48, passes=1, shares_passes=False))
    ring = Ring(PLANS["ring"], random.Random(0), scheduler, num_slots=4, slot_length=48, credits=1, failing=0)
    everyone = [Asked([number], SamplingOptions(), 10) for number in range(4)]
    for asked in everyone:
        scheduler.submit(asked)
    scheduler.close()
    ring.start()
    num_rows = []
    while ring.in_flight:
        num_rows.append(len(ring.in_flight[0].work.rows))
        assert ring.step()
    assert set(num_rows) == {1}
    assert [asked.ids for asked in everyone] == [expected(PLANS["ring"], asked, 10) for asked in everyone]


def test_the_head_keeps_ids_where_they_are_and_copies_them_for_those_who_read_them():
    """Of 8,000 positions, a copy for each token would cost as much as the token."""
    length, stage = 8000, SimpleNamespace(logits=lambda output: torch.zeros(1, VOCABULARY))

    def peak_nbytes(penalty):
        """Memory taken for a token of a sequence, at most."""
        head, note, start = Head(NO_TEXT, None), begin_note({0: SamplingOptions(repetition_penalty=penalty)}), 0
        peaks = []
        for num_tokens in [length, *[1] * 9]:
            kind = PassKind.DECODE if start else PassKind.PREFILL
            work = Pass(kind=kind, rows=(Row(0, start),), num_tokens=num_tokens, samples=True)
            ids = torch.zeros(1, num_tokens, dtype=torch.int64)
            tracemalloc.start()
            head.results(work, stage, torch.zeros(1, 1, 1), ids, b"" if start else note)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            start += num_tokens
        return statistics.median(peaks[1:])

    assert peak_nbytes(1.0) < length < 8 * length <= peak_nbytes(1.5)
