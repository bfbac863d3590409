"""lm-evaluation-harness on a ring: rank 0 runs it on a thread of its own, its main thread and the others the ring.

Imports lm_eval only where it is used: rank 0 alone needs it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config.schema import ConfigError
from pipeline.generation.generate import make_request_maker, make_scheduler
from pipeline.generation.ring import GenerationRing
from pipeline.generation.scheduler import Scheduler
from pipeline.records.generation_record import Interruptions
from pipeline.serving.asking import Asking
from pipeline.serving.harness_options import HarnessOptions

if TYPE_CHECKING:
    from pipeline.serving.harness_model import ThinwireLM

__all__ = ["HarnessJob", "Worked", "check_tasks", "evaluate_tasks"]

Results = Mapping[str, Any]
_FILE_FORMATS = ("json", "csv", "text", "parquet", "arrow")  # as `datasets` names them
_JOBS = itertools.count()  # of this process, to know what one before it has begun


@dataclass(frozen=True, kw_only=True)
class Worked:
    """What came of a job on rank 0: the work's result, what was asked of the ring, and what the ranks tell of it."""

    result: Any
    asking: Asking
    ring: GenerationRing
    reports: Sequence[Mapping[str, Any]]
    earlier_s: float
    interruptions: Interruptions


class HarnessJob:
    """`work(model)` on a thread of its own, on whatever ring there is: `run` is called again where it was formed again.
    Where rank 0's process was started again, the work begins anew.

    `about` is what the model tells of itself in the harness' results.
    """

    def __init__(self, work: Callable[[ThinwireLM], Any], about: Mapping[str, Any] = {}) -> None:
        self._work, self._about = work, dict(about)
        self._mark, self._was_started_again = f"harness {next(_JOBS)}", False
        self._scheduler: Scheduler | None = None
        self._asking: Asking | None = None
        self._thread: threading.Thread | None = None
        self._first_start_s: float | None = None
        self._result: Any = None
        self._problem: BaseException | None = None

    @property
    def progress(self) -> int | None:
        """On rank 0, as `Scheduler.progress`."""
        return self._scheduler.progress if self._scheduler else 0

    def run(self, ring: GenerationRing) -> Worked | None:
        """Every rank calls it; None on other ranks than 0. Raises, there and once the ring is at rest, what `work` has.

        The ring is closed.
        """
        control = ring.deployment.control

        def prepare() -> tuple[None, None]:
            if control.world.rank == 0:
                self._prepare(ring)
            return None, None

        control.together(prepare)
        start_s = time.perf_counter()
        self._first_start_s = self._first_start_s or start_s
        if self._thread is not None and self._thread.ident is None:
            self._thread.start()
        reports = ring.run(self._scheduler)
        ring.close()
        if self._thread is None or self._asking is None or self._scheduler is None:
            return None
        self._thread.join()
        if self._problem is not None:
            raise self._problem
        interruptions = Interruptions(
            count=control.num_interruptions,
            pause_s=control.pause_s,
            tokens_prefilled_again=self._scheduler.num_prefilled_again,
            started_again=self._was_started_again,
        )
        return Worked(
            result=self._result,
            asking=self._asking,
            ring=ring,
            reports=reports,
            earlier_s=start_s - self._first_start_s,
            interruptions=interruptions,
        )

    def _prepare(self, ring: GenerationRing) -> None:
        if self._scheduler is not None:
            self._scheduler.begin_again(ring.drafting)
            return
        self._was_started_again = ring.deployment.control.came_before(self._mark)
        from pipeline.serving.harness_model import ThinwireLM

        maker = make_request_maker(ring)
        self._scheduler = scheduler = make_scheduler(ring)
        links = [link.name for link in ring.deployment.plan.links]
        self._asking = Asking(scheduler, maker.tokenizer, links)
        model = ThinwireLM(self._asking, maker, self._about)

        def work() -> None:
            try:
                self._result = self._work(model)
            except BaseException as e:  # told on the main thread, SystemExit too, once the ring is at rest
                self._problem = e
            finally:
                scheduler.close()

        self._thread = threading.Thread(target=work, name="harness", daemon=True)


def check_tasks(options: HarnessOptions) -> None:
    """Raise ConfigError where lm_eval is not installed, or a name is no task's; no data set is loaded."""
    manager = _task_manager(options)
    for name in options.tasks:
        if not manager.match_tasks([name]):
            where = f" nor in {options.include_path}" if options.include_path else "; --lm_eval_tasks names a folder"
            raise ConfigError(f"--lm_eval: {name!r} is no task, group or tag of lm_eval{where}; see lm_eval ls tasks")


def evaluate_tasks(options: HarnessOptions) -> Callable[[ThinwireLM], Results]:
    """Work for a `HarnessJob`: the harness' results with its samples."""

    def work(model: ThinwireLM) -> Results:
        import lm_eval

        manager = _task_manager(options)
        names = manager.match_tasks(list(options.tasks))
        with _offline() if _are_local(manager, names) else contextlib.nullcontext():
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=names,
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                apply_chat_template=options.apply_chat_template,
                task_manager=manager,
                log_samples=True,
            )
        if results is None:
            raise ConfigError("the harness gives results where LOCAL_RANK is 0 only; let rank 0 be a machine's first")
        return results

    return work


def _are_local(manager: Any, names: Sequence[str]) -> bool:
    """Whether all are tasks over files."""
    entries = [manager.task_index[name].cfg for name in names]
    return all(entry and entry.get("dataset_path") in _FILE_FORMATS for entry in entries)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let nothing be asked of the hub: `datasets` would look there for a data set that is called `json`."""
    import datasets.config
    from huggingface_hub import constants

    flags = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = flags


@functools.cache
def _task_manager(options: HarnessOptions) -> Any:
    """The index of tasks; that of the harness' own takes many seconds, and is left out where it is not needed."""
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise ConfigError(f"lm-evaluation-harness cannot be imported ({e}); pip install 'thinwire[lm_eval]'") from e
    if options.include_path is None:
        return TaskManager()
    own = TaskManager(include_path=str(options.include_path), include_defaults=False)
    found = [own.match_tasks([name]) for name in options.tasks]
    # Groups and tags may have members among the harness' own.
    if all(names and set(names) <= set(own.all_subtasks) for names in found):
        return own
    return TaskManager(include_path=str(options.include_path))
