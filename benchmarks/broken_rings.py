"""Break connections and kill ranks at random moments of a generation, and compare with an undisturbed one.

    python -m benchmarks.broken_rings --num_events 20 --seed 1
    python -m benchmarks.broken_rings --num_events 5 --seed 1 --by_torchrun

Four ranks answer prompts with a tiny random model in float64, codec `none`. At random moments either the TCP connection
between two neighbours is reset (`ss -K`, which needs root) or a rank, rank 0 among them, gets SIGKILL. Ranks are forked
and started again as a torchrun of their own would start each (`--nnodes=4 --nproc_per_node=1 --max_restarts`); the
rendezvous store is in a process of its own, as torchrun's is. With `--by_torchrun` one real torchrun has all four, so
that each kill restarts them all; connections are left alone.

Then every prompt must have one answer, with the token ids and the text of the undisturbed run. Prints a line per event
and a summary; exit code 1 if anything was not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from compressors.console import run_command
from pipeline.records.store import read_generation
from tests.helpers.launch import Ranks, Torchrun, run_ranks, start_ranks, start_torchrun, store_process
from tests.helpers.tiny_models import tiny_model

NUM_RANKS = 4
WORDS = "the canal lock keeper opens a gate and water falls from one level to the next".split()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Break rings while they generate, and check what comes of it.")
    parser.add_argument("--num_events", type=int, default=20)
    parser.add_argument("--num_prompts", type=int, default=50)
    parser.add_argument("--num_tokens", type=int, default=100, help="of each answer: how long the generation is")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--longest_s", type=float, default=3.0, help="between two events")
    parser.add_argument("--rejoin_s", type=float, default=120.0, help="runtime.rejoin_s of the run")
    parser.add_argument("--timeout_s", type=float, default=600.0, help="of the whole run")
    parser.add_argument("--keep_rank_0", action="store_true", help="never kill rank 0")
    parser.add_argument("--by_torchrun", action="store_true")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="broken_rings_") as name:
        folder = Path(name)
        prompts = write_prompts(folder / "prompts.jsonl", arguments.num_prompts, arguments.num_tokens)
        undisturbed = command(folder / "undisturbed", prompts, rejoin_s=0)
        for one in run_ranks([undisturbed] * NUM_RANKS, timeout_s=600):
            one.check()
        words = command(folder / "broken", prompts, rejoin_s=arguments.rejoin_s)
        start_s = time.monotonic()
        events = disturb_torchrun(words, arguments) if arguments.by_torchrun else disturb_ranks(words, arguments)
        wall_s = time.monotonic() - start_s
        faults = differences(folder / "undisturbed", folder / "broken", arguments.num_prompts)
        print(summary(events, folder / "broken", wall_s))
    print("\n".join(faults) or f"all {arguments.num_prompts} answers equal the undisturbed run's, each there once")
    if len(events) < arguments.num_events:
        faults.append(f"only {len(events)} events before the end: raise --num_tokens")
        print(faults[-1])
    return 1 if faults else 0


def write_prompts(path: Path, num_prompts: int, num_tokens: int) -> Path:
    """Every second one sampled, every third with log-probabilities."""
    chance = random.Random(0)
    lines = []
    for number in range(num_prompts):
        line: dict[str, Any] = {"prompt": " ".join(chance.choices(WORDS, k=chance.randint(1, 12)))}
        line["max_new_tokens"] = num_tokens
        line |= {"temperature": 0.9, "seed": number, "repetition_penalty": 1.2} if number % 2 else {"temperature": 0}
        line |= {"logprobs": 2} if number % 3 == 0 else {}
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")
    return path


def command(exp_dir: Path, prompts: Path, *, rejoin_s: float) -> list[str]:
    settings = (
        *("model.dtype=fp64", "generation.ignore_eos=true", "generation.max_length=400", "generation.max_slots=6"),
        *("generation.prefill_chunk=32", "runtime.threads=1", "runtime.timeout_s=30", f"runtime.rejoin_s={rejoin_s}"),
    )
    words = [word for setting in settings for word in ("--set", setting)]
    return ["--model_name", str(tiny_model()), "--exp_dir", str(exp_dir), *words, "--generate", str(prompts)]


def disturb_ranks(words: Sequence[str], arguments: argparse.Namespace) -> list[str]:
    """Until enough has happened; returns what, in words."""
    chance, events = random.Random(arguments.seed), []
    with store_process() as (_, env), start_ranks([list(words)] * NUM_RANKS, env=env) as ranks:
        _wait_until(lambda: "tokens/s" in ranks.rank_stderr(0), ranks)
        due_s, num_formed = time.monotonic(), 0
        end_s = time.monotonic() + arguments.timeout_s
        while pids := ranks.rank_pids():
            ranks.restart_failed()
            if time.monotonic() > end_s:
                told = "\n".join(f"rank {rank}: {ranks.rank_stderr(rank)[-1500:]}" for rank in range(NUM_RANKS))
                raise TimeoutError(f"the run did not end within {arguments.timeout_s} s; {sorted(pids)} live\n{told}")
            time.sleep(0.02)
            if num_formings(ranks) > num_formed:
                num_formed = num_formings(ranks)
                due_s = min(due_s, time.monotonic() + chance.uniform(0.0, arguments.longest_s))
            if time.monotonic() < due_s or len(events) == arguments.num_events or len(pids) < NUM_RANKS:
                continue
            event = kill(chance, pids, arguments) if chance.random() < 0.5 else break_connection(chance, pids, env)
            if event is not None:
                events.append(event)
                print(f"{len(events)}. {event}", flush=True)
                # One in four comes when it will, maybe before the ring is formed again.
                too_early = chance.random() < 0.25
                due_s = time.monotonic() + (chance.uniform(0.0, 10.0) if too_early else 300.0)
        for one in ranks.wait(60):
            one.check()
    return events


def disturb_torchrun(words: Sequence[str], arguments: argparse.Namespace) -> list[str]:
    chance, events = random.Random(arguments.seed), []
    more = (f"--max_restarts={arguments.num_events}",)
    with start_torchrun(NUM_RANKS, *words, more=more) as torchrun:
        while len(events) < arguments.num_events and torchrun.process.poll() is None:
            num_done = len(read_answers(Path(words[words.index("--exp_dir") + 1])))
            due = num_done + chance.randint(1, max(1, arguments.num_prompts // (arguments.num_events + 1)))
            folder = Path(words[words.index("--exp_dir") + 1])
            _wait_until(lambda due=due, folder=folder: len(read_answers(folder)) >= due, torchrun)
            if len(pids := torchrun.rank_pids()) == NUM_RANKS:
                events.append(f"{num_done} answers: {kill(chance, pids, arguments)}")
                print(f"{len(events)}. {events[-1]}", flush=True)
                _wait_until(lambda pids=pids: not set(pids.values()) & set(torchrun.rank_pids().values()), torchrun)
        torchrun.wait(600).check()
    return events


def num_formings(ranks: Ranks) -> int:
    """By all ranks' count together."""
    return sum(ranks.rank_stderr(rank).count("the ring goes on") for rank in range(NUM_RANKS))


