"""Weights & Biases, when asked for. A run never fails because of it.

Online or offline mode; offline needs neither an account nor a network. Only rank 0 tracks. A sweep's runs form a
group of its name. After the first failure nothing more is tracked: each point of a sweep would wait as long again for a
server that does not answer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.schema import WandbConfig

__all__ = ["Tracker"]

logger = logging.getLogger(__name__)

# How long a server may take to answer, and at the end of a run to take what was logged; W&B itself waits 90 s, and for
# good.
_ANSWER_S = 20.0
_UPLOAD_S = 60.0


class Tracker:
    """One W&B run, or nothing where tracking is off or has failed, with this run or an earlier one."""

    has_failed = False

    def __init__(
        self,
        settings: WandbConfig,
        *,
        run_id: str,
        config: Mapping[str, Any],
        folder: Path,
        group: str | None = None,
    ) -> None:
        self._run: Any = None
        if settings.enabled and not Tracker.has_failed:
            self._guard(lambda: self._start(settings, run_id, config, folder, group))

    def log(self, values: Mapping[str, float], *, num_tokens: int) -> None:
        """Log values against the number of tokens processed so far."""
        if self._run is not None:
            self._guard(lambda: self._run.log({**values, "tokens_processed": num_tokens}))

    def attach(self, name: str, files: Sequence[Path]) -> None:
        """Keep files with the run, as an artifact."""
        if self._run is not None:
            self._guard(lambda: self._attach(name, files))

    def finish(self, summary: Mapping[str, Any], *, exit_code: int = 0) -> None:
        """Close the run with its final values; once is enough."""
        if self._run is not None:
            self._guard(lambda: (self._run.summary.update(dict(summary)), self._run.finish(exit_code=exit_code)))
        self._run = None

    def _attach(self, name: str, files: Sequence[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(name, type="report")
        for file in files:
            artifact.add_file(str(file))
        self._run.log_artifact(artifact)

    def _start(
        self, settings: WandbConfig, run_id: str, config: Mapping[str, Any], folder: Path, group: str | None
    ) -> None:
        import wandb

        self._run = wandb.init(
            project=settings.project,
            name=run_id if group else settings.run_name or run_id,
            group=group,
            mode="offline" if settings.mode == "offline" else "online",
            config=dict(config),
            dir=str(folder),
            settings=_bounds(wandb.Settings),
        )
        self._run.define_metric("*", step_metric="tokens_processed")

    def _guard(self, operation) -> None:
        try:
            operation()
        except Exception as e:  # whatever it is, the run's result is worth more than its curve
            logger.warning("W&B is switched off from here on: %s", e)
            self._run = None
            Tracker.has_failed = True


def _bounds(settings: Any) -> Any:
    """W&B's settings that bound its waits, those that this version has and the environment does not set."""
    bounds = {"init_timeout": _ANSWER_S, "finish_timeout": _UPLOAD_S, "finish_timeout_raises": True}
    known = settings.model_fields
    return settings(**{k: v for k, v in bounds.items() if k in known and f"WANDB_{k.upper()}" not in os.environ})
