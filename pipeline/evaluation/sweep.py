"""Many evaluations on one deployment: the points of a sweep, one after the other.

A point is done when the folder has its record, known by its digest; so a repeated sweep does nothing and an interrupted
one goes on, within a point from its journal. A point that fails in its codec or config leaves a small JSON file with
the error instead, and the sweep goes on; the next start tries it again. What takes a rank away ends the sweep.
"""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.comm.watchdog import PipelineError, tell
from pipeline.config.reading import with_overrides
from pipeline.config.schema import RunConfig
from pipeline.config.sweep_file import Point, Sweep
from pipeline.evaluation.evaluation import Evaluation
from pipeline.evaluation.progress import SweepProgress
from pipeline.evaluation.tracking import Tracker
from pipeline.partition.schedule import ScheduleError
from pipeline.records.environment import environment_changes
from pipeline.records.base import now
from pipeline.records.failed_point import FailedPoint
from pipeline.records.files import RecordError
from pipeline.records.identity import digest_of
from pipeline.records.journal import Journal
from pipeline.records.labels import config_label
from pipeline.records.run_record import RunRecord
from pipeline.records.store import failure_path, read_record, write_failure
from pipeline.report.recommendation import Outlook
from pipeline.report.results import read_own_per_token
from pipeline.report.summary import write_report
from pipeline.runtime.deployment import Deployment
from pipeline.runtime.engine import StageError
from pipeline.runtime.text import check_max_length

__all__ = ["SweepResult", "run_points", "write_page"]

logger = logging.getLogger(__name__)

ADVICE = "; finished points and micro-batches are kept: the same command goes on from them"


@dataclass
class SweepResult:
    """What became of the points: files on rank 0, nothing elsewhere; `num_run` in this session."""

    records: list[Path] = field(default_factory=list)
    failures: list[Path] = field(default_factory=list)
    num_run: int = 0


def run_points(sweep: Sweep, config: RunConfig, deployment: Deployment) -> SweepResult:
    """Run what is not done yet. `config` is what the points' overrides are applied to.

    Raises ConfigError when there is no point, PipelineError when a rank or link fails.
    """
    control = deployment.control
    points = sweep.points([link.name for link in deployment.plan.links])
    control.agree("sweep", {"base": digest_of(config.numerics()), "points": digest_of([p.overrides for p in points])})
    control.watchdog.advice = ADVICE
    recorder = _SweepRecorder(sweep.name, len(points), Path(config.exp_dir)) if control.world.rank == 0 else None
    result = SweepResult()
    for point in points:
        label = _label(config, point)
        if recorder:
            recorder.progress.begin(label)
        path, error, was_run = _run_point(point, config, deployment, recorder, sweep.name)
        result.num_run += was_run
        if recorder and error is not None:
            result.failures.append(recorder.fail(point, config, label, error, was_run))
        elif recorder and path is not None:
            recorder.finish(point, config, path, was_run)
            if path not in result.records:
                result.records.append(path)
    if recorder:
        recorder.progress.close()
    return result


def _run_point(
    point: Point, config: RunConfig, deployment: Deployment, recorder: _SweepRecorder | None, name: str
) -> tuple[Path | None, str | None, bool]:
    """(record's path on rank 0, error on every rank, whether it was run now)."""
    control = deployment.control
    evaluation, error = None, None
    try:
        point_config = with_overrides(config, point.overrides)
        check_max_length(point_config, deployment.model.config)
        evaluation = Evaluation(point_config, deployment)
    except PipelineError:
        raise
    except ValueError as e:
        error = str(e)
    except Exception as e:  # a plug-in's constructor may raise anything
        tell(f"ERROR: a codec cannot be made\n{traceback.format_exc()}")
        error = f"{type(e).__name__}: {e}"
    finished = recorder.find(evaluation) if recorder and evaluation else None
    if recorder and evaluation and not finished:
        try:
            Journal.check(recorder.folder, evaluation.digest, resume=True)
        except RecordError as e:
            error = str(e)
    told = control.gather({"error": error, "finished": finished and str(finished)})
    errors = [one["error"] for one in told if one["error"] is not None]
    if evaluation is None or errors:
        return None, errors[0], False
    if told[0]["finished"]:
        return finished, None, False
    resume = recorder is not None and Journal.exists(recorder.folder, evaluation.digest)
    try:
        return evaluation.run(resume=resume, sweep=name), None, True
    except (StageError, ScheduleError) as e:
        return None, str(e), True


