"""Which forming of the ring a rank takes part in, agreed through the rendezvous store.

The ring is formed once at the start, and again when a connection breaks or a rank is started again. Each forming is an
epoch: its number is in the store, and all keys of it lie under that number, so that nothing of an earlier one is read.
A rank takes its place in an epoch once. Who finds its place taken is a process that was started again, and who has lost
a connection cannot go on: both end the epoch, which has an effect once, and go to the next. Others see the number
change. A cause for the end of the run that is told in an epoch which is over is passed on to those in the next one.
No torch: a store is handed in.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["Epoch"]

_NUMBER = "epoch"
_CAUSE = "watch/cause"


class Epoch:
    """One epoch, as a client of the rendezvous store sees it: `number`, and whether it is over."""

    def __init__(self, store: Any, number: int) -> None:
        self.number = number
        self._store = store

    @classmethod
    def enter(cls, store: Any, rank: int) -> Epoch:
        """Take the rank's place in the epoch that the store tells; in the next where another process has taken it."""
        token = os.urandom(16).hex()
        number = int(store.compare_set(_NUMBER, "", "0"))
        while store.compare_set(f"{number}/member/{rank}", "", token) != token.encode():
            number = cls(store, number).end()
        return cls(store, number)

    def is_over(self) -> bool:
        return self._store.get(_NUMBER) != str(self.number).encode()  # or a stranger's word, which is no number

    def end(self) -> int:
        """End it for all ranks, unless that was done; returns the number of the one that goes on."""
        return int(self._store.compare_set(_NUMBER, str(self.number), str(self.number + 1)))

    def pass_on(self, cause: str) -> None:
        """Tell the run's cause, told in this epoch, in the one that goes on, if this one is over."""
        number = self._store.get(_NUMBER).decode(errors="replace")
        if number.isdecimal() and number != str(self.number):
            self._store.compare_set(f"{number}/{_CAUSE}", "", cause)
