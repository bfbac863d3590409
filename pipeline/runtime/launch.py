"""Start of a program on all ranks: join, deploy, do the work, leave. What goes wrong on one rank is known to all.

Entry points call `on_deployment`; torch is imported only after the ranks have joined, which takes seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.comm.watchdog import RunFinished, Watchdog, tell
from pipeline.comm.world import World
from pipeline.config.schema import RunConfig

if TYPE_CHECKING:
    from pipeline.comm.control import Control
    from pipeline.partition.plan import Plan
    from pipeline.runtime.deployment import Deployment, LoadedStages

__all__ = ["on_deployment"]

T = TypeVar("T")


def on_deployment(
    config: RunConfig,
    folder: Path,
    work: Callable[[Deployment], T],
    check: Callable[[Plan, Any], None] | None = None,
    claim: Callable[[str], None] | None = None,
    *,
    with_text: bool = True,
    progress: Callable[[], int | None] | None = None,
) -> T:
    """`work(deployment)` on every rank of the config's model, and its result.

    Rank 0 checks first that `folder` can be written to; `check(plan, model_config)` raises, before weights load, where
    the work cannot be done, and so does `claim(digest)`, on rank 0, where the run cannot be recorded. The config's text
    is read unless `with_text` is false.

    With `progress`, which tells on rank 0 how far the work has come, and `runtime.rejoin_s`, the loss of a rank or a
    connection does not end the run: the ring is formed again, and `work` called with what was deployed anew, weights
    being kept. It must then go on from where it was.
    A failure ends the process, with its message and a non-zero status, on every rank.
    """
    try:
        world = World.from_environment()
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    watchdog = Watchdog(world, config.runtime.timeout_s)
    try:
        control = _join(config, world, watchdog, rejoin_s=0.0 if progress is None else config.runtime.rejoin_s)

        def deployed(loaded: LoadedStages) -> Deployment:
            from pipeline.runtime.deployment import deploy

            return deploy(config, control, check, claim, with_text=with_text, loaded=loaded)

        return _work(control, folder, deployed, work, progress)
    except RunFinished:
        watchdog.stop()
        tell(f"rank {world.rank}: the run has come to its end meanwhile\n")
        sys.exit(0)
    except BaseException as e:  # a panic of a library in Rust is no Exception
        watchdog.abort(e)


def _join(config: RunConfig, world: World, watchdog: Watchdog, *, rejoin_s: float) -> Control:
    """Before the imports of seconds: from here on, what goes wrong on one rank is known to all."""
    # Torch's C++ stacks for a lost connection would bury the message that names the lost rank.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if config.runtime.backend == "nccl":
        # Loaded at its first launch, a kernel may wait for the whole device, and so for a send that no one has met.
        os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
    from pipeline.comm.control import Control

    runtime = config.runtime
    return Control(
        world,
        timeout_s=runtime.timeout_s,
        load_timeout_s=runtime.load_timeout_s,
        interface=runtime.interface,
        watchdog=watchdog,
        rejoin_s=rejoin_s,
    )


def _work(
    control: Control,
    folder: Path,
    deployed: Callable[[LoadedStages], Deployment],
    work: Callable[[Deployment], T],
    progress: Callable[[], int | None] | None,
) -> T:
    """`work` on what is `deployed`, anew each time that the ring is formed."""
    from pipeline.comm.mailbox import LinkError

    loaded = None
    while True:
        try:
            control.form()
            from pipeline.records.files import check_writable
            from pipeline.runtime.deployment import LoadedStages
            from pipeline.runtime.memory import keep_freed_memory, return_freed_memory

            if loaded is None:
                loaded = LoadedStages()
                if control.world.rank == 0:
                    check_writable(folder)
            return_freed_memory()
            deployment = deployed(loaded)
            keep_freed_memory()
            result = work(deployment)
            control.close()
            return result
        except LinkError as e:
            if progress is None or not control.may_form_again(e):
                raise
            control.leave_ring(e, progress())
