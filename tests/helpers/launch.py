"""Runs of `run_pipeline.py` in other processes: under torchrun, alone, or as ranks with own arguments.

* `run_torchrun` and `start_torchrun` are what a user types; each rank imports torch anew (seconds).
* `run_ranks` and `start_ranks` fork ranks from a server process that has imported everything, give each its
  own arguments, and set the environment that torchrun would; rank 0 hosts the store. They start in well under
  a second.
* `call_on_ranks` does the same for any importable function.

Nothing of a run outlives its timeout: what is left is killed, and the test fails with the output so far. On a busy
machine timeouts are longer (`patience`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.patience import allowed_s

__all__ = [
    "ROOT",
    "Finished",
    "Ranks",
    "Torchrun",
    "call_on_ranks",
    "run_alone",
    "run_ranks",
    "run_torchrun",
    "start_ranks",
    "start_torchrun",
    "store_process",
]

ROOT = Path(__file__).resolve().parents[2]
_PRELOADED = ["tests.helpers.preloaded"]
_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One process, or one torchrun with all its ranks, after its end.

    `returncode` is negative for a signal. `wall_s` counts from the start of the process.
    """

    returncode: int
    stdout: str
    stderr: str
    wall_s: float

    def check(self) -> Finished:
        """Fail the test, with the output, unless the process succeeded."""
        assert self.returncode == 0, f"exit code {self.returncode}\n{self.stdout}\n{self.stderr}"
        return self


