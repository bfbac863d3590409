"""Where a stage's time goes, by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

__all__ = ["StageTimes"]


@dataclass
class StageTimes:
    """Seconds that one stage spent, by phase.

    `wait` is for frames, their framing and checksums included, by the host's clock. On a GPU the other phases are read
    from events of its stream. `importance` is what side inputs take, apart from `compute` although it interrupts that;
    `measure` is for the record alone. `head` is what sampling takes, logits included; that of scores is within
    `compute`.

    With a `slowdown` above 1, phases wait behind their work until that has taken so many times as long, as on a weaker
    device; `wait` and `measure`, which are no work of the device, do not.
    """

    slowdown: float = 1.0
    compute_s: float = 0.0
    head_s: float = 0.0
    importance_s: float = 0.0
    compress_s: float = 0.0
    decompress_s: float = 0.0
    wait_s: float = 0.0
    measure_s: float = 0.0
    _within_s: float = 0.0
    _events: list[tuple[str, str | None, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list, repr=False)

    @contextmanager
    def measure(self, phase: str, device: torch.device, *, within: str | None = None) -> Iterator[None]:
        """Add the enclosed work to `phase` ("compute", ...), and not to the phase `within` which it happens.

        GPU events are read later, by `as_dict`.
        """
        if self.slowdown != 1 and phase not in ("wait", "measure"):
            with self._slowed(phase, device, within):
                yield
        elif device.type == "cuda" and phase != "wait":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(torch.cuda.current_stream(device))
            yield
            end.record(torch.cuda.current_stream(device))
            self._events.append((phase, within, start, end))
        else:
            start_s = time.perf_counter()
            yield
            self._add(phase, within, time.perf_counter() - start_s)

    @contextmanager
    def _slowed(self, phase: str, device: torch.device, within: str | None) -> Iterator[None]:
        start_s, before_s = time.perf_counter(), self._within_s
        yield
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
        own_s = time.perf_counter() - start_s - (self._within_s - before_s)
        time.sleep((self.slowdown - 1) * own_s)
        total_s = time.perf_counter() - start_s
        self._add(phase, within, total_s)
        if within is not None:
            self._within_s += total_s

    def as_dict(self) -> dict[str, float]:
        for phase, within, start, end in self._events:
            end.synchronize()
            self._add(phase, within, start.elapsed_time(end) / 1e3)
        self._events.clear()
        names = ("compute_s", "importance_s", "compress_s", "decompress_s", "wait_s", "measure_s", "head_s")
        return {name: getattr(self, name) for name in names}

    def _add(self, phase: str, within: str | None, seconds: float) -> None:
        setattr(self, f"{phase}_s", getattr(self, f"{phase}_s") + seconds)
        if within is not None:
            self._add(within, None, -seconds)
