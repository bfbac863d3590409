"""How many passes may be in flight: every interleaving of the ranks' loops is gone through."""

import pytest

from pipeline.partition.plan import default_plan, explicit_plan
from pipeline.partition.schedule import ScheduleError, max_in_flight, passes_in_flight

RINGS = {f"ring of {n}": default_plan(32, n) for n in (2, 3, 4)}
CHAINS = {f"no wrap over {n}": default_plan(32, n, wrap=False) for n in (2, 3, 4)}
EXPLICIT = {
    # From node 1 back to node 0 at once, though the chain is longer.
    "results from the second node": explicit_plan(12, [[(0, 2), (8, 9)], [(2, 5), (9, 12)], [(5, 8)]]),
    "to and fro": explicit_plan(12, [[(0, 2), (4, 6), (8, 12)], [(2, 4), (6, 8)]]),
    "a cycle beside node 0": explicit_plan(12, [[(0, 1), (11, 12)], [(1, 4), (7, 9)], [(4, 7), (9, 11)]]),
}
PLANS = RINGS | CHAINS | EXPLICIT
LIMITS = {
    **dict(zip(RINGS, (2, 3, 4), strict=True)),
    **dict(zip(CHAINS, (2, 3, 4), strict=True)),
    **dict.fromkeys(EXPLICIT, 2),
}


class Loops:
    """The ranks' loops over a plan's links, and all states that they can get into.

    A state has the number of frames on each link, at most `receives_ahead`, and for each rank the link that it holds a
    frame for, or None. A rank without a frame in hand takes one from any link that has some: frames of several links
    may be told to it in any order. It then waits until there is room on the next link. Rank 0 may start a pass while it
    has a credit, whatever has arrived: its thread may not have told it yet.
    """

    def __init__(self, plan, *, receives_ahead, credits):
        self.ends = [(link.src_node, link.dst_node) for link in plan.links]
        if plan.last_node != 0:
            self.ends.append((plan.last_node, 0))
        self.room, self.credits = receives_ahead, credits
        self.start = (0,) * len(self.ends), (None,) * plan.num_nodes

    @staticmethod
    def in_flight(state):
        return sum(state[0]) + sum(hand is not None for hand in state[1])

    def moves(self, state):
        """What may happen next, but for new passes."""
        counts, hands = state
        for rank, hand in enumerate(hands):
            if hand is not None:
                if counts[hand] < self.room:
                    yield _with(counts, hand, counts[hand] + 1), _with(hands, rank, None)
                continue
            for link, (_, dst) in enumerate(self.ends):
                if dst == rank and counts[link]:
                    following = link + 1 if link + 1 < len(self.ends) else None
                    yield _with(counts, link, counts[link] - 1), _with(hands, rank, following)

    def starts(self, state):
        counts, hands = state
        if hands[0] is None and self.in_flight(state) < self.credits:
            yield counts, _with(hands, 0, 0)

    def stuck_states(self):
        """Those in which passes are in flight and none of them can move."""
        seen, frontier = {self.start}, [self.start]
        while frontier:
            state = frontier.pop()
            moves = list(self.moves(state))
            if not moves and self.in_flight(state):
                yield state
            for following in [*moves, *self.starts(state)]:
                if following not in seen:
                    seen.add(following)
                    frontier.append(following)


def _with(values, index, value):
    return (*values[:index], value, *values[index + 1 :])


@pytest.mark.parametrize("receives_ahead", [1, 2, 3])
@pytest.mark.parametrize("name", PLANS)
def test_the_limit_never_deadlocks_and_one_more_may(name, receives_ahead):
    """Whether or not the source has another pass just then: no stuck state waits for one."""
    plan = PLANS[name]
    limit = max_in_flight(plan, receives_ahead=receives_ahead)
    assert limit == LIMITS[name] * (receives_ahead + 1) - 1
    for credits in (1, limit - 1, limit):
        assert list(Loops(plan, receives_ahead=receives_ahead, credits=credits).stuck_states()) == []
    loops = Loops(plan, receives_ahead=receives_ahead, credits=limit + 1)
    stuck = next(loops.stuck_states(), None)
    assert stuck is not None and loops.in_flight(stuck) == limit + 1 and not list(loops.starts(stuck))


def test_a_ring_is_stuck_when_every_rank_has_a_frame_in_hand_and_every_link_is_full():
    loops = Loops(PLANS["ring of 3"], receives_ahead=2, credits=9)
    assert set(loops.stuck_states()) == {((2, 2, 2), (0, 1, 2))}


def test_where_no_ranks_wait_for_each_other_there_is_no_limit():
    plan = default_plan(12, 1)
    assert max_in_flight(plan, receives_ahead=1) is None
    assert passes_in_flight(plan, 40, receives_ahead=1, world_size=1) == 40


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("receives_ahead", [1, 2, 3])
def test_the_default_is_two_more_than_nodes_or_what_the_links_hold(name, receives_ahead):
    plan = PLANS[name]
    limit = LIMITS[name] * (receives_ahead + 1) - 1
    found = passes_in_flight(plan, 0, receives_ahead=receives_ahead, world_size=plan.num_nodes)
    assert found == min(plan.num_nodes + 2, limit)


def test_a_setting_is_taken_up_to_the_limit_and_refused_beyond_it():
    plan, given = default_plan(12, 4), {"receives_ahead": 2, "world_size": 4}
    assert [passes_in_flight(plan, setting, **given) for setting in (1, 7, 11)] == [1, 7, 11]
    words = (
        r"runtime\.in_flight is 12: with receives posted 2 ahead, the links of this plan hold 11 passes, and more of "
        r"them may deadlock\. Lower runtime\.in_flight or raise runtime\.receives_ahead"
    )
    with pytest.raises(ScheduleError, match=words):
        passes_in_flight(plan, 12, **given)


def test_one_process_has_what_its_ranks_would_have():
    """It runs a pass at a time anyway; records and what is predicted from them speak of the plan."""
    plan = default_plan(12, 4)
    assert passes_in_flight(plan, 0, receives_ahead=2, world_size=1) == 6
    assert passes_in_flight(plan, 5, receives_ahead=2, world_size=1) == 5
    assert passes_in_flight(plan, 40, receives_ahead=2, world_size=1) == 11
