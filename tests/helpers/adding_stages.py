"""Stages that add one to the bytes of a pass, in place of a model's, to try the engine with. Links are real."""

from __future__ import annotations

import random
import time

import torch

from compressors.base import Payload
from pipeline.comm.link import HiddenSpec, ResultSpec
from pipeline.comm.wire import WireFormat
from pipeline.partition.passes import Pass, PassKind
from pipeline.partition.plan import explicit_plan, default_plan
from pipeline.runtime.engine import Departure, Entry, Result

__all__ = [
    "NUM_TOKENS",
    "PLANS",
    "Adding",
    "Windows",
    "entry",
    "expected",
    "places_of_failure",
    "some_sleep",
    "specs",
]

NUM_TOKENS = 5
MAX_PASSES = 50_000
PLANS = {
    "ring": default_plan(12, 3),
    "no wrap": default_plan(12, 3, wrap=False),
    "explicit": explicit_plan(12, [[(0, 2), (8, 9)], [(2, 5), (9, 12)], [(5, 8)]]),
}


def entry(index):
    """Of a pass whose tokens are its number."""
    work = Pass(kind=PassKind.SCORE, microbatch_index=index)
    return Entry(work=work, token_ids=torch.full((1, NUM_TOKENS), index % 100))


def expected(plan, index):
    """The result of a pass: as many ones added as there are stages, and the bytes on each link."""
    return Result([index % 100 + len(plan.stages)] * NUM_TOKENS, (NUM_TOKENS,) * len(plan.links))


def specs(plan):
    """Of a plan's links, by index."""
    found = {}
    for index in range(len(plan.links) + (plan.last_node != 0)):
        wire = WireFormat(link_index=index, num_trail=index, codec_ids=())
        if index == len(plan.links):
            found[index] = ResultSpec(name="result", wire=wire, bound=lambda work: NUM_TOKENS, max_nbytes=NUM_TOKENS)
        else:
            found[index] = HiddenSpec(
                name=f"link {index}",
                wire=wire,
                hidden_size=1,
                bound=lambda kind, shape: shape[1],
                microbatch_shapes=[(1, NUM_TOKENS)] * MAX_PASSES,
            )
    return found


def places_of_failure(plan):
    """(what, place in the chain) of everything that can go wrong in a plan."""
    last = len(plan.stages) - 1
    yield ("enter", 0)
    yield from (("unpack", stage) for stage in range(1, last + 1))
    yield from (("step", stage) for stage in range(1, last + 1))
    yield from ((what, stage) for what in ("too large", "wrong shape") for stage in range(last))
    if plan.last_node != 0:
        yield from ((what, last) for what in ("to_payload", "too large", "wrong shape"))
        yield from (("unpack", last + 1), ("step", last + 1))


def some_sleep(seed, most_s=1e-3):
    """Of a rank, before it computes."""
    rng = random.Random(seed)
    return lambda rank: time.sleep(rng.random() * most_s) if rng.random() < 0.5 else None


class Adding:
    """A worker. `fails` has, by number of the pass, in what it fails, and at which place of the chain.

    `tell` takes what happens: ("enter", pass), ("frame", link, pass), ("drop", rank, pass).
    """

    def __init__(self, plan, rank=0, *, fails=(), sleep=lambda rank: None, tell=lambda *event: None):
        self._plan, self._rank, self._fails_at, self._sleep, self._tell = plan, rank, dict(fails), sleep, tell
        self._num_places = len(plan.stages) + (plan.last_node != 0)

    def place(self, link_index, work):
        return f"stage {0 if link_index is None else link_index + 1}, {work}"

    def enter(self, entry):
        self._tell("enter", entry.work.microbatch_index)
        self._sleep(self._rank)
        self._maybe_fail("enter", 0, entry.work)
        return self._go_on(0, entry.work, entry.token_ids.to(torch.uint8).view(-1), ())

    def unpack(self, link_index, frame):
        self._tell("frame", link_index, frame.work.microbatch_index)
        self._maybe_fail("unpack", link_index + 1, frame.work)
        return frame.payload.data.clone()

    def step(self, link_index, frame, inputs, entry):
        self._sleep(self._rank)
        self._maybe_fail("step", link_index + 1, frame.work)
        assert (entry is not None) == (link_index == self._num_places - 2)
        assert entry is None or entry.work == frame.work
        if link_index + 1 == len(self._plan.stages):
            return Result(inputs.tolist(), frame.trail[:-1])
        return self._go_on(link_index + 1, frame.work, inputs, frame.trail)

    def spare(self, link_index, frame):
        self._tell("spare", link_index, frame.work.microbatch_index)
        return Result(None, frame.trail if link_index + 1 < len(self._plan.stages) else frame.trail[:-1])

    def drop(self, link_index, work):
        self._tell("drop", self._rank, work.microbatch_index)

    def waited(self, link_index, seconds, *, sending):
        assert seconds >= 0

    def _go_on(self, stage, work, data, trail):
        data = data + 1
        if stage == self._num_places - 1:
            return Result(data.tolist(), trail)
        shape = (1, NUM_TOKENS, 1) if stage < len(self._plan.links) else ()
        if stage == len(self._plan.links):
            self._maybe_fail("to_payload", stage, work)
        if self._fails("too large", stage, work):
            data = torch.cat([data, data])
        if self._fails("wrong shape", stage, work):
            shape = (9,)
        return Departure(link_index=stage, payload=Payload(data, shape), trail=trail)

    def _fails(self, what, stage, work):
        return self._fails_at.get(work.microbatch_index) == (what, stage)

    def _maybe_fail(self, what, stage, work):
        if self._fails(what, stage, work):
            raise ArithmeticError(f"no more {what}")


class Windows:
    """A source: a closed list of passes. Keeps account of what the engine does; more than `credits` are an error."""

    def __init__(self, num_passes, credits=None):
        self.num_passes, self.credits = num_passes, credits
        self.results, self.most_in_flight = [], 0
        self.following = 0

    @property
    def is_done(self):
        return self.following == self.num_passes

    @property
    def in_flight(self):
        return self.following - len(self.results)

    def next(self):
        if self.is_done:
            return None
        index, self.following = self.following, self.following + 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        assert self.credits is None or self.in_flight <= self.credits
        return entry(index)

    def is_void(self, work):
        return False

    def take(self, work, result):
        assert work.microbatch_index == len(self.results)
        self.results.append(result)