def kill(chance: random.Random, pids: Mapping[int, int], arguments: argparse.Namespace) -> str:
    victim = chance.choice(sorted(pids)[arguments.keep_rank_0 :])
    os.kill(pids[victim], signal.SIGKILL)
    return f"rank {victim} killed"


def break_connection(chance: random.Random, pids: Mapping[int, int], env: Mapping[str, str]) -> str | None:
    """Reset those between two neighbours, that of all ranks' group and their own; None where none is there yet."""
    src = chance.choice(sorted(pids))
    dst = (src + 1) % NUM_RANKS
    try:
        ours, theirs = (psutil.Process(pids[rank]).net_connections("tcp4") for rank in (src, dst))
    except psutil.Error:
        return None
    far = {c.laddr for c in theirs if c.status == psutil.CONN_ESTABLISHED}
    ports = [c.laddr.port for c in ours if c.raddr in far and int(env["MASTER_PORT"]) not in (c.laddr[1], c.raddr[1])]
    if not ports:
        return None
    for port in ports:
        subprocess.run(["ss", "-K", "sport", "=", str(port)], check=True, capture_output=True)
    return f"the connections of ranks {src} and {dst} reset"


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """Whole lines."""
    found = [path.read_bytes() for path in folder.glob("answers-*.jsonl")]
    return [json.loads(line) for content in found for line in content.split(b"\n")[:-1]]


def differences(undisturbed: Path, broken: Path, num_prompts: int) -> list[str]:
    expected = {line["line"]: line for line in read_answers(undisturbed)}
    got = read_answers(broken)
    faults = [f"line {n}: {sum(a['line'] == n for a in got)} answers" for n in range(1, num_prompts + 1)
              if sum(a["line"] == n for a in got) != 1]
    for answer in got:
        for key in ("text", "token_ids", "finish_reason", "error"):
            if answer[key] != expected[answer["line"]][key]:
                faults.append(f"line {answer['line']}: {key} is {answer[key]}, not {expected[answer['line']][key]}")
    return faults


def summary(events: Sequence[str], folder: Path, wall_s: float) -> str:
    """What the last record says of it; a session that ended with rank 0 has none."""
    path = max(folder.glob("*-generation-*.json"), key=lambda path: path.stat().st_mtime)
    record = read_generation(path)
    told = record.interruptions
    assert told is not None
    return (
        f"{len(events)} events in {wall_s:.1f} s. The last session's record: {told.count} interruptions, "
        f"{told.pause_s:.1f} s of pauses, {told.tokens_prefilled_again} tokens prefilled again, "
        f"{record.results.num_requests} answers and {record.results.num_taken_over} taken over, "
        f"rank 0 started again: {told.started_again}"
    )


def _wait_until(condition: Any, run: Ranks | Torchrun, timeout_s: float = 300.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and (isinstance(run, Ranks) or run.process.poll() is None):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"the run did not come as far as expected within {timeout_s} s\n{run.rank_stderr(0)}")
        time.sleep(0.02)


if __name__ == "__main__":
    run_command(main)
