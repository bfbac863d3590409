"""Kill one of four ranks at a random moment, again and again, and check how the run ends and how it resumes.

    python -m benchmarks.kill_ranks --num_kills 20 --seed 1
    python -m benchmarks.kill_ranks --num_kills 20 --seed 1 --without_torchrun

Each kill starts a run of a tiny random model and sends SIGKILL or SIGSTOP to a random rank at a random moment
of loading or running. Then:

* every live rank prints exactly one last message, which names the victim, and exits non-zero in time;
* no process is left. A stopped rank is continued in half of the cases, and has to end by itself then;
  otherwise torchrun kills it after its 30 s;
* `--resume` ends with the results, traffic and per-token losses of an uninterrupted run.

Without torchrun, ranks are forked with imports done, rank 0 hosts the rendezvous store, and nobody sends
SIGTERM to the survivors: what a rank's end looks like from another machine.

Prints a line per kill and a summary with the slowest exit; exit code 1 if anything was not as it should be.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compressors.console import run_command
from pipeline.records.store import read_per_token, read_record
from tests.helpers.launch import Finished, Ranks, Torchrun, start_ranks, start_torchrun
from tests.helpers.patience import allowed_s
from tests.helpers.tiny_models import tiny_arguments

NUM_RANKS = 4
SLACK_S = 5.0  # that the contract allows beyond the timeout, on a quiet machine
TORCHRUN_KILLS_S = 30.0
SIGTERM_IS_CAUGHT = 1 << (signal.SIGTERM - 1)
LAST_MESSAGE = re.compile(r"^rank (\d+) stops: (.*?)(?:; finished micro-batches are kept.*)?$", re.MULTILINE)
RESULT_KEYS = ("results", "traffic_totals", "traffic_per_link")


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A signal to a rank; `moment` is a fraction of the usual loading time, or of the micro-batches."""

    victim: int
    signal: signal.Signals
    continued: bool
    loading: bool
    moment: float

    def __str__(self) -> str:
        name = self.signal.name + ("+SIGCONT" if self.continued else "")
        phase = "loading" if self.loading else "running"
        return f"{name} to rank {self.victim} at {self.moment:.2f} of {phase}"


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An uninterrupted run: seconds until the first result, from there to the end, and the outcome."""

    load_s: float
    run_s: float
    num_microbatches: int
    outcome: dict[str, Any]
    losses: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a kill went. `exits_s` are the live ranks' seconds from the signal to their end."""

    exits_s: list[float]
    limit_s: float
    cause: str
    num_finished: int
    faults: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill ranks at random moments and check what happens.")
    parser.add_argument("--num_kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without_torchrun", action="store_true")
    parser.add_argument("--timeout_s", type=float, default=6.0, help="runtime.timeout_s of the runs")
    parser.add_argument("--load_timeout_s", type=float, default=30.0, help="runtime.load_timeout_s of the runs")
    parser.add_argument("--num_tokens", type=int, default=20000, help="of the text: how long a run is")
    arguments = parser.parse_args(argv)
    chance = random.Random(arguments.seed)
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="kill_ranks_") as folder:
        bench = Bench(
            timeout_s=arguments.timeout_s,
            load_timeout_s=arguments.load_timeout_s,
            num_tokens=arguments.num_tokens,
            by_torchrun=not arguments.without_torchrun,
        )
        reference = bench.run_uninterrupted(Path(folder) / "uninterrupted")
        print(f"uninterrupted: {reference.load_s:.1f} s loading, {reference.run_s:.1f} s running", flush=True)
        while len(verdicts) < arguments.num_kills:
            kill = draw(chance)
            exp_dir = Path(folder) / str(len(verdicts))
            verdict = bench.try_kill(kill, reference, exp_dir)
            if verdict is None:
                print(f"{kill}: the run was over before; drawn again", flush=True)
                continue
            verdict.faults.extend(bench.check_resume(exp_dir, reference))
            verdicts.append(verdict)
            outcome = "; ".join(verdict.faults) or "as it should be"
            print(
                f"{len(verdicts)}. {kill}: exits after {', '.join(f'{s:.1f}' for s in verdict.exits_s)} s "
                f"(limit {verdict.limit_s:g}), {verdict.num_finished} micro-batches kept: {outcome}\n"
                f"   {verdict.cause}",
                flush=True,
            )
    print(summary(verdicts))
    return 1 if any(verdict.faults for verdict in verdicts) else 0


