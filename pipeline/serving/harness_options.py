"""What lm-evaluation-harness is asked for; without torch, since commands make it before the ranks have joined."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["HarnessOptions"]


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """What the harness is asked for, by its own names.

    `tasks` are names or patterns; `include_path` has YAML files of further tasks. `limit` is a number of samples of
    each task, a share below 1, or None for all.
    """

    tasks: tuple[str, ...]
    include_path: Path | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    log_samples: bool = False
