"""The loop that every rank runs, with workers and sources of the tests, in threads that stand for ranks."""

import random
import threading
import time
from collections import deque

import pytest

from pipeline.comm.link import FrameReceiver, FrameSender
from pipeline.comm.link_ends import LinkEnds
from pipeline.comm.mailbox import Arrivals, FrameMemory, LinkError, Loopback
from pipeline.comm.watchdog import PipelineError
from pipeline.comm.wire import BadFrame, is_end
from pipeline.partition.plan import default_plan
from pipeline.partition.schedule import max_in_flight
from pipeline.runtime.engine import Engine, Failure, Result
from tests.helpers.adding_stages import PLANS, Adding, Windows, entry, expected, places_of_failure, some_sleep, specs
from tests.helpers.marks import slow_but

MOST_S = 60  # for what takes milliseconds, on a busy machine


class Stuck(LinkError):
    """Nothing moved for so long that nothing will."""


class Bounded:
    """A link between two threads, on which a send waits until its receive is posted, as strict as links can be."""

    def __init__(self, link_index, memory, arrivals, depth):
        self._link_index, self._memory, self._arrivals, self._depth = link_index, memory, arrivals, depth
        self.room = threading.Semaphore(depth)
        self._ends = threading.Semaphore(0)
        self._has_ended = False

    def acquire(self):
        return self._memory.allocate()

    def post(self, buffer, nbytes, device_nbytes):
        if not self.room.acquire(timeout=MOST_S):
            raise Stuck(f"link {self._link_index}: no room")
        if is_end(buffer.host):
            self._ends.release()
            if self._has_ended:
                return
            self._has_ended = True
        self._arrivals.put(self._link_index, buffer)

    def flush(self):
        pass

    def complete(self, buffer, device_nbytes):
        pass

    def recycle(self, buffer):
        self.room.release()

    def close(self):
        """Every posted receive has an END, so that none is left."""
        for _ in range(self._depth):
            assert self._ends.acquire(timeout=MOST_S)
        assert not self.room.acquire(blocking=False), "a buffer was not given back, or twice"