def draw(chance: random.Random) -> Kill:
    kind = chance.choice((signal.SIGKILL, signal.SIGSTOP))
    return Kill(
        victim=chance.randrange(NUM_RANKS),
        signal=kind,
        continued=kind is signal.SIGSTOP and chance.random() < 0.5,
        loading=chance.random() < 0.3,
        moment=chance.random(),
    )


def summary(verdicts: Sequence[Verdict]) -> str:
    slowest = max((max(v.exits_s) - v.limit_s, max(v.exits_s), v.limit_s) for v in verdicts)
    bad = sum(bool(v.faults) for v in verdicts)
    return (
        f"{len(verdicts)} kills, {bad} not as they should be; slowest exit relative to its limit: "
        f"{slowest[1]:.1f} s of {slowest[2]:g} s"
    )


class Bench:
    """Runs of one config, each in a folder of its own."""

    def __init__(self, *, timeout_s: float, load_timeout_s: float, num_tokens: int, by_torchrun: bool) -> None:
        self._timeout_s, self._load_timeout_s = timeout_s, load_timeout_s
        self._num_tokens, self._by_torchrun = num_tokens, by_torchrun

    def run_uninterrupted(self, exp_dir: Path) -> Reference:
        with self._start(exp_dir) as run:
            _wait_until(lambda: _num_watching(run) == NUM_RANKS)
            start_s = time.monotonic()
            _wait_until(lambda: _num_finished(exp_dir) > 0)
            running_s = time.monotonic()
            _check(run.wait(300))
            end_s = time.monotonic()
        (path,) = exp_dir.glob("*.json")
        outcome = _outcome(path)
        return Reference(
            load_s=running_s - start_s,
            run_s=end_s - running_s,
            num_microbatches=outcome["results"]["num_microbatches"],
            outcome=outcome,
            losses=_losses(path),
        )

    def try_kill(self, kill: Kill, reference: Reference, exp_dir: Path) -> Verdict | None:
        """Carry out one kill; None if the run ended before the moment came."""
        faults: list[str] = []
        with self._start(exp_dir) as run:
            _wait_until(lambda: _num_watching(run) == NUM_RANKS)
            if kill.loading:
                time.sleep(kill.moment * reference.load_s)
            else:
                due = max(1, int(kill.moment * reference.num_microbatches))
                _wait_until(lambda: _num_finished(exp_dir) >= due or any(exp_dir.glob("*.json")))
            pids = run.rank_pids()
            if len(pids) < NUM_RANKS:
                _check(run.wait(60))
                return None
            os.kill(pids[kill.victim], kill.signal)
            start_s = time.monotonic()
            live = {rank: pid for rank, pid in pids.items() if rank != kill.victim}
            exits_s = _wait_for_exits(live, start_s, self._load_timeout_s + 2 * allowed_s(SLACK_S))
            if kill.continued:
                os.kill(pids[kill.victim], signal.SIGCONT)
                _wait_for_exits({kill.victim: pids[kill.victim]}, start_s, self._timeout_s + 2 * allowed_s(SLACK_S))
            elif kill.signal is signal.SIGSTOP and not self._by_torchrun:
                os.kill(pids[kill.victim], signal.SIGKILL)
            codes = _return_codes(run.wait(300))
            messages = {rank: LAST_MESSAGE.findall(run.rank_stderr(rank)) for rank in pids}
        if not any(messages[rank] or codes.get(rank) for rank in live):
            return None  # the victim had done its part
        if kill.continued and len(messages[kill.victim]) != 1:
            faults.append(f"the continued rank printed {len(messages[kill.victim])} last messages")
        faults += [f"{process} exits with 0" for process, code in codes.items() if code == 0]
        left = [pid for pid in pids.values() if _is_running(pid)]
        if left:
            faults.append(f"processes {left} are left")
        for rank in live:
            found = messages[rank]
            if len(found) != 1 or int(found[0][0]) != rank:
                faults.append(f"rank {rank} printed {len(found)} last messages")
            elif f"rank {kill.victim}" not in found[0][1]:
                faults.append(f"rank {rank} names another cause: {found[0][1]}")
        causes = sorted({cause for rank in live for _, cause in messages[rank]})
        # A rank that has not joined yet is waited for as long as loading may take.
        limit_s = allowed_s(SLACK_S) + (self._load_timeout_s if "not started" in " ".join(causes) else self._timeout_s)
        if max(exits_s) > limit_s:
            faults.append("too slow")
        return Verdict(
            exits_s=exits_s,
            limit_s=limit_s,
            cause=" | ".join(causes),
            num_finished=_num_finished(exp_dir),
            faults=faults,
        )

    def check_resume(self, exp_dir: Path, reference: Reference) -> list[str]:
        """Resume a killed run; what is wrong with the outcome, in words."""
        with self._start(exp_dir, "--resume") as run:
            finished = run.wait(300)
            if any(_return_codes(finished).values()):
                return [f"--resume failed: {run.rank_stderr(0)[-2000:]}"]
        faults = []
        for path in exp_dir.glob("*.json"):  # two, if the kill came after the record was written
            outcome = _outcome(path)
            faults += [f"{key} differs after --resume" for key in RESULT_KEYS if outcome[key] != reference.outcome[key]]
            if not np.array_equal(_losses(path), reference.losses):
                faults.append("losses differ after --resume")
        if list(exp_dir.glob("*.journal")):
            faults.append("a journal is left")
        return faults

    def _start(self, exp_dir: Path, *more: str) -> AbstractContextManager[Torchrun | Ranks]:
        timeouts = (f"runtime.timeout_s={self._timeout_s}", f"runtime.load_timeout_s={self._load_timeout_s}")
        overrides = [word for override in timeouts for word in ("--set", override)]
        arguments = tiny_arguments(exp_dir, *overrides, *more, num_tokens=self._num_tokens)
        if self._by_torchrun:
            return start_torchrun(NUM_RANKS, *arguments)
        return start_ranks([arguments] * NUM_RANKS)


