"""What a person sees while a run or a sweep goes on: tqdm on the console, curves on W&B. Rank 0 only.

A sweep has a bar over its points, with the current point's bar below it. Where stderr is no terminal, a sweep prints
a line per point instead.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from pipeline.evaluation.tracking import Tracker
from pipeline.records.perplexity import perplexity

__all__ = ["Progress", "SweepProgress"]


class Progress:
    """Running perplexity, perplexity of the last micro-batch, payload bytes per token and link, tokens per second.

    Tokens are those that the model processed, window overlap included. With `in_sweep` the bar stands below the
    sweep's.
    """

    def __init__(self, *, num_tokens: int, link_names: Sequence[str], tracker: Tracker, in_sweep: bool) -> None:
        self._link_bytes = dict.fromkeys(link_names, 0)
        self._tracker = tracker
        self._nll, self._num_scored, self._num_processed = 0.0, 0, 0
        self._num_fresh = 0  # processed in this session
        self._start_s = time.perf_counter()
        self._bar = tqdm(
            total=num_tokens,
            unit="tok",
            unit_scale=True,
            file=sys.stderr,
            dynamic_ncols=True,
            position=1 if in_sweep else 0,
            leave=not in_sweep,
            disable=in_sweep and not sys.stderr.isatty(),
        )

    def add(self, *, num_tokens: int, loss: np.ndarray, payload_bytes: tuple[int, ...], fresh: bool = True) -> None:
        """Count one finished micro-batch; `fresh` unless it comes from an earlier session's journal."""
        window_nll = float(loss.sum(dtype=np.float64))
        self._nll += window_nll
        self._num_scored += len(loss)
        self._num_processed += num_tokens
        self._num_fresh += num_tokens if fresh else 0
        for name, nbytes in zip(self._link_bytes, payload_bytes, strict=True):
            self._link_bytes[name] += nbytes
        shown = {"ppl": perplexity(self._nll, self._num_scored), "window_ppl": perplexity(window_nll, len(loss))}
        if self._link_bytes:
            crossings = self._num_processed * len(self._link_bytes)
            shown["bytes_per_token"] = sum(self._link_bytes.values()) / crossings
        shown["tokens_per_s"] = self._num_fresh / (time.perf_counter() - self._start_s)
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        self._bar.update(num_tokens)
        per_link = {f"payload_bytes/{name}": nbytes for name, nbytes in self._link_bytes.items()}
        self._tracker.log(shown | per_link, num_tokens=self._num_processed)

    def close(self) -> None:
        self._bar.close()


class SweepProgress:
    """Points done, the current point, and how long the others will take if they take as long."""

    def __init__(self, name: str, num_points: int) -> None:
        self._name, self._num_points = name, num_points
        self._num_done = self._num_run = 0
        self._start_s = time.monotonic()
        self._on_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=num_points,
            unit="point",
            desc=name,
            file=sys.stderr,
            dynamic_ncols=True,
            bar_format="{desc}: {n}/{total} points |{bar}|{postfix}",
            disable=not self._on_terminal,
        )

    def begin(self, label: str) -> None:
        """A point is taken up."""
        self._label = label
        self._bar.set_postfix_str(f"{self._remaining()}{label}")
        self._line(f"{label} ... {self._remaining()}".rstrip())

    def end(self, outcome: str, *, was_run: bool) -> None:
        """The point is done, in this session unless it has not been `was_run`."""
        self._num_done += 1
        self._num_run += was_run
        self._bar.update()
        self._line(f"{self._label}: {outcome}")

    def close(self) -> None:
        self._bar.close()

    def _remaining(self) -> str:
        if not self._num_run:
            return ""
        per_point_s = (time.monotonic() - self._start_s) / self._num_run
        return f"{tqdm.format_interval(per_point_s * (self._num_points - self._num_done))} left, "

    def _line(self, text: str) -> None:
        if not self._on_terminal:
            print(f"{self._name} {self._num_done}/{self._num_points}: {text}".rstrip(", "), file=sys.stderr, flush=True)
