"""Tasks of lm-evaluation-harness from start to end, on every rank; torch is loaded once the ranks have joined."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.comm.world import World
from pipeline.config.schema import RunConfig
from pipeline.config.sweep_file import Sweep
from pipeline.runtime.launch import on_deployment
from pipeline.serving.harness_options import HarnessOptions

if TYPE_CHECKING:
    from pipeline.partition.plan import Plan
    from pipeline.runtime.deployment import Deployment
    from pipeline.serving.harness import HarnessJob
    from pipeline.serving.harness_sweep import TasksSweepResult

__all__ = ["score_sweep", "score_tasks"]


def score_tasks(config: RunConfig, options: HarnessOptions) -> Path | None:
    """Path of the record on rank 0, None elsewhere."""
    job: HarnessJob | None = None

    def score(deployment: Deployment) -> Path | None:
        from pipeline.generation.ring import GenerationRing
        from pipeline.serving.harness import HarnessJob, evaluate_tasks
        from pipeline.serving.harness_record import write_results

        nonlocal job
        job = job or HarnessJob(evaluate_tasks(options))
        worked = job.run(GenerationRing(config, deployment))
        return None if worked is None else write_results(worked, options)

    def progress() -> int | None:
        return 0 if job is None else job.progress

    def check(plan: Plan, model_config: Any) -> None:
        _check(options)

    return on_deployment(config, Path(config.exp_dir), score, check, with_text=False, progress=progress)


def score_sweep(sweep: Sweep, config: RunConfig, options: HarnessOptions) -> TasksSweepResult:
    """Of every point, on one deployment."""

    def score(deployment: Deployment) -> TasksSweepResult:
        from pipeline.serving.harness_sweep import run_task_points

        return run_task_points(sweep, config, deployment, options)

    def check(plan: Plan, model_config: Any) -> None:
        _check(options)

    return on_deployment(sweep.deployed(config), Path(config.exp_dir), score, check, with_text=False)


def _check(options: HarnessOptions) -> None:
    if World.from_environment().rank == 0:
        from pipeline.serving.harness import check_tasks

        check_tasks(options)
