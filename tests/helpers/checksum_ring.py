"""A ring in one thread, whose frames move as chance wants, for what the scheduler decides.

The stages are made of integers: what one gives out at a position is a checksum of all that it has seen up to there, so
that a slot which holds anything but its sequence gives other tokens. Passes fail, requests are cancelled and expire.
"""

from __future__ import annotations

import contextlib
import json
import functools
import math
import random
import struct
import zlib
from collections import deque
from types import SimpleNamespace

import torch

from compressors.base import Payload
from pipeline.comm.link import Frame
from pipeline.comm.link_ends import Arrival
from pipeline.drafting.drafter import Draft
from pipeline.drafting.policy import Drafting, DraftLimits
from pipeline.generation.scheduler import Scheduler, SchedulerConfig
from pipeline.models.cache import SlotCache
from pipeline.models.sampling import Sampler, SamplingOptions
from pipeline.models.stage import TokenWindows
from pipeline.partition.passes import PassKind
from pipeline.partition.plan import default_plan, explicit_plan
from pipeline.planner.pass_costs import PassCosts
from pipeline.runtime.engine import Engine, Failure
from pipeline.runtime.head import Head
from pipeline.runtime.worker import EndCodecs, StageWorker

__all__ = [
    "NO_TEXT",
    "PLANS",
    "VOCABULARY",
    "Asked",
    "Ring",
    "Scripted",
    "drafting_of",
    "expected",
    "expected_told",
    "simulate",
]

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


class Worker(StageWorker):
    num_spared = 0

    def spare(self, link_index, frame):
        self.num_spared += 1
        return super().spare(link_index, frame)


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
    """A source, whose passes that have not come back are `in_flight`; it has none while a rank is to take a frame.

    A DECODE pass fails by chance, or because it is void and follows one that did.
    """

    def __init__(self, source, is_taking):
        self._source, self._is_taking, self.in_flight = source, is_taking, deque()
        self.causes, self.sent = [], []

    @property
    def is_done(self):
        return self._source.is_done

    def next(self):
        entry = None if self._is_taking() else self._source.next()
        if entry is not None:
            self.in_flight.append(entry)
            self.sent.append(entry.work)
        return entry

    def is_void(self, work):
        return self._source.is_void(work)

    def take(self, work, result):
        self.in_flight.popleft()
        if isinstance(result, Failure):
            self.causes.append(result.cause)
            assert "Refused" in result.cause or work.kind is not PassKind.DECODE or self.is_void(work), result.cause
        self._source.take(work, result)


class Ring:
    """All ranks of a plan, whose engines run in turn. `step` moves one frame."""

    def __init__(self, plan, rng, scheduler, *, num_slots, slot_length, credits, failing):
        self._rng, self.failing, self.num_failed, self.slot_length = rng, failing, 0, slot_length
        stages = plan.stages
        nodes = [stage.node for stage in stages] + [0] * (plan.last_node != 0)
        self.nodes, self.links = nodes, [deque() for _ in nodes[1:]]
        self.fails_once = False
        self._ends, self._engines, self.workers = [], [], []
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
            worker = Worker(own, codecs, head, None, dtype=torch.float64)
            self.workers.append(worker)
            self._ends.append(Ends(self, rank))
            source = self._source if rank == 0 else None
            self._engines.append(
                Engine(worker, self._ends[rank], lambda where, **how: where, source=source, credits=credits)
            )

    def chance(self, where):
        if self.fails_once or self._rng.random() < self.failing:
            self.fails_once = False
            self.num_failed += 1
            raise Refused(where)

    @property
    def in_flight(self):
        return self._source.in_flight

    @property
    def sent(self):
        """All passes that have gone."""
        return self._source.sent

    @property
    def causes(self):
        """Of failures."""
        return self._source.causes

    @property
    def num_spared(self):
        assert not any(worker.num_spared for worker in self.workers[1:])
        return self.workers[0].num_spared

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

    def __init__(self, prompt, options, num_tokens, scored_from=None):
        self.prompt_ids, self.options, self.num_tokens = tuple(prompt), options, num_tokens
        self.scored_from, self.told, self.is_cancelled = scored_from, [], False
        self.ids, self.reason, self.error, self.has_begun = [], None, None, False
        self.expires_s = math.inf
        self.num_passes = self.num_drafts_accepted = self.num_bytes = 0

    @property
    def is_finished(self):
        return self.reason is not None

    @property
    def num_wanted(self):
        return self.num_tokens - len(self.ids)

    def begin(self):
        assert not self.has_begun and not self.is_finished
        self.has_begun = True

    def take_prompt(self, tokens):
        assert not self.is_finished and self.has_begun and not self.ids
        self.told += tokens

    def take(self, token, *, was_draft):
        assert not self.is_finished and self.has_begun and self.num_wanted
        assert self.scored_from is None or len(self.told) == len(self.prompt_ids) - self.scored_from
        self.num_drafts_accepted += was_draft
        self.ids.append(token.token_id)
        if len(self.ids) == self.num_tokens:
            self.finish("length")

    def count(self, payload_bytes, *, brings_tokens):
        assert all(nbytes > 0 for nbytes in payload_bytes) and not self.is_finished
        self.num_passes += brings_tokens
        self.num_bytes += sum(payload_bytes)

    def finish(self, reason, error=None):
        assert not self.is_finished
        self.reason, self.error = reason, error


