"""Networks that are not there: between ranks of one machine, frames come as late as over a thin or far link.

A sender works out when a link of the wanted rate and delay would have delivered a frame's last byte, and puts that in
front of the frame; the receiver holds it back until then:

    leaves = max(previous frame has left, handed over) + bytes / rate
    arrives = max(previous frame's arrival, leaves + delay + jitter)

so several frames are on their way at once, in order, and both directions of a pair are apart. The bytes are the
frame's, headers included, the stamp not. The sender does it, as only there all frames of a wire pass in their order,
whichever links they belong to. What a real network has besides (TCP/IP headers, slow start, loss, Gloo's
announcements of messages, a sender that waits while the kernel's buffer is full) is not emulated; docs/thin_links.md.

Stamps are of CLOCK_MONOTONIC, which the processes of one machine share.
"""

from __future__ import annotations

import random
import struct
import time
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["STAMP_NBYTES", "Conditions", "EmulatedWire", "hold", "read_stamp", "write_stamp"]

_STAMP = struct.Struct("<q")  # nanoseconds
STAMP_NBYTES = _STAMP.size


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """One way of a link: `bits_per_s` (None: as fast as the machine), seconds from one end to the other, and by how
    much these vary, up or down.
    """

    bits_per_s: float | None = None
    delay_s: float = 0.0
    jitter_s: float = 0.0


class EmulatedWire:
    """What frames from one rank to another cross, whichever links they belong to. At the sender, for one thread."""

    def __init__(self, conditions: Conditions, seed: int = 0) -> None:
        self._conditions = conditions
        self._random = random.Random(seed)
        self._free_ns = self._last_arrival_ns = 0

    def arrival_ns(self, sent_ns: int, nbytes: int) -> int:
        """When a frame arrives that is handed over at `sent_ns`. Frames are asked for in their order."""
        conditions = self._conditions
        leaves_ns = max(self._free_ns, sent_ns)
        if conditions.bits_per_s is not None:
            leaves_ns += round(8e9 * nbytes / conditions.bits_per_s)
        delay_s = conditions.delay_s + conditions.jitter_s * self._random.uniform(-1, 1)
        self._free_ns = leaves_ns
        self._last_arrival_ns = max(self._last_arrival_ns, leaves_ns + round(1e9 * max(0.0, delay_s)))
        return self._last_arrival_ns


def hold(stamped: torch.Tensor) -> None:
    """Wait until the frame behind the stamp is due."""
    due_ns = read_stamp(stamped)
    while (left_ns := due_ns - time.monotonic_ns()) > 0:
        time.sleep(left_ns / 1e9)


def write_stamp(stamped: torch.Tensor, due_ns: int) -> None:
    """Take down, in the first bytes, when the frame behind them is due."""
    stamped.numpy()[:STAMP_NBYTES] = np.frombuffer(_STAMP.pack(due_ns), np.uint8)


def read_stamp(stamped: torch.Tensor) -> int:
    """Nanoseconds of the clock at which the frame is due."""
    (due_ns,) = _STAMP.unpack(stamped.numpy()[:STAMP_NBYTES].tobytes())
    return due_ns
