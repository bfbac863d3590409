"""What a rank has seen of the others' heartbeats, and whom it blames when a run fails.

`watchdog.py` reads heartbeats from the rendezvous store and asks here; nothing in this file waits, starts a thread or
talks to anybody.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.comm.world import World

__all__ = ["Clock", "Heartbeats", "heartbeat"]

# Less than the watchdog waits for a cause before it blames: who has died meanwhile has been silent for so long.
_GONE_AFTER_S = 1.2


def heartbeat(count: int, *, is_waiting: bool, where: str) -> str:
    """What a rank writes; `count` tells two of them apart."""
    return f"{count}|{is_waiting:d}|{where}"


@dataclass
class _Beat:
    """The last heartbeat of a rank, and for how long it has been seen to stand still."""

    value: bytes
    silent_s: float = 0.0

    @property
    def where(self) -> str:
        return self.value.decode(errors="replace").split("|", 2)[2]

    @property
    def is_waiting(self) -> bool:
        return self.value.split(b"|", 2)[1] == b"1"


class Clock:
    """Seconds between ticks, at most what this process can have watched: it may have been stopped itself."""

    def __init__(self, interval_s: float) -> None:
        self._longest_s = 4 * interval_s
        self._last_s = time.monotonic()

    def tick(self) -> float:
        now_s = time.monotonic()
        passed_s, self._last_s = now_s - self._last_s, now_s
        return min(passed_s, self._longest_s)


class Heartbeats:
    """The last heartbeat of each rank. One thread sees them; others may ask."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._beats: dict[int, _Beat] = {}

    def see(self, rank: int, value: bytes, passed_s: float) -> None:
        """Take down the heartbeat that a rank has in the store, `passed_s` after it was last looked at."""
        beat = self._beats.get(rank)
        if beat is None or beat.value != value:
            self._beats[rank] = _Beat(value)
        else:
            beat.silent_s += passed_s

    def has_started(self, rank: int) -> bool:
        return rank in self._beats

    def not_started(self) -> list[int]:
        """Other ranks of which nothing has been seen."""
        return [rank for rank in range(self._world.world_size) if rank not in {*self._beats, self._world.rank}]

    def silent(self, limit_s: float) -> list[int]:
        """Other ranks whose heartbeats have stood still for longer than `limit_s`."""
        return [rank for rank, beat in self._others() if beat.silent_s > limit_s]

    def alive(self, limit_s: float) -> list[int]:
        """Other ranks whose heartbeats have moved within `limit_s`."""
        return [rank for rank, beat in self._others() if beat.silent_s < limit_s]

    def busy(self) -> list[int]:
        """Other ranks that live and wait for nobody."""
        return [rank for rank, beat in self._others() if not beat.is_waiting and beat.silent_s <= _GONE_AFTER_S]

    def last_known(self, *ranks: int) -> str:
        """`rank 2 (last at stage 2, micro-batch 5)`, or that it has not started; several of them joined."""
        return " and ".join(map(self._last_known, ranks))

    def blame(self, peer: int | None, symptom: str, place: str) -> str:
        """Who is at fault for what was seen at `place`: a silent rank, `peer` first, else who does not wait."""
        gone = self.silent(_GONE_AFTER_S)
        if gone:
            return f"lost {self.last_known(*([peer] if peer in gone else gone))}: {symptom}"
        busy = self.busy()
        if busy:
            who = self.last_known(*busy)
            return f"the others wait for {who}, or runtime.timeout_s is too short for it: {symptom}"
        return f"{place}: {symptom}"

    def _last_known(self, rank: int) -> str:
        beat = self._beats.get(rank)
        return f"rank {rank} (last at {beat.where})" if beat else f"rank {rank} (not started)"

    def _others(self) -> Iterable[tuple[int, _Beat]]:
        return sorted(item for item in self._beats.copy().items() if item[0] != self._world.rank)
