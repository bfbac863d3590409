"""What codecs cost on three small tasks of lm-evaluation-harness: scores, and changes sample by sample.

    python -m benchmarks.task_scores --text wiki.test.raw --calibration calib/ --out build/task_scores

Makes the tasks (`make_tasks`), runs them as a sweep on four ranks by the command that a user types, and writes a JSON
with all scores, bits per value and bytes per token, and a table. The calibration is klt's, for the demo's model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.make_tasks import TASKS, write_tasks
from compressors.console import run_command
from compressors.user_files import read_text
from pipeline.config.options import OptionParser, path_option
from pipeline.config.schema import DEMO_MODEL
from pipeline.records.files import write_json
from pipeline.report.results import load_tasks
from pipeline.report.tasks import TasksTable, task_scores, tasks_tables

NUM_RANKS = 4
CODECS = (
    *("none", "int8", "nf4", "mxfp4", "hadamard(int4)", "topk(density=0.25)"),
    *(f"klt(calibration={{calibration}}, step={step})" for step in (0.4, 0.7)),
)
SEED = 0
SETTINGS = ("generation.max_length=512", "generation.max_slots=16", "generation.prefill_chunk=256")


def main(argv: Sequence[str] | None = None) -> int:
    parser = OptionParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=path_option, required=True, help="a raw file of WikiText")
    parser.add_argument("--calibration", type=path_option, required=True, help="of klt, for the demo's model")
    parser.add_argument("--out", type=path_option, required=True, help="a folder")
    parser.add_argument("--samples", type=int, default=200, help="of each task")
    arguments = parser.parse_args(argv)
    out, tasks = arguments.out, arguments.out / "tasks"
    out.mkdir(parents=True, exist_ok=True)
    write_tasks(read_text(arguments.text, f"--text {arguments.text}"), tasks, arguments.samples, SEED)
    points = [{"compressor": codec.format(calibration=arguments.calibration)} for codec in CODECS]
    sweep = out / "task_scores.yaml"
    sweep.write_text(json.dumps({"name": "task_scores", "points": points}), encoding="utf-8")
    run_sweep(sweep, tasks, out / "records")
    records = load_tasks([out / "records"])
    rows = [_row(dataclasses.asdict(score)) for score in task_scores(records)]
    content = {
        "kind": "thinwire task scores",
        "model": DEMO_MODEL,
        "num_ranks": NUM_RANKS,
        "samples": arguments.samples,
        "seed": SEED,
        "settings": SETTINGS,
        "versions": dict(records[0].versions),
        "task_scores": rows,
    }
    write_json(out / "tasks.json", content)
    for table in tasks_tables(records):
        print(_markdown(table))
    return 0


def run_sweep(sweep: Path, tasks: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={NUM_RANKS}"]
    command += ["run_pipeline.py", "--config", "demo.yaml", "--exp_dir", str(folder), "--sweep", str(sweep)]
    command += ["--lm_eval", ",".join(TASKS), "--lm_eval_tasks", str(tasks)]
    command += [word for setting in SETTINGS for word in ("--set", setting)]
    done = subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise SystemExit("the sweep has failed")


def _row(score: dict[str, Any]) -> dict[str, Any]:
    """Without what names this machine or this run."""
    codec = re.sub(r"calibration=[^,)]*, ", "", score["codec"])
    return {key: value for key, value in score.items() if key not in ("setting", "run_id")} | {"codec": codec}


def _markdown(table: TasksTable) -> str:
    lines = [table.headings, ["---"] * len(table.headings), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    run_command(main)
