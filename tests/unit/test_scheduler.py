"""Requests through scheduler, engines, workers, caches and head, in one thread that moves frames as chance wants.

The stages are made of integers: what one gives out at a position is a checksum of all that it has seen up to there, so
that a slot which holds anything but its sequence gives other tokens. Passes fail, requests are cancelled and expire.
"""

import contextlib
import math
import random
import statistics
import struct
import tracemalloc
import zlib
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from compressors.base import Payload
from pipeline.comm.link import Frame
from pipeline.comm.link_ends import Arrival
from pipeline.generation import scheduler as module
from pipeline.generation.scheduler import Scheduler, SchedulerConfig
from pipeline.generation.sequences import shared_length
from pipeline.models.cache import SlotCache
from pipeline.models.sampling import Sampler, SamplingOptions
from pipeline.models.stage import TokenWindows
from pipeline.partition.passes import Pass, PassKind, Row
from pipeline.partition.plan import default_plan, explicit_plan
from pipeline.runtime.engine import Engine, Result
from pipeline.runtime.head import Head, begin_note
from pipeline.runtime.worker import EndCodecs, StageWorker

CPU = torch.device("cpu")
VOCABULARY = 12
NO_TEXT = TokenWindows(torch.zeros(1, dtype=torch.int64), (), None)
PLANS = {
    "one": default_plan(4, 1),
    "ring": default_plan(12, 3),
    "no wrap": default_plan(12, 3, wrap=False),
    "explicit": explicit_plan(12, [[(0, 2), (8, 9)], [(2, 5), (9, 12)], [(5, 8)]]),
}
CONFIG = SimpleNamespace(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, hidden_size=1, head_dim=1)


class Refused(Exception):
    """Chance has failed a pass."""


def checksums(index, seen, start=0):
    """What stage `index` gives out from position `start` on, of float64 numbers that it has seen from 0 on."""
    data = seen.numpy().tobytes()
    crc, out = zlib.crc32(data[: 8 * start], index), []
    for place in range(8 * start, len(data), 8):
        crc = zlib.crc32(data[place : place + 8], crc)
        out.append(crc)
    return torch.tensor(out, dtype=torch.float64)


def logits_of(value):
    words = [zlib.crc32(struct.pack("<dI", value, token)) for token in range(VOCABULARY)]
    return torch.tensor([4 * word / 2**32 for word in words], dtype=torch.float64)


class ChecksumStage:
    """As `models.stage.Stage`, of one layer."""

    def __init__(self, plan, num_slots, slot_length, chance):
        self.plan, self.device, self._chance = plan, CPU, chance
        self.slots = SlotCache(CONFIG, num_slots=num_slots, max_length=slot_length, dtype=torch.float64, device=CPU)

    def forward(self, inputs, reader, *, rows):
        self._chance("before a stage")
        values = inputs.reshape(len(rows), 1, -1, 1).double()
        own = self.slots.begin(rows, values.shape[2])
        own.write(0, values, values)
        self._chance("in a stage")
        out = [
            checksums(self.plan.stage_index, own.seen(0, place, None)[0].flatten(), row.start)
            for place, row in enumerate(rows)
        ]
        own.commit()
        return torch.stack(out)[:, :, None]

    def logits(self, output):
        self._chance("in the head")
        return torch.stack([logits_of(value) for value in output.flatten().tolist()])


class RawCodec:
    name, link, needs, decoder_needs = "raw", None, (), ()

    def __init__(self, chance):
        self._chance = chance

    def compress(self, x):
        self._chance("compress")
        return Payload(x.contiguous().view(torch.uint8).flatten(), tuple(x.shape))

    def decompress(self, payload, device, dtype):
        self._chance("decompress")
        return payload.data.clone().view(dtype).reshape(payload.shape)


class Sending:
    def __init__(self, link):
        self._link = link

    def send(self, work, payload, trail, *, token_ids, note):
        nbytes = payload.data.numel()
        assert len(note) <= 4096
        trail = (*trail, nbytes)
        self._link.append(
            Frame(work=work, payload=payload, failure=None, trail=trail, token_ids=token_ids, note=note)
        )

    def fail(self, work, cause):
        self._link.append(Frame(work=work, payload=None, failure=cause, trail=(), token_ids=None, note=b""))


