"""Per-rank lists of actions, and a dry run that proves them free of deadlock.

An action names a stage and a micro-batch; where its input comes from and its output goes follows from the plan.
FORWARD receives (or embeds), computes and sends; RESULT, on node 0 only, takes the losses of a last stage that
lives on another node; BACKWARD takes the gradient of a stage's output and sends that of its input. A stage that is
not the first waits for the link before it, so the order of the actions on one rank decides whether the ring keeps
moving.

The rank that holds both ends of the chain alternates `last stage of i - D, then first stage of i`, with D
micro-batches in flight. D too large stalls: every buffer in the ring is full while rank 0 still sends. `dry_run`
finds that before the run does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from pipeline.partition.plan import Plan

__all__ = ["Action", "ActionKind", "ScheduleError", "dry_run", "make_gradient_schedule", "make_schedule"]


class ScheduleError(ValueError):
    """A schedule that would deadlock."""


class ActionKind(Enum):
    FORWARD = "forward"
    RESULT = "result"
    BACKWARD = "backward"


@dataclass(frozen=True)
class Action:
    """One step of a rank. `stage_index` of a RESULT is the number of stages: the place after the last one."""

    kind: ActionKind
    stage_index: int
    microbatch_index: int


def make_schedule(
    plan: Plan, num_microbatches: int, *, world_size: int, in_flight: int, first_microbatch: int = 0
) -> list[list[Action]]:
    """Actions of each rank, in order, for micro-batches [first_microbatch, num_microbatches).

    `world_size` is `plan.num_nodes` (rank = node) or 1 (one process holds all stages and runs each
    micro-batch to its end). `in_flight` is D above.
    """
    slots = [(stage.node, stage.stage_index, ActionKind.FORWARD) for stage in plan.stages]
    if plan.last_node != 0:
        slots.append((0, len(plan.stages), ActionKind.RESULT))
    last_slot = slots[-1][1]
    schedule = []
    for rank in range(world_size):
        own = [(slot, kind) for node, slot, kind in slots if world_size == 1 or node == rank]
        if world_size == 1:
            order = [(m, slot, kind) for m in range(first_microbatch, num_microbatches) for slot, kind in own]
        else:
            # The delay of the chain's first slot is 0 and that of its last D; within a step, later slots go first,
            # so that finished work leaves the ring before new work enters it.
            first_own = own[0][0] if own else 0
            steps = [
                (m + in_flight * (slot - first_own) // max(last_slot, 1), -slot, m, kind)
                for slot, kind in own
                for m in range(first_microbatch, num_microbatches)
            ]
            order = [(m, -negative_slot, kind) for _, negative_slot, m, kind in sorted(steps, key=lambda s: s[:3])]
        schedule.append([Action(kind, slot, m) for m, slot, kind in order])
    return schedule


def make_gradient_schedule(plan: Plan, num_microbatches: int, *, world_size: int) -> list[list[Action]]:
    """Actions of each rank, in order, for one micro-batch after the other forward through all stages and back.

    All ranks' actions are parts of one total order in which each action needs only the one before it, so this cannot
    deadlock.
    """
    chain = [(stage.node, stage.stage_index, ActionKind.FORWARD) for stage in plan.stages]
    chain += [(node, index, ActionKind.BACKWARD) for node, index, _ in reversed(chain)]
    return [
        [
            Action(kind, index, m)
            for m in range(num_microbatches)
            for node, index, kind in chain
            if world_size == 1 or node == rank
        ]
        for rank in range(world_size)
    ]


def dry_run(schedule: Sequence[Sequence[Action]], *, receives_ahead: int) -> None:
    """Run the schedule with sends that block until their receive is posted.

    Each link has `receives_ahead` receives posted: that of micro-batch m from the start or once m -
    receives_ahead has been taken. This is stricter than the real links, which also buffer sends. In the
    wrap-around ring of N ranks it passes when D < N (receives_ahead + 1).

    Raises ScheduleError naming each rank's blocked action.
    """
    owner: dict[int, int] = {a.stage_index: rank for rank, actions in enumerate(schedule) for a in actions}
    position = [0] * len(schedule)
    sending = [False] * len(schedule)  # the current action has computed and waits to send
    taken: dict[int, int] = dict.fromkeys(owner, 0)  # micro-batches taken from the link before a slot
    arrived: dict[int, int] = dict.fromkeys(owner, 0)  # micro-batches handed to that link

    def advance(rank: int) -> bool:
        action = schedule[rank][position[rank]]
        slot, following = action.stage_index, action.stage_index + 1
        if not sending[rank]:
            if slot > 0:
                if arrived[slot] <= taken[slot]:
                    return False
                taken[slot] += 1
            sending[rank] = True
        if following in owner:
            if owner[following] != rank and arrived[following] >= taken[following] + receives_ahead:
                return False
            arrived[following] += 1
        sending[rank] = False
        position[rank] += 1
        return True

    progress = True
    while progress:
        progress = False
        for rank, actions in enumerate(schedule):
            while position[rank] < len(actions) and advance(rank):
                progress = True
    stuck = _describe_stuck(schedule, position, sending)
    if stuck:
        raise ScheduleError(
            f"the schedule deadlocks with receives posted {receives_ahead} ahead: {'; '.join(stuck)}. "
            "Lower runtime.in_flight or raise runtime.receives_ahead"
        )


def _describe_stuck(
    schedule: Sequence[Sequence[Action]], position: Sequence[int], sending: Sequence[bool]
) -> list[str]:
    stuck = []
    for rank, actions in enumerate(schedule):
        if position[rank] < len(actions):
            action = actions[position[rank]]
            verb = "send from" if sending[rank] else "receive for"
            stuck.append(
                f"rank {rank} waits to {verb} stage {action.stage_index}, micro-batch {action.microbatch_index}"
            )
    return stuck
