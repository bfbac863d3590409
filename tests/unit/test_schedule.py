import pytest

from pipeline.partition.plan import default_plan, explicit_plan
from pipeline.partition.schedule import (
    Action,
    ActionKind,
    ScheduleError,
    dry_run,
    make_gradient_schedule,
    make_schedule,
)


def steps(actions):
    return [(a.stage_index, a.microbatch_index) for a in actions]


def test_rank_0_alternates_last_and_first_stage():
    schedule = make_schedule(default_plan(8, 2), 4, world_size=2, in_flight=2)
    assert steps(schedule[0]) == [(0, 0), (0, 1), (2, 0), (0, 2), (2, 1), (0, 3), (2, 2), (2, 3)]
    assert steps(schedule[1]) == [(1, 0), (1, 1), (1, 2), (1, 3)]


def test_one_process_takes_each_microbatch_to_its_end():
    (actions,) = make_schedule(default_plan(8, 2), 2, world_size=1, in_flight=2)
    assert steps(actions) == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]


def test_without_wrap_node_0_takes_results():
    schedule = make_schedule(default_plan(8, 2, wrap=False), 2, world_size=2, in_flight=1)
    assert [(a.kind, *step) for a, step in zip(schedule[0], steps(schedule[0]), strict=True)] == [
        (ActionKind.FORWARD, 0, 0),
        (ActionKind.RESULT, 2, 0),
        (ActionKind.FORWARD, 0, 1),
        (ActionKind.RESULT, 2, 1),
    ]


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_resumed_run_starts_where_it_stopped(world_size):
    schedule = make_schedule(default_plan(8, 4), 7, world_size=world_size, in_flight=6, first_microbatch=5)
    assert {m for actions in schedule for _, m in steps(actions)} == {5, 6}


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 6])
@pytest.mark.parametrize("receives_ahead", [1, 2, 3])
def test_the_ring_deadlocks_exactly_from_its_bound_on(num_nodes, receives_ahead):
    bound = num_nodes * (receives_ahead + 1)
    for in_flight in range(1, bound + 3):
        schedule = make_schedule(default_plan(32, num_nodes), 60, world_size=num_nodes, in_flight=in_flight)
        if in_flight < bound:
            dry_run(schedule, receives_ahead=receives_ahead)
        else:
            with pytest.raises(ScheduleError, match="rank 0 waits to send from stage 0, micro-batch"):
                dry_run(schedule, receives_ahead=receives_ahead)


@pytest.mark.parametrize("num_microbatches", [1, 3, 4, 5, 40])
@pytest.mark.parametrize(
    "plan",
    [
        default_plan(12, 1),
        default_plan(12, 4),
        default_plan(12, 4, wrap=False),
        default_plan(2, 4),
        explicit_plan(12, [[(0, 2), (8, 9)], [(2, 5), (9, 12)], [(5, 8)]]),
    ],
)
def test_default_depth_runs_every_action_once(plan, num_microbatches):
    schedule = make_schedule(plan, num_microbatches, world_size=plan.num_nodes, in_flight=plan.num_nodes + 2)
    dry_run(schedule, receives_ahead=2)
    done = [
        (a.stage_index, a.microbatch_index) for actions in schedule for a in actions if a.kind is ActionKind.FORWARD
    ]
    assert sorted(done) == [(s, m) for s in range(len(plan.stages)) for m in range(num_microbatches)]


def test_a_stage_out_of_order_is_caught():
    schedule = make_schedule(default_plan(8, 2), 3, world_size=2, in_flight=2)
    schedule[0].sort(key=lambda a: -a.stage_index)
    with pytest.raises(ScheduleError, match="rank 0 waits to receive for stage 2, micro-batch 0"):
        dry_run(schedule, receives_ahead=2)


@pytest.mark.parametrize("num_nodes, wrap", [(1, True), (2, False), (4, True)])
def test_gradient_schedule_is_one_total_order(num_nodes, wrap):
    plan = default_plan(8, num_nodes, wrap=wrap)
    ranks = make_gradient_schedule(plan, 3, world_size=num_nodes)
    (whole,) = make_gradient_schedule(plan, 3, world_size=1)
    stages = range(len(plan.stages))
    expected = [
        Action(kind, stage, m)
        for m in range(3)
        for kind, order in ((ActionKind.FORWARD, stages), (ActionKind.BACKWARD, reversed(stages)))
        for stage in order
    ]
    assert whole == expected
    for rank, actions in enumerate(ranks):
        assert actions == [a for a in expected if plan.stages[a.stage_index].node == rank]
