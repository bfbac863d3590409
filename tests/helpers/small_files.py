"""A disk that is full, as far as one process sees."""

import contextlib
import resource
from collections.abc import Iterator

__all__ = ["small_files"]


@contextlib.contextmanager
def small_files(nbytes: int) -> Iterator[None]:
    """Writes beyond `nbytes` of a file fail, as on a full disk or beyond a quota."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