class Torchrun:
    """A torchrun that may still be going on. Each rank's output goes to a file of its own."""

    def __init__(self, process: subprocess.Popen, logs: Path, num_ranks: int) -> None:
        self.process = process
        self.start_s = time.monotonic()
        self._logs, self._num_ranks = logs, num_ranks

    def rank_pids(self) -> dict[int, int]:
        """Process ids of the ranks that have started and not ended, by rank."""
        if self.process.poll() is not None:
            return {}
        found = {}
        main_thread = Path(f"/proc/{self.process.pid}/task/{self.process.pid}")
        for pid in map(int, _read(main_thread / "children").split()):
            for entry in _read(Path(f"/proc/{pid}/environ")).split(b"\0"):
                if entry.startswith(b"RANK="):
                    found[int(entry[5:])] = pid
        return found

    def returncode(self, rank: int) -> int | None:
        """Of a rank that has ended; negative for a signal."""
        return self._processes[rank].exitcode

    def rank_stderr(self, rank: int) -> str:
        """What a rank has written to stderr so far, in all attempts."""
        return self._read(rank, "stderr")

    def rank_stdout(self, rank: int) -> str:
        return self._read(rank, "stdout")

    def _read(self, rank: int, name: str) -> str:
        """Of all attempts."""
        return "".join(path.read_text(errors="replace") for path in sorted(self._logs.glob(f"**/{rank}/{name}.log")))

    def interrupt(self) -> None:
        """Ctrl-C: SIGINT to the foreground process group, in which the ranks are not."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self, timeout_s: float) -> Finished:
        """Wait for the end of torchrun; its own output, without the ranks'."""
        try:
            stdout, stderr = self.process.communicate(timeout=allowed_s(timeout_s))
        except subprocess.TimeoutExpired:
            outputs = "\n".join(f"rank {rank}: {self.rank_stderr(rank)}" for rank in range(self._num_ranks))
            self.kill()
            raise AssertionError(f"torchrun did not end within {timeout_s} s\n{outputs}") from None
        wall_s = time.monotonic() - self.start_s
        return Finished(returncode=self.process.returncode, stdout=stdout, stderr=stderr, wall_s=wall_s)

    def kill(self) -> None:
        """End everything at once. Ranks are in sessions of their own and outlive a killed torchrun."""
        for pid in self.rank_pids().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def start_torchrun(
    num_ranks: int, *arguments: str, env: Mapping[str, str] | None = None, more: Sequence[str] = ()
) -> Iterator[Torchrun]:
    """Start `run_pipeline.py` on `num_ranks` ranks of this machine; whatever is left at the end is killed.

    `more` goes to torchrun.
    """
    with tempfile.TemporaryDirectory(prefix="torchrun_") as logs:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={num_ranks}",
            *more,
        ]
        process = subprocess.Popen(
            [*command, "--log-dir", logs, "--redirects", "3", "run_pipeline.py", *arguments],
            cwd=ROOT,
            env={**os.environ, **_ENVIRONMENT, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        torchrun = Torchrun(process, Path(logs), num_ranks)
        try:
            yield torchrun
        finally:
            torchrun.kill()
            process.stdout.close()
            process.stderr.close()


def run_torchrun(
    num_ranks: int, *arguments: str, timeout_s: float = 120, env: Mapping[str, str] | None = None
) -> Finished:
    """Run `run_pipeline.py` on `num_ranks` ranks of this machine; all ranks' output in rank order."""
    with start_torchrun(num_ranks, *arguments, env=env) as torchrun:
        finished = torchrun.wait(timeout_s)
        return Finished(
            returncode=finished.returncode,
            stdout="".join(torchrun.rank_stdout(rank) for rank in range(num_ranks)),
            stderr="".join(torchrun.rank_stderr(rank) for rank in range(num_ranks)) + finished.stderr,
            wall_s=finished.wall_s,
        )


def run_alone(*arguments: str, timeout_s: float = 120, env: Mapping[str, str] | None = None) -> Finished:
    """Run `run_pipeline.py` in one process without torchrun, as `run_ranks` does."""
    return run_ranks([arguments], timeout_s=timeout_s, env=env, distributed=False)[0]


def run_ranks(
    arguments: Sequence[Sequence[str]],
    *,
    timeout_s: float = 120,
    env: Mapping[str, str] | None = None,
    distributed: bool = True,
) -> list[Finished]:
    """Run `run_pipeline.main` once per entry of `arguments`, as the ranks of one run; in rank order."""
    return call_on_ranks(
        len(arguments),
        _main,
        list(map(list, arguments)),
        timeout_s=timeout_s,
        env=env,
        distributed=distributed,
    )


def call_on_ranks(
    num_ranks: int,
    function: Callable[..., int | None],
    *arguments: Any,
    timeout_s: float = 120,
    env: Mapping[str, str] | None = None,
    distributed: bool = True,
) -> list[Finished]:
    """Call `function(rank, *arguments)` in forked processes; its return value is the exit code (None: 0)."""
    with _fork(num_ranks, function, arguments, env, distributed) as ranks:
        return ranks.wait(timeout_s)


@contextlib.contextmanager
def start_ranks(
    arguments: Sequence[Sequence[str]], *, env: Mapping[str, str] | None = None, distributed: bool = True
) -> Iterator[Ranks]:
    """Start what `run_ranks` runs; whatever is left at the end is killed."""
    with _fork(len(arguments), _main, (list(map(list, arguments)),), env, distributed) as ranks:
        yield ranks


class Ranks:
    """Forked ranks that may still be going on. `start(rank, attempt)` starts the process of one of them."""

    def __init__(self, num_ranks: int, start: Callable[[int, int], Any], folder: Path) -> None:
        self._start, self._folder = start, folder
        self._processes = [start(rank, 0) for rank in range(num_ranks)]
        self._attempts = [0] * num_ranks
        self._start_s = time.monotonic()

    def restart_failed(self) -> list[int]:
        """Start again whoever has ended with a failure, as a torchrun of its own would; returns these ranks."""
        failed = [rank for rank, process in enumerate(self._processes) if process.exitcode not in (None, 0)]
        for rank in failed:
            self._attempts[rank] += 1
            self._processes[rank] = self._start(rank, self._attempts[rank])
        return failed

    def rank_pids(self) -> dict[int, int]:
        """Process ids of the ranks that have not ended, by rank."""
        return {rank: process.pid for rank, process in enumerate(self._processes) if process.exitcode is None}

    def returncode(self, rank: int) -> int | None:
        """Of a rank that has ended; negative for a signal."""
        return self._processes[rank].exitcode

    def rank_stderr(self, rank: int) -> str:
        """What a rank has written to stderr so far."""
        return self._read(rank, "stderr")

    def rank_stdout(self, rank: int) -> str:
        return self._read(rank, "stdout")

    def wait(self, timeout_s: float) -> list[Finished]:
        """Wait for all ranks to end."""
        ended_s: dict[int, float] = {}
        while len(ended_s) < len(self._processes):
            for rank, process in enumerate(self._processes):
                if rank not in ended_s and process.exitcode is not None:
                    ended_s[rank] = time.monotonic() - self._start_s
            if time.monotonic() - self._start_s > allowed_s(timeout_s):
                left = self.rank_pids()
                self.kill()
                told = "\n".join(f"rank {rank}:\n{self.rank_stderr(rank)}" for rank in range(len(self._processes)))
                raise AssertionError(f"ranks {list(left)} did not end within {timeout_s} s\n{told}")
            time.sleep(0.02)
        return [
            Finished(
                returncode=process.exitcode,
                stdout=self._read(rank, "stdout"),
                stderr=self._read(rank, "stderr"),
                wall_s=ended_s[rank],
            )
            for rank, process in enumerate(self._processes)
        ]

    def kill(self) -> None:
        """End everything at once."""
        for process in self._processes:
            process.kill()
            process.join()

    def _read(self, rank: int, name: str) -> str:
        path = self._folder / f"{rank}.{name}"
        return path.read_text(errors="replace") if path.exists() else ""


@contextlib.contextmanager
def _fork(
    num_ranks: int,
    function: Callable[..., int | None],
    arguments: Sequence[Any],
    env: Mapping[str, str] | None,
    distributed: bool,
) -> Iterator[Ranks]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory(prefix="ranks_") as folder:
        port = _free_port()

        def start(rank: int, attempt: int) -> Any:
            variables = {**_ENVIRONMENT, "TORCHELASTIC_RESTART_COUNT": str(attempt)}
            if distributed:
                variables |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(num_ranks),
                    "LOCAL_WORLD_SIZE": str(num_ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            variables |= env or {}
            process = context.Process(target=_enter_rank, args=(rank, folder, variables, function, arguments))
            process.start()
            return process

        ranks = Ranks(num_ranks, start, Path(folder))
        try:
            yield ranks
        finally:
            ranks.kill()


@contextlib.contextmanager
def store_process() -> Iterator[tuple[Any, dict[str, str]]]:
    """A process that hosts a rendezvous store, as torchrun's agent does, and the variables that tell ranks of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    reader, writer = context.Pipe(duplex=False)
    host = context.Process(target=_host_store, args=(writer,), daemon=True)
    host.start()
    try:
        yield host, {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(reader.recv())}
    finally:
        host.kill()
        host.join()


def _host_store(writer: Any) -> None:
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    writer.send(store.port)
    time.sleep(3600)


def _enter_rank(
    rank: int,
    folder: str,
    variables: Mapping[str, str],
    function: Callable[..., int | None],
    arguments: Sequence[Any],
) -> None:
    """First thing in a forked process: output to files, environment, then `function`."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{folder}/{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.environ.update(variables)
    os.chdir(ROOT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests are a shell's background job
    sys.exit(function(rank, *arguments))


def _main(rank: int, arguments: Sequence[Sequence[str]]) -> int:
    import run_pipeline

    return run_pipeline.main(arguments[rank])


def _read(path: Path) -> bytes:
    """A file of /proc; nothing if its process has ended meanwhile."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
