"""Weights & Biases, when asked for. A run never fails because of it.

Online or offline mode; offline needs neither an account nor a network. Only rank 0 tracks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import WandbConfig

__all__ = ["Tracker"]

logger = logging.getLogger(__name__)


class Tracker:
    """One W&B run, or nothing where tracking is off or has failed."""

    def __init__(self, settings: WandbConfig, *, run_id: str, config: Mapping[str, Any], folder: Path) -> None:
        self._run = None
        if settings.enabled:
            self._guard(lambda: self._start(settings, run_id, config, folder))

    def log(self, values: Mapping[str, float], *, num_tokens: int) -> None:
        """Log values against the number of tokens processed so far."""
        if self._run is not None:
            self._guard(lambda: self._run.log({**values, "tokens_processed": num_tokens}))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the run with its final values."""
        if self._run is not None:
            self._guard(lambda: (self._run.summary.update(dict(summary)), self._run.finish()))

    def _start(self, settings: WandbConfig, run_id: str, config: Mapping[str, Any], folder: Path) -> None:
        import wandb

        self._run = wandb.init(
            project=settings.project,
            name=settings.run_name or run_id,
            mode=settings.mode,
            config=dict(config),
            dir=str(folder),
        )
        self._run.define_metric("*", step_metric="tokens_processed")

    def _guard(self, operation) -> None:
        try:
            operation()
        except Exception as e:  # whatever it is, the run's result is worth more than its curve
            logger.warning("W&B is switched off for this run: %s", e)
            self._run = None
