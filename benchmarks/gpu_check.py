"""Everything that one GPU can show, in one command: a table on the screen and a dated JSON.

    python -m benchmarks.gpu_check                  # docs/results/gpu_<date>.json
    python -m benchmarks.gpu_check --only codecs    # one check, or several
    python -m benchmarks.gpu_check --dry-run-cpu    # the checks' own code, in small, on a machine without a GPU

Each check (`benchmarks.gpu_checks`) runs in a process of its own and ends with pass, fail or skip and the reason; a
missing package skips what needs it. The JSON is rewritten after each, so that what an interruption leaves is kept.
Fails (exit code 1) where a number that must be equal is not, or a check raises; times and bytes are only taken down.
Everything takes some minutes on an H100. Without a GPU the exit code is 2.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_checks import CHECKS, Skip
from compressors.console import run_command
from pipeline.config.options import path_option

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent
CHECK_TIMEOUT_S = 180
WIDEST_FIGURE = 100


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parse(argv)
    cpu = arguments.dry_run_cpu
    if not cpu and not torch.cuda.is_available():
        print(
            "error: no usable CUDA device (torch.cuda.is_available() is False); gpu-check shows what a GPU does. "
            "--dry-run-cpu runs the checks' own code in small on this machine",
            file=sys.stderr,
        )
        return 2
    if arguments.one:
        print(json.dumps(_run(arguments.one, cpu)))
        return 0
    started_at = datetime.datetime.now(datetime.timezone.utc)
    out = arguments.out or ROOT / "docs" / "results" / f"gpu_{started_at:%Y-%m-%d}.json"
    record: dict[str, Any] = {
        "started_at": started_at.isoformat(timespec="seconds"),
        "commit": _commit(),
        "dry_run_cpu": cpu,
        "checks": {},
    }
    for name in arguments.only or CHECKS:
        start_s = time.monotonic()
        outcome = _run(name, cpu) if cpu else _run_apart(name)
        record["checks"][name] = outcome | {"wall_s": round(time.monotonic() - start_s, 1)}
        _print(name, record["checks"][name])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
    states = [outcome["state"] for outcome in record["checks"].values()]
    print(f"{states.count('pass')} passed, {states.count('fail')} failed, {states.count('skip')} skipped: {out}")
    return 1 if "fail" in states else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=path_option, help="default: docs/results/gpu_<date>.json")
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK", help=", ".join(CHECKS))
    parser.add_argument("--dry-run-cpu", action="store_true", help="the checks' own code in small, without a GPU")
    parser.add_argument("--one", choices=CHECKS, help=argparse.SUPPRESS)  # what the other processes are started with
    return parser.parse_args(argv)


def _run(name: str, cpu: bool) -> dict[str, Any]:
    """A check in this process: state, reason where it did not pass, figures."""
    device = torch.device("cpu") if cpu else torch.device("cuda", 0)
    figures: dict[str, Any] = {}
    try:
        CHECKS[name](device, figures)
    except Skip as e:
        return {"state": "skip", "reason": str(e), "figures": figures}
    except ImportError as e:
        return {"state": "skip", "reason": f"needs a package that is not here: {e}", "figures": figures}
    except AssertionError as e:
        return {"state": "fail", "reason": str(e), "figures": figures}
    except Exception as e:
        traceback.print_exc()
        return {"state": "fail", "reason": f"{type(e).__name__}: {e}", "figures": figures}
    return {"state": "pass", "figures": figures}


def _run_apart(name: str) -> dict[str, Any]:
    """A check in a process of its own: its context, its memory, its crash."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--one", name]
    with tempfile.TemporaryFile("w+") as stderr:
        try:
            ended = subprocess.run(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                timeout=CHECK_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"state": "fail", "reason": f"hung: not done within {CHECK_TIMEOUT_S} s", "figures": {}}
        lines = ended.stdout.strip().splitlines()
        if ended.returncode == 0 and lines:
            return json.loads(lines[-1])
        stderr.seek(0)
        tail = " | ".join(stderr.read().strip().splitlines()[-3:])
        return {"state": "fail", "reason": f"exit code {ended.returncode}: {tail}", "figures": {}}


def _print(name: str, outcome: dict[str, Any]) -> None:
    print(f"{outcome['state']:5}{name:24}{outcome['wall_s']:6.1f} s  {outcome.get('reason', '')}")
    for key, value in outcome["figures"].items():
        print(f"       {key:40} {_figure(value)}", flush=True)


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_figure(inner)}" for key, inner in value.items())
    text = str(value)
    return text if len(text) <= WIDEST_FIGURE else text[: WIDEST_FIGURE - 3] + "..."


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return ended.stdout.strip() or None


if __name__ == "__main__":
    run_command(main)
