"""This process's memory: its peak, and the C library's allocator, told what a rank on a CPU needs.

It is to stay small while the rank loads and quick while it runs. Both are about blocks of some MiB. glibc learns from
the first one freed to cut the next out of its heap, where a quantised layer that stays keeps the freed full-precision
layer before it from going back to the system. And it returns the free end of the heap: a stage's activations would take
their pages anew with each micro-batch and have them zeroed, which costs a small model a tenth of its CPU time.
"""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory", "peak_rss_bytes", "pss_bytes", "return_freed_memory"]

# glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4


def return_freed_memory() -> bool:
    """From now on, blocks of a MiB and more go back to the system when they are freed.

    Returns whether the C library has such a setting; glibc has.
    """
    return _set({_M_MMAP_THRESHOLD: 2**20})


def keep_freed_memory() -> bool:
    """From now on, what is freed stays with the process, so that resident memory does not shrink from its peak.

    Returns whether the C library has such settings.
    """
    return _set({_M_TRIM_THRESHOLD: -1, _M_MMAP_MAX: 0})


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far (Linux: VmHWM)."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            line = next(line for line in status if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def pss_bytes() -> int | None:
    """This process's share of the memory that it has now: a page that n processes have counts as 1/n. Linux only."""
    try:
        with open("/proc/self/smaps_rollup", encoding="ascii") as rollup:
            line = next(line for line in rollup if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) * 1024


def _set(options: dict[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) for option, value in options.items())
