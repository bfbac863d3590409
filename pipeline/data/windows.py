"""Token ids -> sliding windows -> micro-batches: which tokens go in, which positions are scored.

The protocol is Hugging Face's perplexity guide: windows of `max_length` tokens every `stride`, each token
scored in the first window that holds it, with all of that window to its left as context. Integers only; the
ids themselves are handled by `models.stage.TokenWindows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MicroBatch", "Window", "make_microbatches", "make_windows"]


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens [start, end) of the text, of which the last `num_scored` are scored.

    With `prepend_bos` the model's input has one BOS token in front, which is never scored.
    """

    index: int
    start: int
    end: int
    num_scored: int
    prepend_bos: bool = False

    @property
    def num_inputs(self) -> int:
        """Positions that the model sees and that cross the links."""
        return self.end - self.start + self.prepend_bos

    @property
    def scored_columns(self) -> range:
        """Input positions whose next token is scored."""
        return range(self.num_inputs - 1 - self.num_scored, self.num_inputs - 1)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Windows of one length that travel together: hidden states [B, T, H] with B windows of T positions."""

    index: int
    windows: tuple[Window, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return len(self.windows), self.windows[0].num_inputs

    @property
    def num_tokens(self) -> int:
        return len(self.windows) * self.windows[0].num_inputs

    @property
    def num_scored(self) -> int:
        return sum(w.num_scored for w in self.windows)


def make_windows(
    num_tokens: int, max_length: int, stride: int, *, window_bos: bool = False, text_has_bos: bool = False
) -> list[Window]:
    """Windows over `num_tokens` tokens; the last one may be shorter.

    With `window_bos` every window starts with BOS, inside `max_length`; the first window of a text that has
    one already (`text_has_bos`) is left as it is. A window's first token is scored only if something stands
    before it.
    """
    windows: list[Window] = []
    start = scored_end = 0
    while scored_end < num_tokens:
        prepend_bos = window_bos and not (text_has_bos and start == 0)
        end = min(start + max_length - prepend_bos, num_tokens)
        first_scored = max(scored_end, start + (0 if prepend_bos else 1))
        windows.append(
            Window(
                index=len(windows),
                start=start,
                end=end,
                num_scored=max(0, end - first_scored),
                prepend_bos=prepend_bos,
            )
        )
        scored_end = end
        start += stride
    return windows


def make_microbatches(windows: Sequence[Window], batch_size: int) -> list[MicroBatch]:
    """Group consecutive windows, at most `batch_size` together; lengths never mix, so nothing is padded."""
    groups: list[list[Window]] = []
    for window in windows:
        if groups and len(groups[-1]) < batch_size and groups[-1][0].num_inputs == window.num_inputs:
            groups[-1].append(window)
        else:
            groups.append([window])
    return [MicroBatch(index=i, windows=tuple(group)) for i, group in enumerate(groups)]
