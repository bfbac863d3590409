"""Drafts go ahead, are verified and accepted, or rolled back: answers are those without, whatever is guessed.

In a ring of checksums (`tests.helpers.checksum_ring`), where a slot that holds anything but its sequence gives others.
"""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.comm.wire import BadFrame
from pipeline.generation.scheduler import Scheduler, SchedulerConfig
from pipeline.models.sampling import Sampled, SamplingOptions
from pipeline.partition.passes import Pass, PassKind, Row
from pipeline.runtime.head import Head, result_nbytes
from tests.helpers.checksum_ring import NO_TEXT, PLANS, VOCABULARY, Asked, Ring, drafting_of, expected, simulate
from tests.helpers.marks import slow_but

OPTIONS = {
    "greedy": SamplingOptions(),
    "sampled": SamplingOptions(temperature=1.0, seed=3),
    "with a penalty": SamplingOptions(temperature=1.0, repetition_penalty=1.5, seed=4),
}
SEVERAL_STAGES = [name for name in PLANS if name != "one"]


def make_ring(plan, is_right, *, depth=4, passes=1, credits=5, ring_passes=1, num_slots=2, failing=0.0):
    config = SchedulerConfig(num_slots=num_slots, slot_length=48, prefill_chunk=48, passes=ring_passes)
    scheduler = Scheduler(config)
    scheduler.drafting = drafting_of(PLANS[plan], scheduler, is_right, depth=depth, passes=passes)
    rng = random.Random(0)
    return scheduler, Ring(
        PLANS[plan], rng, scheduler, num_slots=num_slots, slot_length=48, credits=credits, failing=failing
    )


def run(scheduler, ring, *everyone):
    for asked in everyone:
        scheduler.submit(asked)
    scheduler.close()
    ring.start()
    while ring.step():
        pass
    assert scheduler.is_done and not ring.in_flight


def check(plan, ring, *everyone):
    for asked in everyone:
        assert asked.reason == "length" and asked.ids == expected(PLANS[plan], asked, asked.num_tokens)
    assert ring.causes == []


def decoded(ring):
    """Tokens of the passes that sampled."""
    return [work.num_tokens for work in ring.sent if work.kind is PassKind.DECODE]


