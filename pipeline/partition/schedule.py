"""How many passes may be in flight. Integers only.

No rank has a list of work: each takes frames as they come, and rank 0 starts new passes while a credit is left. A rank
that cannot send waits, with one frame in hand, until the next rank has room; r receives are posted there. So ranks
stand still for good only if they form a cycle of links, on each of which r frames have arrived and are not taken while
one more waits to be sent: k links hold k (r + 1) passes then. With fewer than that in flight, for the shortest cycle of
links, some buffer is free and the hole travels back. In the ring of N ranks this is D < N (r + 1).

What else could be waited for is not: a rank takes frames of all its links alike, sends of END and failures are frames
like others, and posted sends, which links buffer besides, make the ring roomier than this.
"""

from __future__ import annotations

from pipeline.partition.plan import Plan

__all__ = ["ScheduleError", "max_in_flight", "passes_in_flight"]


class ScheduleError(ValueError):
    """More passes in flight than the links can hold."""


def max_in_flight(plan: Plan, *, receives_ahead: int) -> int | None:
    """The largest number of passes that cannot deadlock; None where no ranks wait for each other."""
    edges = {(link.src_node, link.dst_node) for link in plan.links}
    if plan.last_node != 0:
        edges.add((plan.last_node, 0))
    shortest = min((length for node in range(plan.num_nodes) if (length := _cycle(edges, node))), default=None)
    return None if shortest is None else shortest * (receives_ahead + 1) - 1


def passes_in_flight(plan: Plan, setting: int, *, receives_ahead: int, world_size: int) -> int:
    """What `runtime.in_flight` means for a plan: two passes more than nodes where it is 0, or what the links can hold.

    One process, which needs none, is told what the plan's ranks would have. Raises ScheduleError for a number that
    could deadlock.
    """
    limit = max_in_flight(plan, receives_ahead=receives_ahead)
    if limit is not None and setting > limit and world_size > 1:
        raise ScheduleError(
            f"runtime.in_flight is {setting}: with receives posted {receives_ahead} ahead, the links of this plan hold "
            f"{limit} passes, and more of them may deadlock. Lower runtime.in_flight or raise runtime.receives_ahead"
        )
    wanted = setting or plan.num_nodes + 2
    return wanted if limit is None else min(wanted, limit)


def _cycle(edges: set[tuple[int, int]], start: int) -> int | None:
    """Links of the shortest way from a node back to it; None if there is none."""
    reached, length = {start}, 0
    frontier = {start}
    while frontier:
        length += 1
        frontier = {dst for src, dst in edges if src in frontier}
        if start in frontier:
            return length
        frontier -= reached
        reached |= frontier
    return None