class TurnOver(BaseException):
    """Ends a call of `Engine.run`, for another to go on from there."""


class Ends:
    """A rank's `LinkEnds` of a Ring: the rank's turn is over where `take` would have to wait."""

    def __init__(self, ring, rank):
        self._ring, self._rank = ring, rank
        self.senders = {i: Sending(link) for i, link in enumerate(ring.links) if ring.nodes[i] == rank}
        self.last_link = len(ring.links) - 1 if ring.links else None
        self.is_open = True
        self.arrived = []

    def take(self):
        if not self.arrived:
            raise TurnOver
        return self.arrived.pop()

    def has_arrived(self):
        return any(link for link, dst in zip(self._ring.links, self._ring.nodes[1:], strict=True) if dst == self._rank)

    def release(self, arrival):
        pass

    def end(self):
        self.is_open = False

    def flush(self):
        pass


class Watched:
    """A source, whose passes that have not come back are `in_flight`; it has none while a rank is to take a frame."""

    def __init__(self, source, is_taking):
        self._source, self._is_taking, self.in_flight = source, is_taking, deque()

    @property
    def is_done(self):
        return self._source.is_done

    def next(self):
        entry = None if self._is_taking() else self._source.next()
        if entry is not None:
            self.in_flight.append(entry)
        return entry

    def is_void(self, work):
        return self._source.is_void(work)

    def take(self, work, result):
        self.in_flight.popleft()
        self._source.take(work, result)


class Ring:
    """All ranks of a plan, whose engines run in turn. `step` moves one frame."""

    def __init__(self, plan, rng, scheduler, *, num_slots, slot_length, credits, failing):
        self._rng, self.failing, self.num_failed, self.slot_length = rng, failing, 0, slot_length
        stages = plan.stages
        nodes = [stage.node for stage in stages] + [0] * (plan.last_node != 0)
        self.nodes, self.links = nodes, [deque() for _ in nodes[1:]]
        self._ends, self._engines = [], []
        self._source = Watched(scheduler, lambda: bool(self._ends[0].arrived))
        codec, result_link = RawCodec(self.chance), len(plan.links) if plan.last_node else None
        for rank in range(plan.num_nodes):
            own = {
                stage.stage_index: ChecksumStage(stage, num_slots, slot_length, self.chance)
                for stage in stages
                if stage.node == rank
            }
            codecs = EndCodecs(
                encoders={link.index: codec for link in plan.links if link.src_node == rank},
                decoders={link.index: codec for link in plan.links if link.dst_node == rank},
                ids_onward=frozenset(range(len(plan.links))) if plan.last_node else frozenset(),
            )
            head = Head(NO_TEXT, result_link)
            worker = StageWorker(own, codecs, head, None, dtype=torch.float64)
            self._ends.append(Ends(self, rank))
            source = self._source if rank == 0 else None
            self._engines.append(
                Engine(worker, self._ends[rank], lambda where, **how: where, source=source, credits=credits)
            )

    def chance(self, where):
        if self._rng.random() < self.failing:
            self.num_failed += 1
            raise Refused(where)

    @property
    def in_flight(self):
        return self._source.in_flight

    def start(self):
        """Wake rank 0."""
        self._run(0)

    def step(self):
        """Whether there was anything."""
        filled = [index for index, link in enumerate(self.links) if link]
        if not filled:
            return False
        index = self._rng.choice(filled)
        dst = self.nodes[index + 1]
        self._ends[dst].arrived.append(Arrival(index, self.links[index].popleft(), None))
        self._run(dst)
        return True

    def _run(self, rank):
        with contextlib.suppress(TurnOver):
            self._engines[rank].run()


