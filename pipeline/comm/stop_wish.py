"""A run that goes on until it is told to stop: a first signal asks it to come to its end, a second one ends it.

A part of the watchdog, which sees signals where there are several ranks; one process alone has handlers.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from pipeline.comm.world import World

__all__ = ["StopWish"]

_KEY = "stop"


class StopWish:
    """One rank's view. Nothing is heard before `hear`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._on_stop: Callable[[], None] | None = None
        self._num_signals, self._is_known, self._is_told = 0, False, False

    @property
    def is_heard(self) -> bool:
        return self._on_stop is not None

    def hear(self, on_stop: Callable[[], None]) -> None:
        """`on_stop` is called at a first signal, on any thread. On the main thread."""
        self._on_stop = on_stop
        signal.signal(signal.SIGINT, self._take)
        if self._world.world_size == 1:
            signal.signal(signal.SIGTERM, self._take)

    def forget(self) -> None:
        """Signals get their meaning back. On the main thread."""
        if self._on_stop is not None:
            self._on_stop = None
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def count_signal(self) -> bool:
        """A signal has come; whether it is one too many."""
        self._num_signals += 1
        if self._num_signals == 1:
            self._know()
        return self._num_signals > 1

    def begin_epoch(self) -> None:
        """The store has other keys from here on."""
        self._is_told = False

    def pass_on(self, store: Any) -> None:
        """To rank 0, which decides on passes, and so on the end; again and again, on one thread."""
        if self._on_stop is None:
            return
        if self._world.rank == 0 and not self._is_known and store.check([_KEY]):
            self._know()
        elif self._world.rank != 0 and self._num_signals and not self._is_told:
            store.set(_KEY, "")
            self._is_told = True

    def _know(self) -> None:
        if self._on_stop is not None and not self._is_known:
            self._is_known = True
            self._on_stop()

    def _take(self, number: int, frame: object) -> None:
        """With several ranks the watchdog's thread counts, also where the main thread is blocked."""
        if self._world.world_size == 1 and self.count_signal():
            raise KeyboardInterrupt
