"""Log-probabilities of prompts: each told once, in order, whatever chunks, failures and new rings there are.

In a ring of checksums (`tests.helpers.checksum_ring`), where a slot that holds anything but its sequence gives others.
"""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.comm.wire import MAX_NOTE_NBYTES, BadFrame
from pipeline.config.schema import MAX_LOGPROBS, MAX_SEED
from pipeline.generation.scheduler import MAX_PROMPTS, Scheduler, SchedulerConfig
from pipeline.generation.sequences import takes_a_source
from pipeline.models.cache import SlotCache, SlotError
from pipeline.models.sampling import Sampler, SamplingOptions
from pipeline.partition.passes import Pass, PassKind, Row
from pipeline.runtime.head import Head, begin_note, max_result_nbytes, result_nbytes
from tests.helpers.checksum_ring import (
    CONFIG,
    NO_TEXT,
    PLANS,
    VOCABULARY,
    Asked,
    Ring,
    expected,
    expected_told,
    simulate,
)

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


def stepped(ring, is_reached):
    while not is_reached():
        assert ring.step()


def shapes(ring):
    return [(len(work.rows), work.num_tokens, work.echoes) for work in ring.sent]


def test_prompts_of_one_length_share_passes():
    """Up to the tokens of a chunk, and 16 rows; not beside those that do not echo, or are longer."""
    for chunk, num_slots, rows in ((48, 5, [5]), (18, 5, [3, 2]), (5, 2, [1, 1]), (48, 20, [16, 4])):
        scheduler, ring = make_ring("ring", chunk=chunk, num_slots=num_slots, shares_prefixes=False)
        length = 2 if num_slots == 20 else 6
        everyone = [Asked(prompt_of(length, n % 11), GREEDY, 0, 1) for n in range(num_slots)]
        run(scheduler, ring, *everyone)
        check("ring", *everyone)
        assert [n for n, *_ in shapes(ring)][: len(rows)] == rows
    scheduler, ring = make_ring("ring", num_slots=6)
    cases = [(6, 1, 0), (6, None, 1), (6, 1, 2), (7, 1, 0), (6, None, 3), (6, 3, 0)]
    everyone = [Asked(prompt_of(length, n), GREEDY, wanted, at) for n, (length, at, wanted) in enumerate(cases)]
    run(scheduler, ring, *everyone)
    check("ring", *everyone)
    assert shapes(ring)[:3] == [(2, 6, True), (2, 6, False), (1, 7, True)]


def test_where_the_model_mixes_sequences_each_prompt_goes_alone():
    scheduler, ring = make_ring("ring", num_slots=4, shares_passes=False, shares_prefixes=False)
    everyone = [Asked(prompt_of(6, n), GREEDY, n % 2, 1) for n in range(4)]
    run(scheduler, ring, *everyone)
    check("ring", *everyone)
    assert {rows for rows, *_ in shapes(ring)} == {1}


def test_options_of_all_prompts_of_a_pass_fit_into_its_note():
    widest = SamplingOptions(
        temperature=1.2345678901234567e-300,
        top_k=2**31 - 1,
        top_p=0.12345678901234567,
        min_p=1.2345678901234567e-100,
        repetition_penalty=1.2345678901234567e-300,
        seed=MAX_SEED,
        num_top=MAX_LOGPROBS,
    )
    slots = range(256 - MAX_PROMPTS, 256)
    assert len(begin_note(dict.fromkeys(slots, widest))) <= MAX_NOTE_NBYTES


