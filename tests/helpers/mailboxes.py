"""What is left in mailboxes after a stream."""

from __future__ import annotations

from pipeline.comm.mailbox import Outbox

__all__ = ["num_free"]


def num_free(outbox: Outbox, num_buffers: int = 2) -> int:
    """How many different buffers an outbox of so many gives out, nothing being sent; it is of no use afterwards."""
    try:
        return len({id(outbox.acquire()) for _ in range(num_buffers)})
    except IndexError:  # neither free nor on its way
        return 0