SCRIPTS = {
    "right": lambda place, position: True,
    "wrong": lambda place, position: False,
    **{f"right up to {depth}": lambda place, position, depth=depth: place < depth for depth in range(1, 5)},
    **{f"wrong each {period}": lambda place, position, period=period: position % period > 0 for period in (3, 7)},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("passes", slow_but([2], [1, 2, 5]))
def test_drafts_change_no_token(plan, script, passes):
    scheduler, ring = make_ring(plan, SCRIPTS[script], passes=passes)
    options = list(OPTIONS.values())[(passes + list(SCRIPTS).index(script)) % len(OPTIONS)]
    asked = Asked([1, 2, 3], options, 22)
    run(scheduler, ring, asked)
    check(plan, ring, asked)
    figures = scheduler.drafting.figures
    num_decoded = len(decoded(ring))
    assert figures.passes == num_decoded == sum(figures.depths.values()) == sum(figures.in_flight.values())
    assert max(figures.in_flight) < passes and figures.tokens == 21
    assert asked.num_passes == 1 + num_decoded - figures.void and ring.num_spared == figures.void
    assert (figures.void > 0) == (passes > 1 and script != "right" and plan != "one")
    counts = figures.counts["scripted"]
    assert asked.num_drafts_accepted == sum(count.right for count in counts.values())
    if script == "right":
        assert sum(decoded(ring)) == 21, "no token behind the last one wanted goes"
    if script == "wrong":
        assert asked.num_drafts_accepted == 0 and all(depth == 1 for depth in counts)


@pytest.mark.parametrize("num_tokens", range(1, 13))
def test_an_answer_ends_inside_a_draft(num_tokens):
    """At each of its tokens: by the number that is wanted, which drafts keep to, or by what only the answer knows."""

    class Stopping(Asked):
        @property
        def num_wanted(self):
            return 40

    for kind in (Asked, Stopping):
        scheduler, ring = make_ring("ring", SCRIPTS["right"], passes=2)
        asked, after = kind([1, 2, 3], SamplingOptions(), num_tokens), Asked([1, 2, 3], SamplingOptions(), 6)
        run(scheduler, ring, asked, after)
        check("ring", ring, asked, after)
        assert asked.num_drafts_accepted <= num_tokens


def test_a_slot_has_no_room_for_drafts():
    scheduler, ring = make_ring("ring", SCRIPTS["right"], passes=3)
    asked = Asked([1, 2, 3], SamplingOptions(), 100)
    run(scheduler, ring, asked)
    assert asked.reason == "length" and asked.ids == expected(PLANS["ring"], asked, 46) and ring.causes == []
    assert sum(decoded(ring)) == 45


@pytest.mark.parametrize("num_tokens", [1, 2, 6, 7, 30])
def test_as_many_laps_as_drafts_leave(num_tokens):
    scheduler, ring = make_ring("ring", SCRIPTS["right"])
    asked = Asked([1, 2], SamplingOptions(), num_tokens)
    run(scheduler, ring, asked)
    check("ring", ring, asked)
    assert asked.num_passes == 1 + -(-(num_tokens - 1) // 5)


@pytest.mark.parametrize("ring_passes", [1, 2])
def test_rows_of_one_pass_have_equally_many_drafts_and_nobody_waits(ring_passes):
    """One sequence has no drafts, one few, two many; prompts of unlike lengths begin apart."""
    most = {0: 0, 1: 1, 2: 9, 3: 9}
    scheduler, ring = make_ring(
        "ring", SCRIPTS["wrong"], ring_passes=ring_passes, num_slots=4, credits=ring_passes, passes=1
    )
    behind = scheduler.drafting.behind

    def limited(track, slot, ids, *, room, **load):
        return behind(track, slot, ids, room=min(room, most[slot]), **load)

    scheduler.drafting.behind = limited
    everyone = [Asked([number] * (number + 1), SamplingOptions(), 40) for number in range(4)]
    for asked in everyone:
        scheduler.submit(asked)
    ring.start()
    while not any(len(asked.ids) > 20 for asked in everyone):
        assert ring.step()
    numbers = [len(asked.ids) for asked in everyone]
    assert max(numbers) - min(numbers) <= 4, numbers
    while ring.step():
        pass
    check("ring", ring, *everyone)
    shapes = {(len(work.rows), work.num_tokens) for work in ring.sent if work.kind is PassKind.DECODE}
    assert {tokens for _, tokens in shapes} >= {1, 2, 5} and max(rows for rows, _ in shapes) > 1


def test_a_prompt_does_not_wait_for_passes_ahead():
    scheduler, ring = make_ring("ring", SCRIPTS["wrong"], passes=5)
    first, second = Asked([1], SamplingOptions(), 40), Asked([2], SamplingOptions(), 5)
    scheduler.submit(first)
    ring.start()
    while len(ring.in_flight) < 5 or len(first.ids) < 8:
        assert ring.step()
    scheduler.submit(second)
    num_sent = len(ring.sent)
    while ring.sent[-1].kind is not PassKind.PREFILL:
        assert ring.step()
    assert len(ring.sent) <= num_sent + 2
    while ring.step():
        pass
    scheduler.close()
    check("ring", ring, first, second)


@pytest.mark.parametrize("plan", SEVERAL_STAGES)
@pytest.mark.parametrize("passes", [1, 2])
def test_a_pass_with_drafts_fails_and_all_go_without_from_there_on(plan, passes):
    scheduler, ring = make_ring(plan, SCRIPTS["right"], passes=passes, depth=3)
    asked = Asked([1, 2, 3], SamplingOptions(), 40)
    scheduler.submit(asked)
    scheduler.close()
    ring.start()
    while ring.in_flight:
        is_ready = all(work.kind is PassKind.DECODE and work.num_tokens > 1 for work in in_flight(ring))
        ring.fails_once = is_ready and ring.num_failed < 1
        num_failed, num_causes, num_sent = ring.num_failed, len(ring.causes), len(ring.sent)
        assert ring.step()
        while ring.num_failed > num_failed and len(ring.causes) == num_causes:
            num_sent = len(ring.sent)
            assert ring.step()
        if ring.num_failed > num_failed:
            failed_at = num_sent
    assert asked.reason == "length" and asked.ids == expected(PLANS[plan], asked, 40)
    assert ring.num_failed == 1 and {work.num_tokens for work in ring.sent[failed_at:]} == {1}


def in_flight(ring):
    return [entry.work for entry in ring.in_flight]


def test_only_a_pass_without_drafts_fails_its_request():
    scheduler, ring = make_ring("ring", SCRIPTS["right"], passes=2, depth=3)
    asked = Asked([1, 2, 3], SamplingOptions(), 40)
    scheduler.submit(asked)
    scheduler.close()
    ring.start()
    while len(asked.ids) < 5:
        assert ring.step()
    ring.failing = 1
    while ring.step():
        pass
    assert asked.reason == "error" and "Refused" in asked.error and scheduler.is_done
    assert asked.ids == expected(PLANS["ring"], asked, len(asked.ids))
    assert ring.sent[-1].num_tokens == 1 and len(ring.causes) >= 2


def test_bytes_of_void_passes_count_until_the_answer_ends():
    nbytes = {}
    for script in ("right", "wrong"):
        scheduler, ring = make_ring("ring", SCRIPTS[script], passes=4)
        asked = Asked([1, 2, 3], SamplingOptions(), 20)
        run(scheduler, ring, asked)
        check("ring", ring, asked)
        nbytes[script] = sum(8 * len(PLANS["ring"].links) * work.num_tokens for work in ring.sent)
        assert asked.num_bytes == nbytes[script]
    assert nbytes["right"] < nbytes["wrong"]


def test_begin_again_forgets_what_was_assumed_and_keeps_figures():
    scheduler, ring = make_ring("ring", SCRIPTS["right up to 2"], passes=3)
    asked = Asked([1, 2, 3], SamplingOptions(temperature=1.0), 40)
    scheduler.submit(asked)
    scheduler.close()
    ring.start()
    while len(asked.ids) < 9 or len(ring.in_flight) < 3:
        assert ring.step()
    figures = scheduler.drafting.figures
    scheduler.begin_again(drafting_of(PLANS["ring"], scheduler, SCRIPTS["wrong"], depth=4, passes=3))
    again = Ring(PLANS["ring"], random.Random(0), scheduler, num_slots=2, slot_length=48, credits=5, failing=0)
    again.start()
    assert again.sent[0].kind is PassKind.PREFILL and again.sent[0].num_tokens == 3 + len(asked.ids)
    while again.step():
        pass
    check("ring", again, asked)
    assert scheduler.drafting.figures is figures


@pytest.mark.parametrize("plan", SEVERAL_STAGES)
def test_what_was_a_draft_serves_a_prompt_only_once_it_is_certain(plan):
    """A slot is copied while its sequence goes on with wrong drafts: what they have left there does not come along."""
    scheduler, ring = make_ring(plan, SCRIPTS["wrong each 3"], passes=4, num_slots=3)
    first = Asked([number % 11 for number in range(18)], SamplingOptions(), 28)
    scheduler.submit(first)
    ring.start()
    others = []
    while not first.is_finished:
        assert ring.step()
        if len(first.ids) > 4 * (1 + len(others)):
            others.append(Asked([*first.prompt_ids, *first.ids, 5], SamplingOptions(), 2))
            scheduler.submit(others[-1])
            ring.start()
    scheduler.close()
    while ring.step():
        pass
    check(plan, ring, first, *others)
    assert any(row.from_slot is not None and row.start > 18 for work in ring.sent for row in work.rows)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("breaks", [0.0, 0.03])
@pytest.mark.parametrize(("failing", "cancels"), [(0, 0), (0.003, 0), (0.003, 0.03)])
def test_every_answer_is_that_of_its_prompt(plan, failing, cancels, breaks):
    num_void = 0
    for seed in range(3):
        everyone, ring = simulate(PLANS[plan], seed, failing=failing, cancels=cancels, breaks=breaks, drafts=True)
        check_simulated(plan, everyone, ring, failing, cancels)
        num_void += ring.num_spared
    assert breaks or (num_void > 0) == (plan != "one"), "one stage has one pass under way"


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    plan=st.sampled_from(sorted(PLANS)),
    seed=st.integers(0, 2**20),
    failing=st.sampled_from([0, 0.01]),
    cancels=st.sampled_from([0, 0.05]),
    breaks=st.sampled_from([0, 0.03]),
)
def test_any_schedule(plan, seed, failing, cancels, breaks):
    everyone, ring = simulate(
        PLANS[plan], seed, failing=failing, cancels=cancels, breaks=breaks, drafts=True, num_requests=4
    )
    check_simulated(plan, everyone, ring, failing, cancels)


def check_simulated(plan, everyone, ring, failing, cancels):
    for asked in everyone:
        assert asked.ids == expected(PLANS[plan], asked, len(asked.ids))
        assert asked.num_drafts_accepted <= len(asked.ids)
        if asked.reason == "length":
            num_positions = len(asked.prompt_ids) + len(asked.ids)
            assert len(asked.ids) == asked.num_tokens or num_positions == ring.slot_length + 1
        elif asked.reason == "error":
            assert failing and "Refused" in asked.error
        else:
            assert cancels
    assert failing or ring.causes == []


class Logits:
    """A last stage whose logits, at each position, are for one token alone."""

    def __init__(self):
        self.num_at_once = []

    def logits(self, output):
        self.num_at_once.append(len(output))
        return torch.nn.functional.one_hot(output[:, 0].long(), VOCABULARY).double() * 50


@pytest.mark.parametrize("result_link", [None, 2])
def test_the_head_chooses_up_to_the_first_token_that_is_not_the_next(result_link):
    """Of each row on its own; also where they come over a link."""
    head, note = Head(NO_TEXT, result_link), b'{"0":%s,"1":%s}' % ((OPTIONS_JSON,) * 2)
    prompt = Pass(kind=PassKind.PREFILL, rows=(Row(0, 0), Row(1, 0)), num_tokens=2, samples=True)
    stage = Logits()
    values = head.results(prompt, stage, torch.tensor([[[1.0], [3]], [[1], [4]]]), torch.tensor([[1, 1], [2, 2]]), note)
    assert [[token.token_id for token in row] for row in values] == [[3], [4]]
    work = Pass(kind=PassKind.DECODE, rows=(Row(1, 2), Row(0, 2)), num_tokens=3, samples=True)
    for chosen, ids, expected_ids in (
        ([[5, 6, 7], [8, 9, 1]], [[4, 5, 6], [3, 8, 9]], [[5, 6, 7], [8, 9, 1]]),
        ([[5, 6, 7], [8, 9, 1]], [[4, 5, 5], [3, 7, 9]], [[5, 6], [8]]),
        ([[5, 6, 7], [8, 9, 1]], [[4, 4, 6], [3, 8, 0]], [[5], [8, 9]]),
    ):
        output = torch.tensor(chosen).double()[..., None]
        rows = head.results(work, stage, output, torch.tensor(ids), b"")
        assert [[token.token_id for token in row] for row in rows] == expected_ids
        data = head.to_payload(rows).data
        assert head.from_payload(work, data) == rows and data.numel() <= result_nbytes((), work)
    assert stage.num_at_once == [2, 6, 6, 6]


OPTIONS_JSON = (
    b'{"temperature":0.0,"top_k":0,"top_p":1.0,"min_p":0.0,"repetition_penalty":1.0,"seed":0,"num_top":0}'
)


def test_the_logits_of_wide_passes_come_256_at_a_time():
    head, stage = Head(NO_TEXT, None), Logits()
    rows = tuple(Row(slot, 0) for slot in range(9))
    note = b"{" + b",".join(b'"%d":%s' % (slot, OPTIONS_JSON) for slot in range(9)) + b"}"
    work = Pass(kind=PassKind.DECODE, rows=rows, num_tokens=65, samples=True)
    ids = torch.arange(9)[:, None].expand(9, 65)
    found = head.results(work, stage, ids[..., None].double(), ids, note)
    assert [len(row) for row in found] == [65] * 9 and stage.num_at_once == [256, 256, 9 * 65 - 512]


@pytest.mark.parametrize("kind", [PassKind.PREFILL, PassKind.DECODE])
def test_results_with_other_numbers_of_tokens_are_bad_frames(kind):
    head = Head(NO_TEXT, 2)
    work = Pass(kind=kind, rows=(Row(0, 0), Row(1, 0)), num_tokens=3, samples=True)
    most = 3 if kind is PassKind.DECODE else 1
    token = Sampled(1, -0.5, ((1, -0.5),))
    fine = head.to_payload([[token], [token] * most]).data
    assert head.from_payload(work, fine) == [[token], [token] * most]
    for rows in ([[token], []], [[token] * (most + 1), [token]], [[token]], [[token]] * 3):
        with pytest.raises(BadFrame):
            head.from_payload(work, head.to_payload(rows).data)
    for data in (fine[:-1], torch.cat([fine, fine[:1]]), fine[:1]):
        with pytest.raises(BadFrame):
            head.from_payload(work, data)
