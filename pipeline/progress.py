"""What a person sees while a run goes on: tqdm on the console, curves on W&B. Rank 0 only."""

from __future__ import annotations

import sys
import time

import numpy as np
from tqdm import tqdm

from pipeline.metrics import perplexity
from pipeline.tracking import Tracker

__all__ = ["Progress"]


class Progress:
    """Running perplexity, perplexity of the last micro-batch, payload bytes per token and link, tokens per second.

    Tokens are those that the model processed, window overlap included.
    """

    def __init__(self, *, num_tokens: int, num_links: int, tracker: Tracker) -> None:
        self._num_links = num_links
        self._tracker = tracker
        self._nll, self._num_scored, self._num_processed, self._payload_bytes = 0.0, 0, 0, 0
        self._num_fresh = 0  # processed in this session
        self._start_s = time.perf_counter()
        self._bar = tqdm(total=num_tokens, unit="tok", unit_scale=True, file=sys.stderr, dynamic_ncols=True)

    def add(
        self, *, num_tokens: int, loss: np.ndarray, payload_bytes: tuple[int, ...], fresh: bool = True
    ) -> None:
        """Count one finished micro-batch; `fresh` unless it comes from an earlier session's journal."""
        window_nll = float(loss.sum(dtype=np.float64))
        self._nll += window_nll
        self._num_scored += len(loss)
        self._num_processed += num_tokens
        self._num_fresh += num_tokens if fresh else 0
        self._payload_bytes += sum(payload_bytes)
        shown = {"ppl": perplexity(self._nll, self._num_scored), "window_ppl": perplexity(window_nll, len(loss))}
        if self._num_links:
            shown["bytes_per_token"] = self._payload_bytes / (self._num_processed * self._num_links)
        shown["tokens_per_s"] = self._num_fresh / (time.perf_counter() - self._start_s)
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
        self._bar.update(num_tokens)
        self._tracker.log(shown, num_tokens=self._num_processed)

    def close(self) -> None:
        self._bar.close()
