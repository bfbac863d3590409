"""The points of a sweep, each scored by lm-evaluation-harness, on one deployment.

A point that fails leaves a small JSON file with the error instead of a record, and the sweep goes on.
"""

from __future__ import annotations

import dataclasses
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.comm.watchdog import PipelineError, tell
from pipeline.config.reading import with_overrides
from pipeline.config.schema import RunConfig
from pipeline.config.sweep_file import Point, Sweep
from pipeline.generation.ring import GenerationRing
from pipeline.records.base import now
from pipeline.records.failed_point import FailedPoint
from pipeline.records.files import RecordError
from pipeline.records.identity import digest_of
from pipeline.records.store import failure_path, write_failure
from pipeline.runtime.deployment import Deployment, generation_codecs
from pipeline.runtime.engine import StageError
from pipeline.serving.harness import HarnessJob, evaluate_tasks
from pipeline.serving.harness_options import HarnessOptions
from pipeline.serving.harness_record import write_results

__all__ = ["TasksSweepResult", "run_task_points"]


@dataclass
class TasksSweepResult:
    """Files on rank 0, nothing elsewhere."""

    records: list[Path] = field(default_factory=list)
    failures: list[Path] = field(default_factory=list)


def run_task_points(
    sweep: Sweep, config: RunConfig, deployment: Deployment, options: HarnessOptions
) -> TasksSweepResult:
    """Run all points, one after the other. `config` is what the points' overrides are applied to.

    Every rank calls it. Raises ConfigError when there is no point, PipelineError when a rank or link fails.
    """
    control = deployment.control
    points = sweep.points([link.name for link in deployment.plan.links])
    control.agree("sweep", {"base": digest_of(config.numerics()), "points": digest_of([p.overrides for p in points])})
    result = TasksSweepResult()
    for number, point in enumerate(points, 1):
        if control.world.rank == 0:
            tell(f"point {number} of {len(points)}: {dict(point.overrides)}\n")
        path, error = _run_point(point, config, deployment, options)
        told = next((text for text in control.gather(error) if text is not None), None)
        if control.world.rank != 0:
            continue
        folder, failure_id = Path(config.exp_dir), digest_of({"base": config.numerics(), "tasks": point.overrides})[:16]
        if told is not None:
            tell(f"failed: {told}\n")
            result.failures.append(_write_failure(folder, failure_id, config, point, told))
        elif path is not None:
            failure_path(folder, failure_id).unlink(missing_ok=True)
            result.records.append(path)
    return result


def _run_point(
    point: Point, config: RunConfig, deployment: Deployment, options: HarnessOptions
) -> tuple[Path | None, str | None]:
    """(record's path on rank 0, error on the ranks that have one)."""
    control = deployment.control
    ring, error = None, None
    try:
        own = with_overrides(config, point.overrides)
        codecs = generation_codecs(own, control, deployment.plan, deployment.model)
        ring = GenerationRing(own, dataclasses.replace(deployment, codecs=codecs))
    except (StageError, ValueError) as e:
        error = str(e)
    except PipelineError:
        raise
    except Exception as e:  # a plug-in's constructor may raise anything
        tell(f"ERROR: a codec cannot be made\n{traceback.format_exc()}")
        error = f"{type(e).__name__}: {e}"
    if any(text is not None for text in control.gather(error)) or ring is None:
        if ring is not None:
            ring.close()
        return None, error
    try:
        worked = HarnessJob(evaluate_tasks(options)).run(ring)
        return (None if worked is None else write_results(worked, options)), None
    except (PipelineError, RecordError):
        raise
    except Exception as e:  # the harness', and tasks are programs
        tell(f"ERROR: the harness has failed\n{traceback.format_exc()}")
        return None, f"{type(e).__name__}: {e}"


def _write_failure(folder: Path, failure_id: str, config: RunConfig, point: Point, error: str) -> Path:
    failure = FailedPoint.from_plain(
        {
            "failure_id": failure_id,
            "label": ", ".join(f"{key}={value}" for key, value in point.overrides),
            "error": error,
            "args": {"config": config.as_dict(), "point": dict(point.overrides)},
            "finished_at": now(),
        }
    )
    return write_failure(folder, failure)