@pytest.mark.parametrize("plan", ["ring", "no wrap", "explicit"])
@pytest.mark.parametrize(("length", "scored_from"), [(6, 1), (8, 5)])
def test_prompts_that_fail_together_are_tried_one_by_one(plan, length, scored_from):
    """In their first chunk, or a later one; each position is told once."""
    scheduler, ring = make_ring(plan, chunk=18, num_slots=3, credits=2, shares_prefixes=False)
    everyone = [Asked(prompt_of(length, n), GREEDY, 2, scored_from) for n in range(3)]
    for asked in everyone:
        scheduler.submit(asked)
    scheduler.close()
    ring.start()
    stepped(ring, lambda: any(work.echoes and len(work.rows) > 1 for work in in_flight(ring)))
    num_sent = len(ring.sent)
    while not ring.causes:
        ring.fails_once = ring.num_failed == 0 and len(in_flight(ring)[0].rows) > 1
        assert ring.step()
    while ring.step():
        pass
    check(plan, *everyone)
    assert ring.num_failed == 1 and sum(work.echoes and len(work.rows) == 1 for work in ring.sent[num_sent:]) >= 2


def in_flight(ring):
    return [entry.work for entry in ring.in_flight]


@pytest.mark.parametrize("plan", ["ring", "no wrap"])
def test_what_was_told_is_not_told_twice_in_a_ring_that_was_formed_again(plan):
    """Nor computed by the head: what has been told goes in plain chunks."""
    scheduler, ring = make_ring(plan, chunk=5, credits=2)
    asked = Asked(prompt_of(40), GREEDY, 3, 4)
    scheduler.submit(asked)
    scheduler.close()
    ring.start()
    stepped(ring, lambda: len(asked.told) >= 12)
    num_told = len(asked.told)
    scheduler.begin_again()
    _, ring = make_ring(plan, credits=2, scheduler=scheduler)
    ring.start()
    stepped(ring, lambda: asked.ids)
    plain = [work for work in ring.sent if work.kind is PassKind.PREFILL and not work.echoes]
    assert sum(work.num_tokens for work in plain) == 3 + num_told
    scheduler.begin_again()
    _, ring = make_ring(plan, credits=2, scheduler=scheduler)
    ring.start()
    while ring.step():
        pass
    check(plan, asked)
    assert not any(work.echoes for work in ring.sent), "all of it was told"


def test_a_cancelled_request_leaves_the_ring_and_the_queue():
    scheduler, ring = make_ring("ring", chunk=4, num_slots=1, credits=2)
    first, waiting, last = (Asked(prompt_of(40, n), GREEDY, 3, 1) for n in range(3))
    for asked in (first, waiting, last):
        scheduler.submit(asked)
    scheduler.close()
    ring.start()
    stepped(ring, lambda: len(first.told) > 5)
    first.is_cancelled = waiting.is_cancelled = True
    while ring.step():
        pass
    assert (first.reason, waiting.reason, waiting.has_begun) == ("cancelled", "cancelled", False)
    assert len(first.told) < 16 and scheduler.is_done
    check_told("ring", first, whole=False)
    check("ring", last)


@given(data=st.data())
def test_rows_that_share_a_pass_are_rows_that_a_cache_takes(data):
    slots = data.draw(st.permutations(range(4)))[: data.draw(st.integers(1, 4))]
    held = data.draw(st.lists(st.integers(0, 6), min_size=4, max_size=4))
    rows = []
    for slot in slots:
        source = data.draw(st.none() | st.sampled_from([other for other in range(4) if other != slot]))
        rows.append(Row(slot, data.draw(st.integers(0, held[slot if source is None else source])), source))
    cache = SlotCache(CONFIG, num_slots=4, max_length=8, dtype=torch.float32, device=torch.device("cpu"))
    for slot, length in enumerate(held):
        if length:
            own = cache.begin((Row(slot, 0),), length)
            own.write(0, *[torch.zeros(1, 1, length, 1)] * 2)
            own.commit()
    try:
        cache.begin(rows, 1)
        is_refused = False
    except SlotError:
        is_refused = True
    assert takes_a_source(rows) == is_refused