def _return_codes(finished: Finished | Sequence[Finished]) -> dict[int | str, int]:
    """By rank, or torchrun's."""
    if isinstance(finished, Finished):
        return {"torchrun": finished.returncode}
    return {rank: one.returncode for rank, one in enumerate(finished)}


def _check(finished: Finished | Sequence[Finished]) -> None:
    for one in [finished] if isinstance(finished, Finished) else finished:
        one.check()


def _wait_until(condition: Callable[[], bool], timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + allowed_s(timeout_s)
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the run did not come as far as expected within {timeout_s} s")
        time.sleep(0.02)


def _wait_for_exits(pids: dict[int, int], start_s: float, timeout_s: float) -> list[float]:
    """Seconds from `start_s` to the end of each process, or `timeout_s` for one that does not end."""
    ended: dict[int, float] = {}
    while len(ended) < len(pids) and time.monotonic() - start_s < timeout_s:
        for rank, pid in pids.items():
            if rank not in ended and not _is_running(pid):
                ended[rank] = time.monotonic() - start_s
        time.sleep(0.01)
    return [ended.get(rank, timeout_s) for rank in sorted(pids)]


def _num_watching(run: Torchrun | Ranks) -> int:
    """Ranks that have come so far as to catch SIGTERM."""
    return sum(_catches_sigterm(pid) for pid in run.rank_pids().values())


def _catches_sigterm(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) & SIGTERM_IS_CAUGHT)


def _is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _num_finished(exp_dir: Path) -> int:
    return sum(path.read_bytes().count(b'{"finished"') for path in exp_dir.glob("*.journal"))


def _outcome(path: Path) -> dict[str, Any]:
    return read_record(path).model_dump(mode="json", include=set(RESULT_KEYS))


def _losses(path: Path) -> np.ndarray:
    return read_per_token(path)["loss"]


if __name__ == "__main__":
    run_command(main)