class Ring:
    """The ranks of a plan, each with an engine in a thread of its own; of one process where `depth` is None."""

    def __init__(self, plan, *, depth=2, fails=(), sleep=None):
        self.plan, self.depth, self.fails, self.sleep = plan, depth, fails, sleep or (lambda rank: None)
        self.num_ranks = 1 if depth is None else plan.num_nodes
        nodes = [stage.node if self.num_ranks > 1 else 0 for stage in plan.stages]
        self.nodes = nodes + [0] * (plan.last_node != 0)  # by place in the chain
        self.log, self.reports = [], [[] for _ in range(self.num_ranks)]
        self._lock = threading.Lock()

    def open(self):
        """Link ends of each rank."""
        arrivals = [Arrivals() for _ in range(self.num_ranks)]
        self.boxes, senders, receivers = [], [{} for _ in arrivals], [{} for _ in arrivals]
        for index, spec in specs(self.plan).items():
            src, dst = self.nodes[index], self.nodes[index + 1]
            memory = FrameMemory(spec.max_body_nbytes, spec.max_tail_nbytes)
            if self.depth is None:
                box = Loopback(index, memory, arrivals[dst])
            else:
                box = Bounded(index, memory, arrivals[dst], self.depth)
            self.boxes.append(box)
            senders[src][index] = FrameSender(spec, box, receives_ahead=self.depth or 1)
            receivers[dst][index] = FrameReceiver(spec, box)
        return [LinkEnds(*own, len(self.nodes) - 1) for own in zip(senders, receivers, arrivals, strict=True)]

    def run(self, source, *, credits, before=lambda ends: None):
        """Run all ranks to their end; raises what one of them raises."""
        ends, errors = self.open(), []
        before(ends)

        def run_rank(rank):
            try:
                Engine(
                    Adding(self.plan, rank, fails=self.fails, sleep=self.sleep, tell=self.tell),
                    ends[rank],
                    lambda where, **how: self._report(rank, where, how),
                    source=source if rank == 0 else None,
                    credits=credits,
                ).run()
            except BaseException as e:
                errors.append(e)

        threads = [threading.Thread(target=run_rank, args=[rank], daemon=True) for rank in range(self.num_ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * MOST_S if not errors else 0.1)
        if errors:
            raise errors[0]
        assert not any(thread.is_alive() for thread in threads), "END has not reached every rank"
        assert not any(one.is_open for one in ends)

    @property
    def dropped(self):
        """(rank, pass) in order."""
        return [event[1:] for event in self.log if event[0] == "drop"]

    def tell(self, *event):
        with self._lock:
            self.log.append(event)

    def _report(self, rank, where, how):
        self.reports[rank].append((where, how))
        return f"rank {rank}, {where}"


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("depth", slow_but([None, 2], [None, 1, 2, 4]))
def test_results_come_in_order_and_credits_hold(name, depth):
    plan = PLANS[name]
    credits = 1 if depth is None else max_in_flight(plan, receives_ahead=depth)
    for seed, num_credits in enumerate({1, credits}):
        source = Windows(60, num_credits)
        ring = Ring(plan, depth=depth, sleep=some_sleep(seed))
        ring.run(source, credits=num_credits)
        assert source.results == [expected(plan, index) for index in range(60)]
        assert ring.dropped == [] and (source.most_in_flight > 1) is (num_credits > 1)


@pytest.mark.parametrize("depth", [None, 2])
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("num_passes", [0, 1])
def test_few_passes_or_none(name, depth, num_passes):
    source = Windows(num_passes)
    ring = Ring(PLANS[name], depth=depth)
    ring.run(source, credits=3)
    assert source.results == [expected(ring.plan, index) for index in range(num_passes)]


def test_one_stage_needs_no_links():
    source = Windows(5, credits=1)
    ring = Ring(default_plan(12, 1), depth=None)
    ring.run(source, credits=1)
    assert source.results == [expected(ring.plan, index) for index in range(5)]


@pytest.mark.parametrize("depth", slow_but([None, 1], [None, 1, 2]))
@pytest.mark.parametrize("name", PLANS)
def test_a_failure_fails_its_pass_alone(name, depth):
    """At every place of the chain, several passes apart and right behind each other; later ranks drop it, too."""
    plan = PLANS[name]
    places = list(places_of_failure(plan))
    fails = {3 + 2 * i: place for i, place in enumerate(places)}
    start = 2 * len(places) + 6
    fails |= {start + i: place for i, place in enumerate(places)}
    num_passes = start + len(places) + 3
    credits = 1 if depth is None else max_in_flight(plan, receives_ahead=depth)
    source = Windows(num_passes, credits)
    ring = Ring(plan, depth=depth, fails=fails, sleep=some_sleep(0))
    ring.run(source, credits=credits)
    for index, result in enumerate(source.results):
        if index not in fails:
            assert result == expected(plan, index)
            continue
        what, stage = fails[index]
        cause = {"too large": "10 bytes, its codec's max_nbytes promised at most 5", "wrong shape": "Payload.shape is "}
        told = cause.get(what, f"ArithmeticError: no more {what}")
        assert isinstance(result, Failure)
        assert result.cause.startswith(f"rank {ring.nodes[stage]}, stage {stage}, micro-batch {index}: ")
        assert told in result.cause
        where = ring.nodes[stage:]  # where it was raised, then every place that it has yet to pass
        assert [rank for rank, dropped in ring.dropped if dropped == index] == where
    assert len(source.results) == num_passes
    assert len({index for _, index in ring.dropped}) == len(fails)


class Voiding(Windows):
    """Of which some passes turn out to be of no use while they are under way."""

    void = (2, 3, 5, 11)

    def is_void(self, work):
        assert work.microbatch_index == len(self.results), "of the pass that is due back"
        return work.microbatch_index in self.void


@pytest.mark.parametrize("depth", slow_but([None, 1], [None, 1, 2]))
@pytest.mark.parametrize("name", PLANS)
def test_a_void_pass_is_not_computed_to_its_end(name, depth):
    """Its bytes have been sent, and are told; one that failed has failed."""
    plan = PLANS[name]
    fails = {1: ("step", 1), 3: ("step", 1)}
    credits = 1 if depth is None else max_in_flight(plan, receives_ahead=depth)
    source = Voiding(12, credits)
    ring = Ring(plan, depth=depth, fails=fails, sleep=some_sleep(0))
    ring.run(source, credits=credits)
    for index, result in enumerate(source.results):
        whole = expected(plan, index)
        if index in fails:
            assert isinstance(result, Failure)
        else:
            assert result == (Result(None, whole.trail) if index in source.void else whole)
    last_link = len(ring.nodes) - 2
    assert [event[1:] for event in ring.log if event[0] == "spare"] == [(last_link, index) for index in (2, 5, 11)]
    ended = [event[2] for event in ring.log if event[:2] == ("frame", last_link)]
    assert ended == [0, 4, 6, 7, 8, 9, 10]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_many_passes_with_failures_at_random(seed):
    rng = random.Random(seed)
    plan = rng.choice(list(PLANS.values()))
    depth = rng.randint(1, 4)
    places = list(places_of_failure(plan))
    fails = {index: rng.choice(places) for index in range(500) if rng.random() < rng.choice([0.05, 0.9])}
    credits = max_in_flight(plan, receives_ahead=depth)
    source = Windows(500, credits)
    Ring(plan, depth=depth, fails=fails, sleep=some_sleep(seed, 3e-4)).run(source, credits=credits)
    failed = {index for index, result in enumerate(source.results) if isinstance(result, Failure)}
    assert failed == set(fails)
    assert all(source.results[i] == expected(plan, i) for i in range(500) if i not in fails)


class Prompts(Windows):
    """A source that at times has nothing: passes are handed in, and the engine is woken, by another thread."""

    def __init__(self):
        super().__init__(0)
        self.handed, self.is_closed, self.num_asked = deque(), False, 0

    @property
    def is_done(self):
        return self.is_closed and not self.handed

    def next(self):
        self.num_asked += 1
        if not self.handed:
            return None
        self.following += 1
        return entry(self.handed.popleft())


@pytest.mark.parametrize("depth", slow_but([None, 1], [None, 1, 3]))
@pytest.mark.parametrize("name", [*PLANS, "one stage"])
def test_a_source_that_has_nothing_is_asked_again_when_it_wakes_the_engine(name, depth):
    plan = PLANS.get(name, default_plan(12, 1))
    ring, source = Ring(plan, depth=depth, sleep=some_sleep(1)), Prompts()

    def hand_in(ends):
        rng = random.Random(depth)
        index = 0
        while index < 80:
            for _ in range(min(rng.choice([0, 1, 1, 7]), 80 - index)):  # at times it is woken in vain
                source.handed.append(index)
                index += 1
            if index == 80:
                source.is_closed = rng.random() < 0.5
            ends[0].wake()
            time.sleep(rng.choice([0, 0, 0.01]))
        while len(source.results) < 80:
            time.sleep(0.001)
        source.is_closed = True
        ends[0].wake()
        ends[0].wake()  # too late, perhaps

    def start(ends):
        threading.Thread(target=hand_in, args=[ends], daemon=True).start()

    ring.run(source, credits=max_in_flight(plan, receives_ahead=depth or 1) or 1, before=start)
    assert source.results == [expected(plan, index) for index in range(80)]


def test_waking_in_vain_is_no_move():
    """Else a source that asks often would hide that the ring stands still."""
    ring, source = Ring(PLANS["ring"], depth=2), Prompts()
    go_on = threading.Event()
    ring.sleep = lambda rank: go_on.wait(MOST_S) if rank == 1 else None

    def hand_in(ends):
        source.handed.append(0)
        ends[0].wake()
        while not any(how == {"waiting": True, "due": True} for _, how in ring.reports[0][2:]):
            time.sleep(0.001)
        before, asked = len(ring.reports[0]), source.num_asked
        while source.num_asked < asked + 5:
            ends[0].wake()
            time.sleep(0.002)
        ring.tell("reports while woken", len(ring.reports[0]) - before)
        source.is_closed = True
        go_on.set()

    ring.run(source, credits=3, before=lambda ends: threading.Thread(target=hand_in, args=[ends]).start())
    assert ("reports while woken", 0) in ring.log
    assert source.results == [expected(ring.plan, 0)]


def test_only_rank_0_says_that_a_move_is_due_and_only_while_passes_are_under_way():
    ring, source = Ring(PLANS["ring"], depth=2), Windows(4)
    ring.run(source, credits=2)
    assert not any(how.get("due") for reports in ring.reports[1:] for _, how in reports)
    dues = [how.get("due", False) for _, how in ring.reports[0]]
    assert dues == [True] * (len(dues) - 1) + [False] and ring.reports[0][-1][0] == "finishing"
    idle, ring = Prompts(), Ring(PLANS["ring"], depth=2)

    def close_when_idle(ends):
        while not ring.reports[0]:
            time.sleep(0.001)
        idle.is_closed = True
        ends[0].wake()

    ring.run(idle, credits=2, before=lambda ends: threading.Thread(target=close_when_idle, args=[ends]).start())
    assert ring.reports[0][0] == ("waiting for a first pass", {"waiting": True, "due": False})


def test_is_done_is_believed_only_when_no_pass_is_in_flight():
    class Last(Windows):
        def take(self, work, result):
            super().take(work, result)
            ring.tell("taken", work.microbatch_index)

    ring = Ring(PLANS["ring"], depth=2, sleep=lambda rank: time.sleep(0.01) if rank == 2 else None)
    source = Last(4)
    ring.run(source, credits=4)
    assert [event[1] for event in ring.log if event[0] == "taken"] == [0, 1, 2, 3]


def test_a_pass_may_follow_from_the_result_of_the_last():
    """As tokens do: the source is not done, has nothing, and has something once a result is back."""

    class Tokens(Windows):
        def next(self):
            return None if self.in_flight else super().next()

    source = Tokens(20)
    Ring(PLANS["no wrap"], depth=1).run(source, credits=3)
    assert len(source.results) == 20 and source.most_in_flight == 1


def test_one_pass_enters_after_each_frame_while_others_wait():
    """With all frames first, those that come together would stay together; with passes first, they would pile up."""
    ring, source = Ring(PLANS["ring"], depth=None), Windows(12, credits=4)
    ring.run(source, credits=4)
    events = [event[0] for event in ring.log]
    assert events[:8] == ["enter", "frame"] * 4
    assert ("enter", "enter") not in zip(events, events[1:], strict=False)
    assert source.results == [expected(ring.plan, index) for index in range(12)]


@pytest.mark.parametrize("where", ["enter", "unpack", "step"])
def test_what_breaks_the_links_ends_the_run(where, monkeypatch):
    class Broken(PipelineError):
        pass

    def breaks(*_):
        raise Broken("the store has ended")

    monkeypatch.setattr(Adding, where, breaks)
    ring, source = Ring(PLANS["ring"], depth=None), Windows(3)
    with pytest.raises(Broken):
        ring.run(source, credits=1)
    assert source.results == [] and ring.dropped == []


@pytest.mark.parametrize("method", ["next", "take"])
def test_what_the_source_raises_ends_the_run(method, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    source = Windows(3)
    monkeypatch.setattr(source, method, full)
    with pytest.raises(OSError, match="disk full"):
        Ring(PLANS["ring"], depth=None).run(source, credits=1)


def test_a_damaged_frame_ends_the_run():
    ring, source = Ring(PLANS["ring"], depth=None), Windows(3)

    def damage(ends):
        post = ring.boxes[1].post

        def damaging_post(buffer, nbytes, device_nbytes):
            buffer.host[nbytes - 1] ^= 1
            post(buffer, nbytes, device_nbytes)

        ring.boxes[1].post = damaging_post

    with pytest.raises(BadFrame, match="link link 1, frame 0: the checksum does not match"):
        ring.run(source, credits=1, before=damage)
    assert source.results == []


@pytest.mark.slow
def test_one_pass_too_many_may_deadlock():
    """The limit is no caution: with sends that wait for their receives, one more pass stops the loops themselves."""
    plan, depth = PLANS["ring"], 1
    limit = max_in_flight(plan, receives_ahead=depth)

    def run(credits):
        ring = Ring(plan, depth=depth)
        all_in = threading.Event()

        class Eager(Windows):
            def next(self):
                found = super().next()
                if self.in_flight == credits:
                    all_in.set()
                return found

        # Rank 0 takes no frame before all passes are in; the others go on as far as they can.
        def before(ends):
            ends[0].has_arrived = lambda: False
            for box in ring.boxes:
                box.post = _impatient(box)

        source = Eager(3 * credits)
        ring.run(source, credits=credits, before=before)
        return source.results

    assert len(run(limit)) == 3 * limit
    with pytest.raises(Stuck):
        run(limit + 1)


def _impatient(box):
    post = box.post

    def posting(buffer, nbytes, device_nbytes):
        box.room.acquire(timeout=3) or _raise_stuck()
        box.room.release()
        post(buffer, nbytes, device_nbytes)

    return posting


def _raise_stuck():
    raise Stuck("no room")
