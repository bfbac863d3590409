"""Time limits that hold on a quiet machine, and wait longer on a busy one."""

import os

__all__ = ["allowed_s"]

OWN_PROCESSES = 4  # that a test may keep running itself


def allowed_s(seconds: float) -> float:
    """`seconds`, stretched by the load average per core that is not ours; as it is on a quiet machine."""
    return seconds * max(1.0, (os.getloadavg()[0] - OWN_PROCESSES) / (os.cpu_count() or 1))