def expected_told(plan, asked):
    """Log-probabilities of the prompt's tokens that are to be told, computed alone and at once."""
    values = torch.tensor(asked.prompt_ids, dtype=torch.float64)
    for index in range(len(plan.stages)):
        values = checksums(index, values)
    logprobs = [torch.log_softmax(logits_of(value), -1) for value in values.tolist()]
    return [
        (asked.prompt_ids[position], logprobs[position - 1][asked.prompt_ids[position]].item())
        for position in range(asked.scored_from, len(asked.prompt_ids))
    ]


def expected(plan, asked, num_tokens):
    """The answer's first tokens, computed alone and at once."""
    ids = list(asked.prompt_ids)
    while len(ids) < len(asked.prompt_ids) + num_tokens:
        ids.append(following(plan, asked.options, tuple(ids)))
    return ids[len(asked.prompt_ids) :]


@functools.lru_cache(maxsize=100_000)
def following(plan, options, ids):
    values = torch.tensor(ids, dtype=torch.float64)
    for index in range(len(plan.stages)):
        values = checksums(index, values)
    return Sampler(options)(logits_of(values[-1].item()), torch.tensor(ids), len(ids)).token_id


class Scripted:
    """A drafter that knows what is right, and says it where `is_right(place in the pass, position)`; else another."""

    name = "scripted"

    def __init__(self, plan, scheduler, is_right):
        self._plan, self._is_right = plan, is_right
        self._options = {}  # by slot, as what begins there tells the head
        start = scheduler.next

        def noting():
            entry = start()
            told = json.loads(entry.note) if entry is not None and entry.note else {}
            self._options |= {int(slot): SamplingOptions.from_json(options) for slot, options in told.items()}
            return entry

        scheduler.next = noting

    def draft(self, slot, ids):
        options, ids = self._options[slot], list(ids)
        start = len(ids)
        while True:
            token_id = following(self._plan, options, tuple(ids))
            if not self._is_right(len(ids) - start, len(ids)):
                token_id = (token_id + 1) % VOCABULARY
            yield Draft(token_id, 0.5)
            ids.append(token_id)


def drafting_of(plan, scheduler, is_right, *, depth, passes, adapts=False):
    costs = PassCosts(num_tokens=(1,), lap_s=(1e-6,), busy_s=(1e-7,))
    limits = DraftLimits(depth=depth, passes=passes, adapts=adapts)
    return Drafting([Scripted(plan, scheduler, is_right)], costs, limits)


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


def simulate(plan, seed, *, failing=0.0, cancels=0.0, breaks=0.0, drafts=False, scores=False, num_requests=30):
    rng = random.Random(seed)
    num_slots, slot_length = rng.choice([1, 2, 3, 5]), rng.choice([24, 48])
    scheduler = Scheduler(SchedulerConfig(
        num_slots=num_slots,
        slot_length=slot_length,
        prefill_chunk=rng.choice([1, 3, 8, slot_length]),
        passes=rng.choice([1, 2, 4, 7]),
    ))
    credits = rng.choice([1, 2, 5, 9])
    if drafts:
        chance, depth, passes = rng.choice([0, 0.3, 0.6, 0.9, 1]), rng.choice([1, 2, 4, 7]), rng.randint(1, credits)
        adapts = rng.random() < 0.2

    def new_drafting():
        def is_right(place, position):
            return rng.random() < chance

        return drafting_of(plan, scheduler, is_right, depth=depth, passes=passes, adapts=adapts) if drafts else None

    scheduler.drafting = new_drafting()

    def form():
        return Ring(
            plan, rng, scheduler, num_slots=num_slots, slot_length=slot_length, credits=credits, failing=failing
        )

    ring = form()
    prompts, everyone = some_prompts(rng, slot_length), []
    left = num_requests
    while left or not scheduler.is_done or ring.in_flight:
        what = rng.random()
        if left and what < 0.1:
            left -= 1
            prompt = next(prompts)
            if everyone and rng.random() < 0.4:  # the next turn of a conversation
                before = rng.choice(everyone)
                prompt = [*before.prompt_ids, *before.ids, rng.randrange(VOCABULARY)][:slot_length]
            num_tokens, scored_from = rng.randint(1, slot_length), None
            if scores and len(prompt) > 1 and rng.random() < 0.7:
                num_tokens = rng.choice([0, 0, rng.randint(0, 4)])
                scored_from = rng.choice([1, len(prompt) - 1, rng.randrange(1, len(prompt))])
            everyone.append(Asked(prompt, some_options(rng), num_tokens, scored_from))
            scheduler.submit(everyone[-1])
            if scores and rng.random() < 0.5:  # others of its length, which go with it, and share nothing or much
                kept = rng.choice([0, max(0, len(prompt) - 2)])
                for _ in range(min(left, rng.randint(1, 3))):
                    left -= 1
                    other = prompt[:kept] + [rng.randrange(VOCABULARY) for _ in prompt[kept:]]
                    everyone.append(Asked(other, some_options(rng), num_tokens, scored_from))
                    scheduler.submit(everyone[-1])
            if not left:
                scheduler.close()
            ring.start()
        elif 0.1 <= what < 0.1 + cancels:
            waiting = [asked for asked in everyone if not asked.is_finished]
            if waiting:
                chosen = rng.choice(waiting)
                if scores and rng.random() < 0.5:
                    chosen.is_cancelled = True
                elif rng.random() < 0.5:
                    chosen.finish("cancelled")
                else:
                    chosen.expires_s = 0
        elif 0.5 <= what < 0.5 + breaks:
            num_failed, ring = ring.num_failed, form()
            ring.num_failed = num_failed
            scheduler.begin_again(new_drafting())
            ring.start()
        else:
            for _ in range(rng.choice([1, 1, 20])):
                if not ring.step():
                    ring.start()
                    break
    return everyone, ring
