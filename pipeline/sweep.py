"""Many evaluations on one deployment: the points of a sweep, one after the other.

A point is done when the folder has its record, known by its digest; so a repeated sweep does nothing and an interrupted
one goes on, within a point from its journal. A point that fails in its codec or config leaves a small JSON file with
the error instead, and the sweep goes on; the next start tries it again. What takes a rank away ends the sweep.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.compose import check_max_length
from pipeline.config import RunConfig, with_overrides
from pipeline.deployment import Deployment
from pipeline.evaluation import Evaluation
from pipeline.journal import Journal
from pipeline.points import Point, Sweep
from pipeline.progress import SweepProgress
from pipeline.record import (
    RecordError,
    config_label,
    digest_of,
    failure_path,
    read_record,
    write_failure,
)
from pipeline.runner import StageError
from pipeline.watchdog import PipelineError

__all__ = ["SweepResult", "run_points"]

logger = logging.getLogger(__name__)

ADVICE = "; finished points and micro-batches are kept: the same command goes on from them"


@dataclass
class SweepResult:
    """What became of the points: on rank 0 the records' paths and (label, error) of the failed; elsewhere a count."""

    paths: list[Path] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    num_failed: int = 0


def run_points(sweep: Sweep, config: RunConfig, deployment: Deployment) -> SweepResult:
    """Run what is not done yet. `config` is what the points' overrides are applied to.

    Raises ConfigError when there is no point, PipelineError when a rank or link fails.
    """
    control = deployment.control
    points = sweep.points([link.name for link in deployment.plan.links])
    control.agree("sweep", {"base": digest_of(config.numerics()), "points": digest_of([p.overrides for p in points])})
    control.watchdog.advice = ADVICE
    head = _Head(sweep.name, len(points), Path(config.exp_dir)) if control.world.rank == 0 else None
    result = SweepResult()
    for point in points:
        label = _label(config, point)
        if head:
            head.progress.begin(label)
        path, error, was_run = _run_point(point, config, deployment, head, sweep.name)
        result.num_failed += error is not None
        if head:
            head.end(point, config, label, path, error, was_run)
            if error is not None:
                result.failures.append((label, error))
            elif path not in result.paths:
                result.paths.append(path)
    if head:
        head.progress.close()
    return result


def _run_point(
    point: Point, config: RunConfig, deployment: Deployment, head: _Head | None, name: str
) -> tuple[Path | None, str | None, bool]:
    """(record's path on rank 0, error on every rank, whether it was run now)."""
    control = deployment.control
    evaluation, error = None, None
    try:
        point_config = with_overrides(config, point.overrides)
        check_max_length(point_config, deployment.model_config)
        evaluation = Evaluation(point_config, deployment)
    except PipelineError:
        raise
    except ValueError as e:
        error = str(e)
    except Exception as e:  # a plug-in's constructor may raise anything
        logger.exception("a codec cannot be made")
        error = f"{type(e).__name__}: {e}"
    finished = head.find(evaluation) if head and evaluation else None
    told = control.gather(
        {"error": error, "digest": evaluation and evaluation.digest, "finished": finished and str(finished)}
    )
    errors = [one["error"] for one in told if one["error"] is not None]
    if errors:
        return None, errors[0], False
    if len({one["digest"] for one in told}) > 1:
        return None, "the ranks have different versions of its codecs", False
    if told[0]["finished"]:
        return finished, None, False
    resume = head is not None and Journal.exists(head.folder, evaluation.digest)
    try:
        return evaluation.run(resume=resume, sweep=name), None, True
    except StageError as e:
        return None, str(e), True


class _Head:
    """Rank 0's part: which points are done, progress, failures."""

    def __init__(self, name: str, num_points: int, folder: Path) -> None:
        self.folder = folder
        self.progress = SweepProgress(name, num_points)
        self._records: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
        for path in sorted(folder.glob("*.json")):
            try:
                record = read_record(path)
            except RecordError:
                continue  # another kind of file, or another version's
            self._records.setdefault(record.get("digest", ""), []).append((path, record))

    def find(self, evaluation: Evaluation) -> Path | None:
        """The record of an evaluation, if there is one that lacks nothing which the config asks for."""
        wanted = {"one_token", "reconstruction"} if evaluation.config.measure_error else {"one_token"}
        for path, record in self._records.get(evaluation.digest, ()):
            if wanted <= record.keys() and path.with_suffix(".safetensors").is_file():
                return path
        return None

    def end(
        self, point: Point, config: RunConfig, label: str, path: Path | None, error: str | None, was_run: bool
    ) -> None:
        """Note how a point ended."""
        failure_id = digest_of({"base": config.numerics(), "point": point.overrides})[:16]
        if error is not None:
            args = {"config": config.as_dict(), "point": dict(point.overrides)}
            write_failure(self.folder, {"failure_id": failure_id, "label": label, "error": error, "args": args})
            self.progress.end(f"failed: {error}", was_run=was_run)
            return
        failure_path(self.folder, failure_id).unlink(missing_ok=True)
        record = read_record(path)
        if was_run:
            self._records.setdefault(record["digest"], []).append((path, record))
        ppl = record["results"]["avg_ppl"]
        outcome = "perplexity is not finite" if ppl is None else f"perplexity {ppl:.4f}"
        self.progress.end(outcome if was_run else f"{outcome}, done before", was_run=was_run)


def _label(config: RunConfig, point: Point) -> str:
    """`nf4, stride=256`: the codecs of a point, and what else it sets."""
    tree: dict[str, Any] = config.as_dict() | dict(point.overrides)
    others = [f"{key.split('.')[-1]}={value}" for key, value in point.overrides if not key.startswith("compressor")]
    return ", ".join([config_label(tree), *others])