class _SweepRecorder:
    """Rank 0's part: which points are done, progress, failures."""

    def __init__(self, name: str, num_points: int, folder: Path) -> None:
        self.folder = folder
        self.progress = SweepProgress(name, num_points)
        self._records: dict[str, list[tuple[Path, RunRecord]]] = {}
        for path in sorted(folder.glob("*.json")):
            try:
                record = read_record(path)
            except RecordError:
                continue  # another kind of file, or another version's
            self._records.setdefault(record.digest, []).append((path, record))

    def find(self, evaluation: Evaluation) -> Path | None:
        """The record of an evaluation, if there is one that lacks nothing which the config asks for."""
        for path, record in self._records.get(evaluation.digest, ()):
            lacks_errors = evaluation.measures_error and record.reconstruction is None
            if record.one_token is not None and not lacks_errors:
                try:
                    read_own_per_token(path, record)
                except RecordError as e:
                    logger.warning("%s; the point is run again", e)
                else:
                    self._compare(path, record, evaluation)
                    return path
        return None

    def _compare(self, path: Path, record: RunRecord, evaluation: Evaluation) -> None:
        """Tell where a point that is taken over ran on something else than this start's points do."""
        before, own = record.environment, evaluation.deployment.environment
        if before is not None and (change := environment_changes(before, own)):
            logger.warning(
                "%s was made on something else, which may change its losses: this start has %s", path.name, change
            )

    def fail(self, point: Point, config: RunConfig, label: str, error: str, was_run: bool) -> Path:
        """Write down why a point has failed; returns the file."""
        self.progress.end(f"failed: {error}", was_run=was_run)
        failure = FailedPoint.from_plain(
            {
                "failure_id": _failure_id(config, point),
                "label": label,
                "error": error,
                "args": {"config": config.as_dict(), "point": dict(point.overrides)},
                "finished_at": now(),
            }
        )
        return write_failure(self.folder, failure)

    def finish(self, point: Point, config: RunConfig, path: Path, was_run: bool) -> None:
        """A point has its record, now or from before; an earlier failure is forgotten."""
        failure_path(self.folder, _failure_id(config, point)).unlink(missing_ok=True)
        record = read_record(path)
        if was_run:
            self._records.setdefault(record.digest, []).append((path, record))
        ppl = record.results.avg_ppl
        outcome = "perplexity is not finite" if ppl is None else f"perplexity {ppl:.4f}"
        self.progress.end(outcome if was_run else f"{outcome}, done before", was_run=was_run)


def write_page(sweep: Sweep, config: RunConfig, result: SweepResult) -> None:
    """Write the report of a sweep's points beside their records, on W&B as an artifact of the sweep's group."""
    folder = Path(config.exp_dir)
    page = folder / f"report-{sweep.name}.html"
    write_report([*result.records, *result.failures], page, Outlook())
    tracker = Tracker(
        config.wandb, run_id=f"{sweep.name}-report", config=config.as_dict(), folder=folder, group=sweep.name
    )
    tracker.attach(f"{sweep.name}-report", [page, page.with_suffix(".md"), page.with_suffix(".csv")])
    tracker.finish({"points": len(result.records), "failed_points": len(result.failures)})


def _failure_id(config: RunConfig, point: Point) -> str:
    return digest_of({"base": config.numerics(), "point": point.overrides})[:16]


def _label(config: RunConfig, point: Point) -> str:
    """`nf4, stride=256`: the codecs of a point, and what else it sets."""
    tree: dict[str, Any] = config.as_dict() | dict(point.overrides)
    others = [f"{key.split('.')[-1]}={value}" for key, value in point.overrides if not key.startswith("compressor")]
    try:
        codecs = config_label(tree)
    except AttributeError:  # no form of a codec; that is the point's own failure
        codecs = f"{tree['compressor']}, {tree['compressor_per_link']}"
    return ", ".join([codecs, *others])