@pytest.mark.parametrize("result_link", [None, 2])
def test_the_head_tells_a_rows_own_tokens_and_chooses_the_next(result_link):
    """Also where that comes over a link; more than 256 positions of one row, and of several."""
    stage = RandomLogits()
    for num_rows, num_tokens in ((1, 2), (3, 5), (1, 600), (9, 65)):
        stage.num_at_once.clear()
        head = Head(NO_TEXT, result_link)
        rows = tuple(Row(slot, 0) for slot in range(num_rows))
        work = Pass(kind=PassKind.PREFILL, rows=rows, num_tokens=num_tokens, samples=True, echoes=True)
        ids = torch.randint(VOCABULARY, (num_rows, num_tokens))
        output = torch.randn(num_rows, num_tokens, VOCABULARY, dtype=torch.float64)
        note = begin_note({slot: SamplingOptions(num_top=2) for slot in range(num_rows)})
        told = head.results(work, stage, output, ids, note)
        assert max(stage.num_at_once) <= 256
        right = torch.log_softmax(output, -1)
        for row, own_ids, own in zip(told, ids, right, strict=True):
            chosen = int(own[-1].argmax())
            assert [token.token_id for token in row] == [*own_ids[1:].tolist(), chosen]
            expected_values = own[range(num_tokens), [*own_ids[1:].tolist(), chosen]].tolist()
            assert [token.logprob for token in row] == pytest.approx(expected_values, abs=1e-12)
            assert [[i for i, _ in token.top] for token in row] == own.topk(2).indices.tolist()
        data = head.to_payload(told).data
        assert head.from_payload(work, data) == told and data.numel() <= result_nbytes((), work)
        assert result_nbytes((), work) <= max_result_nbytes((), num_rows, num_rows * num_tokens)
        for rows in ([told[0][:-1], *told[1:]], [[*told[0], told[0][0]], *told[1:]]):
            with pytest.raises(BadFrame):
                head.from_payload(work, head.to_payload(rows).data)


class RandomLogits:
    """A last stage whose output is the logits."""

    def __init__(self):
        self.num_at_once = []

    def logits(self, output):
        self.num_at_once.append(len(output))
        return output


@pytest.mark.parametrize("num_top", [1, 2, 5])
def test_of_equals_the_first_are_told(num_top):
    """As argmax takes them, or a text that is greedy would not seem so; low precisions have many."""
    logits = torch.zeros(50_000)
    logits[[40, 70, 20_000, 49_000]] = 2.0
    top = Sampler(SamplingOptions(num_top=num_top)).tell(logits, 40, 1).top
    assert [token_id for token_id, _ in top] == [40, 70, 20_000, 49_000, 0][:num_top]


def test_logits_that_rule_out_a_token_of_the_prompt_are_an_error():
    logits = torch.zeros(VOCABULARY)
    logits[3] = -torch.inf
    assert Sampler(GREEDY).tell(logits, 2, 5).logprob == pytest.approx(-math.log(VOCABULARY - 1))
    with pytest.raises(ValueError, match="position 5 rule out its token 3"):
        Sampler(GREEDY).tell(logits, 3, 5)
    with pytest.raises(ValueError, match="NaN"):
        Sampler(GREEDY).tell(logits * torch.nan, 2, 5)


@settings(max_examples=30, deadline=None)
@given(
    plan=st.sampled_from(sorted(PLANS)),
    seed=st.integers(0, 2**20),
    failing=st.sampled_from([0, 0.01, 0.05]),
    cancels=st.sampled_from([0, 0.05]),
    breaks=st.sampled_from([0, 0.03]),
    drafts=st.booleans(),
)
def test_any_schedule(plan, seed, failing, cancels, breaks, drafts):
    everyone, ring = simulate(
        PLANS[plan],
        seed,
        failing=failing,
        cancels=cancels,
        breaks=breaks,
        drafts=drafts,
        scores=True,
        num_requests=6,
    )
    for asked in everyone:
        check_told(plan, asked, whole=asked.reason == "length")
        assert asked.ids == expected(PLANS[plan], asked, len(asked.ids))
        if asked.reason == "length":
            num_positions = len(asked.prompt_ids) + len(asked.ids)
            assert len(asked.ids) == asked.num_tokens or num_positions == ring.slot_length + 1
        elif asked.reason == "error":
            assert failing and "Refused" in asked.error
        else:
            assert cancels
    assert failing or ring.causes == []
