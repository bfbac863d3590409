"""Phases of a stage's time do not overlap."""

import torch

from pipeline.runtime import stage_times
from pipeline.runtime.stage_times import StageTimes


def test_a_phase_within_another_is_taken_from_it(monkeypatch):
    clock = iter([0.0, 1.0, 6.0, 8.0])
    monkeypatch.setattr(stage_times.time, "perf_counter", lambda: next(clock))
    times, cpu = StageTimes(), torch.device("cpu")
    with times.measure("compute", cpu), times.measure("importance", cpu, within="compute"):
        pass
    seconds = times.as_dict()
    assert (seconds["compute_s"], seconds["importance_s"]) == (3.0, 5.0)
    assert sum(seconds.values()) == 8.0