class Asked:
    """A request (`Answering`)."""

    def __init__(self, prompt, options, num_tokens):
        self.prompt_ids, self.options, self.num_tokens = tuple(prompt), options, num_tokens
        self.ids, self.reason, self.error, self.has_begun = [], None, None, False
        self.expires_s = math.inf
        self.num_passes = self.num_drafts_accepted = 0

    @property
    def is_finished(self):
        return self.reason is not None

    @property
    def num_wanted(self):
        return self.num_tokens - len(self.ids)

    def begin(self):
        assert not self.has_begun and not self.is_finished
        self.has_begun = True

    def take(self, token, *, was_draft):
        assert not self.is_finished and self.has_begun
        self.num_drafts_accepted += was_draft
        self.ids.append(token.token_id)
        if len(self.ids) == self.num_tokens:
            self.finish("length")

    def count(self, payload_bytes, *, brings_tokens):
        self.num_passes += brings_tokens
        assert all(nbytes > 0 for nbytes in payload_bytes)

    def finish(self, reason, error=None):
        assert not self.is_finished
        self.reason, self.error = reason, error


def expected(plan, asked, num_tokens):
    """The answer's first tokens, computed alone and at once."""
    sampler, ids = Sampler(asked.options), list(asked.prompt_ids)
    while len(ids) < len(asked.prompt_ids) + num_tokens:
        values = torch.tensor(ids, dtype=torch.float64)
        for index in range(len(plan.stages)):
            values = checksums(index, values)
        ids.append(sampler(logits_of(values[-1].item()), torch.tensor(ids), len(ids)).token_id)
    return ids[len(asked.prompt_ids) :]


def some_prompts(rng, slot_length):
    """Many that share something, of one token to all of a slot."""
    roots = [[rng.randrange(VOCABULARY) for _ in range(slot_length)] for _ in range(2)]
    while True:
        length = rng.choice([1, 2, slot_length, rng.randint(1, slot_length), rng.randint(16, slot_length)])
        kept = rng.choice([0, length, rng.randint(0, length)])
        yield rng.choice(roots)[:kept] + [rng.randrange(VOCABULARY) for _ in range(length - kept)]


def some_options(rng):
    return SamplingOptions(
        temperature=rng.choice([0.0, 1.0]),
        repetition_penalty=rng.choice([1.0, 1.5]),
        seed=rng.randrange(3),
    )


def simulate(plan, seed, *, failing, cancels, breaks=0.0):
    rng = random.Random(seed)
    num_slots, slot_length = rng.choice([1, 2, 3, 5]), rng.choice([24, 48])
    scheduler = Scheduler(SchedulerConfig(
        num_slots=num_slots,
        slot_length=slot_length,
        prefill_chunk=rng.choice([1, 3, 8, slot_length]),
        passes=rng.choice([1, 2, 4, 7]),
    ))
    credits = rng.choice([1, 2, 5, 9])

    def form():
        return Ring(
            plan, rng, scheduler, num_slots=num_slots, slot_length=slot_length, credits=credits, failing=failing
        )

    ring = form()
    prompts, everyone = some_prompts(rng, slot_length), []
    left = 30
    while left or not scheduler.is_done or ring.in_flight:
        what = rng.random()
        if left and what < 0.1:
            left -= 1
            prompt = next(prompts)
            if everyone and rng.random() < 0.4:  # the next turn of a conversation
                before = rng.choice(everyone)
                prompt = [*before.prompt_ids, *before.ids, rng.randrange(VOCABULARY)][:slot_length]
            everyone.append(Asked(prompt, some_options(rng), rng.randint(1, slot_length)))
            scheduler.submit(everyone[-1])
            if not left:
                scheduler.close()
            ring.start()
        elif 0.1 <= what < 0.1 + cancels:
            waiting = [asked for asked in everyone if not asked.is_finished]
            if waiting:
                chosen = rng.choice(waiting)
                if rng.random() < 0.5:
                    chosen.finish("cancelled")
                else:
                    chosen.expires_s = 0
        elif 0.5 <= what < 0.5 + breaks:
            num_failed, ring = ring.num_failed, form()
            ring.num_failed = num_failed
            scheduler.begin_again()
            ring.start()
        else:
            for _ in range(rng.choice([1, 1, 20])):
                if not ring.step():
                    ring.start()
                    break
    return everyone, ring


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
    everyone = [Asked([number], SamplingOptions(), 20) for number in range(num_slots)]
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
