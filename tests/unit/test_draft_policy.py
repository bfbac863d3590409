"""Drafts adapt to acceptance, laps and costs, in a ring that is not there."""

import pytest

from pipeline.drafting.acceptance import Acceptance
from pipeline.drafting.drafter import Draft
from pipeline.drafting.policy import PROBE_EVERY, Drafting, DraftLimits
from pipeline.planner.pass_costs import PassCosts, predicted_rate
from tests.helpers.draft_world import Clock, World, flat_costs, stepped_costs
from tests.helpers.marks import slow_but

FIXED = [(1, 1), (4, 1), (8, 1), (1, 4), (4, 4), (8, 4), (8, 8)]
COSTS = {"flat": flat_costs(), "stepped": stepped_costs()}
ACCEPTANCES = {"none": 0.0, "some": 0.3, "many": 0.6, "most": 0.9}
NUM_TOKENS = 480
CHANCES = {
    "none": lambda position: 0.0,
    "some": lambda position: 0.3,
    "many": lambda position: 0.6,
    "most": lambda position: 0.9,
    "changing": lambda position: (0.9, 0.0, 0.6, 0.3)[position // 120 % 4],
}


def world(costs, away_s, chances, **options):
    options = {"num_tokens": NUM_TOKENS, **options}
    return World(costs=COSTS[costs], away_s=away_s, chance_at=CHANCES[chances], **options)


@pytest.mark.parametrize("chances", slow_but(["changing"], CHANCES))
@pytest.mark.parametrize("away_s", slow_but([0.08], [0.0, 0.08, 0.2]))
@pytest.mark.parametrize("costs", slow_but(["stepped"], COSTS))
def test_adapted_is_as_good_as_the_best_fixed(costs, away_s, chances):
    here = world(costs, away_s, chances)
    adapted, without = here.rate(DraftLimits(depth=8, passes=8)), here.rate(None)
    best = max(here.rate(DraftLimits(depth=k, passes=p, adapts=False)) for k, p in FIXED)
    assert adapted >= 0.95 * max(best, without)
    if chances == "none":
        assert adapted >= 0.97 * without


@pytest.mark.parametrize("costs", COSTS)
def test_passes_go_ahead_only_where_drafts_are_right(costs):
    in_flight = {}
    for chances in ("none", "most"):
        _, drafting, _ = world(costs, 0.2, chances).run(DraftLimits(depth=8, passes=8))
        figures = drafting.figures
        in_flight[chances] = sum(n for before, n in figures.in_flight.items() if before) / figures.passes
    assert in_flight["none"] < 0.1 < 0.5 < in_flight["most"]  # some go before it is known what drafts are worth


def test_a_drafter_that_takes_long_is_asked_where_it_pays():
    """A draft takes 0.4 of a step, which 0.3 of a token is not worth."""
    for chances, least in (("none", 0.96), ("some", 0.96), ("most", 1.25)):
        here = world("flat", 0.08, chances, draft_s=0.4 * 0.12)
        rate, drafting, guesser = here.run(DraftLimits(depth=8, passes=1))
        assert rate >= least * here.rate(None)
        if chances == "none":
            assert guesser.num_asked < 20 + 1.5 * NUM_TOKENS / PROBE_EVERY
            assert drafting.figures.undrafted.total() > 0.9 * NUM_TOKENS


@pytest.mark.parametrize("costs", slow_but(["stepped"], COSTS))
@pytest.mark.parametrize("away_s", slow_but([0.2], [0.0, 0.2]))
@pytest.mark.parametrize("chances", slow_but(["some"], ACCEPTANCES))
def test_predicted_rates_are_those_of_the_simulation(costs, away_s, chances):
    acceptance = ACCEPTANCES[chances]
    here = world(costs, away_s, chances, num_tokens=1500)
    assert predicted_rate([], depth=8, passes=4, costs=COSTS[costs], away_s=away_s) == pytest.approx(
        here.rate(None), rel=0.01
    )
    for depth, passes in ((1, 1), (8, 1), (1, 4), (8, 4), (4, 2)):
        limits = DraftLimits(depth=depth, passes=passes, adapts=False)
        predicted = predicted_rate([acceptance], depth=depth, passes=passes, costs=COSTS[costs], away_s=away_s)
        assert predicted == pytest.approx(here.rate(limits), rel=0.1), (depth, passes)


def test_predicted_rates_take_drafting_into_account_and_acceptance_by_depth():
    costs = PassCosts(num_tokens=(1,), lap_s=(1.0,), busy_s=(0.25,))
    assert predicted_rate([0.5, 0.2], depth=2, passes=1, costs=costs, away_s=0.5, draft_s=0.25) == 1.6 / 2
    assert predicted_rate([1.0], depth=1, passes=1, costs=costs, away_s=0.0) == 2
    assert predicted_rate([1.0], depth=1, passes=100, costs=costs, away_s=0.0) == pytest.approx(8, rel=0.01)


def test_costs_between_those_measured_lie_on_a_line():
    costs = PassCosts(num_tokens=(1, 2, 4), lap_s=(1.0, 2.0, 3.0), busy_s=(0.5, 0.5, 0.25))
    assert [costs.lap(n) for n in (1, 2, 3, 4, 7)] == [1, 2, 2.5, 3, 5]
    assert [costs.busy(n) for n in (1, 3, 8)] == [0.5, 0.5, 0.5]  # more tokens take no less
    for wrong in ({"num_tokens": (2, 1, 4)}, {"lap_s": (1.0, 2.0)}, {"busy_s": (0.5, float("nan"), 1.0)}):
        with pytest.raises(ValueError):
            PassCosts(**{"num_tokens": (1, 2, 4), "lap_s": (1.0, 2.0, 3.0), "busy_s": (0.5, 0.5, 0.25), **wrong})


def test_acceptance_is_learnt_by_confidence_and_from_other_sequences():
    everyone = Acceptance()
    first, second = Acceptance(everyone), Acceptance(everyone)
    assert first.chance(0.9) == pytest.approx(0.675)
    for _ in range(50):
        first.learn(0.9, is_right=True)
        first.learn(0.1, is_right=False)
    assert first.chance(0.9) > 0.95 and first.chance(0.1) < 0.05
    assert second.chance(0.9) > 0.9 and second.chance(0.1) < 0.1
    assert 0.4 < first.mean < 0.6
    for _ in range(200):
        first.learn(0.9, is_right=False)
    assert first.chance(0.9) < 0.1


class Fixed:
    """Drafts 1, 2, 3, ..."""

    name = "fixed"

    def draft(self, slot, ids):
        return (Draft(token, 0.5) for token in range(1, 100))


def test_what_is_counted():
    clock = Clock()
    drafting = Drafting([Fixed()], flat_costs(), DraftLimits(depth=3, passes=2, adapts=False), clock)
    track = drafting.track()
    assert drafting.behind(track, 0, [7], room=100, num_sequences=1) == [1, 2, 3]
    drafting.sent(track, 0, 4)
    assert drafting.ahead(track, 0, [7, 1, 2, 3], room=2, num_sequences=1) == [1, 2]
    drafting.sent(track, 4, 2)
    assert drafting.ahead(track, 0, [7, 1, 2, 3, 1, 2], room=9, num_sequences=1) == []  # two are under way
    clock.now_s = 0.1
    drafting.came(track, num_tokens=2)
    drafting.certain(track, 1, 1)
    drafting.certain(track, 2, 9)
    figures = drafting.figures
    assert {depth: (c.judged, c.right) for depth, c in figures.counts["fixed"].items()} == {1: (1, 1), 2: (1, 0)}
    assert drafting.behind(track, 0, [7, 1, 9], room=1, num_sequences=1) == [1]
    drafting.sent(track, 2, 2)
    assert drafting.ahead(track, 0, [7, 1, 9, 1], room=9, num_sequences=1) == [1, 2, 3, 4]  # a void one does not count
    drafting.came(track, num_tokens=None)
    assert (figures.passes, figures.void, figures.tokens) == (3, 1, 2)
    assert drafting.away_s == pytest.approx(0.06)
    assert drafting.behind(track, 0, [7, 1, 9], room=0, num_sequences=1) == []


def test_a_lap_that_met_prompts_is_an_upper_bound_alone():
    """Four sequences share a pass whose first lap waited for a prompt; laps of their own are never alone afterwards."""
    clock = Clock()
    drafting = Drafting([], flat_costs(), DraftLimits(depth=8, passes=1), clock)
    tracks = [drafting.track() for _ in range(2)]
    drafting.sent(tracks[0], 0, 1, meets_prompts=True)
    drafting.sent(tracks[1], 0, 1)
    clock.now_s = 2.0
    drafting.came(tracks[0], num_tokens=1)
    assert drafting.away_s == pytest.approx(1.96)
    drafting.sent(tracks[0], 1, 1)
    clock.now_s = 2.1
    drafting.came(tracks[1], num_tokens=1)
    drafting.came(tracks[0], num_tokens=1)
    assert drafting.away_s == pytest.approx(0.06)
    drafting.sent(tracks[0], 2, 1)
    clock.now_s = 2.24
    drafting.came(tracks[0], num_tokens=1)
    assert drafting.away_s == pytest.approx(0.1)  # alone


def test_a_shared_pass_is_learnt_by_all_its_tokens():
    clock = Clock()
    costs = PassCosts(num_tokens=(1,), lap_s=(0.0,), busy_s=(0.0,))
    drafting = Drafting([], costs, DraftLimits(depth=8, passes=1), clock)
    for num_rows in (1, 4):
        track = drafting.track()
        start_s = clock.now_s
        drafting.sent(track, 0, 1, num_rows=num_rows)
        clock.now_s = start_s + 0.05 + 0.01 * num_rows
        drafting.came(track, num_tokens=1)
    assert drafting.away_s == pytest.approx(0.06)


def test_a_drafter_that_changes_ids_or_raises_is_asked_no_more():
    class Greedy:
        name = "greedy"

        def draft(self, slot, ids):
            ids.append(1)
            yield Draft(1, 0.5)

    class Raising:
        name = "raising"

        def draft(self, slot, ids):
            yield Draft(10**9, 0.5)

    for drafter in (Greedy(), Raising()):
        limits = DraftLimits(depth=3, passes=1, adapts=False)
        drafting = Drafting([drafter], flat_costs(), limits, Clock(), vocab_size=100)
        track, ids = drafting.track(), [7, 8]
        for _ in range(2):
            assert drafting.behind(track, 0, ids, room=9, num_sequences=1) == []
        assert ids == [7, 8]


def test_a_thin_link_makes_wide_passes_dear():
    """100 ms a token on the wire: half of the drafts being right does not pay."""
    here = world("flat", 0.0, "some", num_tokens=240, per_token_s=0.1)
    assert here.rate(DraftLimits(depth=8, passes=8)) >= 0.95 * here.rate(None)
