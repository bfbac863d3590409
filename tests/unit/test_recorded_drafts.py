"""What a ring's drafts were, as a record has it."""

import pytest

from pipeline.drafting.drafter import Draft
from pipeline.drafting.figures import DepthCounts
from pipeline.drafting.policy import Drafting, DraftLimits
from pipeline.generation.record import recorded_drafts
from pipeline.planner.pass_costs import PassCosts


class Next:
    """Drafts 1, 2, 3, ..., for sure."""

    name = "next"

    def draft(self, slot, ids):
        return iter(Draft(ids[-1] + step, 1.0) for step in (1, 2, 3))


class Nothing:
    name = "nothing"

    def draft(self, slot, ids):
        return iter(())


COSTS = PassCosts(num_tokens=(1, 8), lap_s=(0.04, 0.06), busy_s=(0.01, 0.015))


@pytest.fixture
def drafting():
    times = iter(range(10_000))
    limits = DraftLimits(depth=2, passes=2, adapts=False)
    return Drafting([Nothing(), Next()], COSTS, limits, clock=lambda: 0.1 * next(times))


def test_before_anything_went(drafting):
    drafts = recorded_drafts(drafting, ["nothing", "next"])
    assert (drafts.passes, drafts.tokens_per_pass, drafts.rows_by_tokens, drafts.rows_by_in_flight) == (0, None, (), ())
    assert not drafts.were_sent
    assert [drafter.by_depth for drafter in drafts.drafters] == [(), ()]
    assert drafts.limits.model_dump() == {"depth": 2, "passes": 2, "adapts": False}
    assert (drafts.costs.num_tokens, drafts.costs.busy_s) == ((1, 8), (0.01, 0.015))


def test_a_pass_one_ahead_and_one_that_came_of_no_use(drafting):
    """Of 1, 2 | 3, 4, 5 the model says 2, and then 9."""
    track = drafting.track()
    assert drafting.behind(track, 0, [0, 1], room=1, num_sequences=1) == [2]
    drafting.sent(track, 1, 2)
    assert drafting.ahead(track, 0, [0, 1, 2], room=9, num_sequences=1) == [3, 4, 5]
    drafting.sent(track, 3, 3)
    drafting.certain(track, 2, 2)
    drafting.certain(track, 3, 9)
    drafting.came(track, num_tokens=2)
    drafting.came(track, num_tokens=None)
    drafts = recorded_drafts(drafting, ["nothing", "next(step=1)"])
    assert (drafts.passes, drafts.void, drafts.tokens, drafts.tokens_per_pass) == (2, 1, 2, 1.0)
    assert (drafts.rows_by_tokens, drafts.rows_by_in_flight, drafts.were_sent) == ((0, 1, 1), (1, 1), True)
    nothing, following = drafts.drafters
    assert (nothing.name, nothing.spec, nothing.by_depth) == ("nothing", "nothing", ())
    assert (following.name, following.spec) == ("next", "next(step=1)") and following.draft_s > 0
    assert [(d.judged, d.right) for d in following.by_depth] == [(1, 1), (1, 0)]
    assert (drafts.num_judged, drafts.num_right) == (2, 1)
    assert (drafts.undrafted.none, drafts.undrafted.cost) == (0, 0) and drafts.away_s > 0


def test_a_depth_without_drafts_has_none(drafting):
    drafting.figures.counts["next"] = {3: DepthCounts(judged=1, right=0)}
    drafting.figures.passes = 1
    drafting.figures.depths[2], drafting.figures.in_flight[1] = 1, 1
    (_, following) = recorded_drafts(drafting, ["nothing", "next"]).drafters
    assert [d.judged for d in following.by_depth] == [0, 0, 1]
