"""The C library's allocator, told to keep what is freed: a CPU rank's activations come back with every micro-batch.

glibc returns large blocks, and the free end of its heap, to the system at once. A stage frees its hidden states when
they have left, so each micro-batch would take the same pages anew and have them zeroed again, which costs a tenth of
the CPU time of a small model's stage. The price: resident memory does not shrink from its peak.
"""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

# glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Set it for this process, from now on. Returns whether the C library has such settings (glibc has)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    never_trim, never_map = mallopt(_M_TRIM_THRESHOLD, -1), mallopt(_M_MMAP_MAX, 0)
    return bool(never_trim and never_map)
