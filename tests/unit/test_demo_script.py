"""torchrun_scripts/cpu_demo.sh with stand-ins for torchrun and python that write down how they were called."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config.reading import load_config
from pipeline.config.sweep_file import find_sweep, load_sweep

ROOT = Path(__file__).parents[2]
FOLDER = "results/cpu_demo"
CALIBRATION = f"{FOLDER}/calibration"

# Ctrl-C is ignored by all that a shell's background job starts, the tests among it.
FOREGROUND = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp("sh", ["sh", "torchrun_scripts/cpu_demo.sh"])
"""

STAND_IN = """#!/bin/sh
echo "$(basename "$0") OMP_NUM_THREADS=$OMP_NUM_THREADS $*" >>calls
case "$*" in *"$FAILS"*) exit 1 ;; esac
while [ $# -gt 1 ]; do
    case "$1" in
    --out) mkdir -p "$2" && : >"$2/link.safetensors" ;;
    --png) : >"$2" ;;
    esac
    shift
done
"""


@pytest.fixture
def clone(tmp_path):
    """A folder with the scripts alone, and stand-ins on a PATH of their own."""
    shutil.copytree(ROOT / "torchrun_scripts", tmp_path / "torchrun_scripts")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name in ("torchrun", "python"):
        (bin_folder / name).write_text(STAND_IN)
        (bin_folder / name).chmod(0o755)
    return tmp_path


def run_demo(clone, *, fails="nothing", **environment):
    (clone / "calls").unlink(missing_ok=True)
    environment = {"PATH": f"{clone / 'bin'}:/usr/bin:/bin", "FAILS": fails} | environment
    finished = subprocess.run(
        ["sh", "torchrun_scripts/cpu_demo.sh"], cwd=clone, env=environment, capture_output=True, text=True
    )
    calls = clone / "calls"
    return finished, calls.read_text().splitlines() if calls.exists() else []


def test_it_calibrates_sweeps_generates_and_draws(clone):
    finished, calls = run_demo(clone)
    assert finished.returncode == 0 and not finished.stderr
    assert [call.split()[0] for call in calls] == ["python", "torchrun", "torchrun", "python"]
    assert "-m pipeline.calibrate --config demo.yaml --set dataset.split=validation" in calls[0]
    assert f"--sweep demo.yaml --exp_dir {FOLDER}" in calls[1]
    assert f"klt(calibration={CALIBRATION}, " in calls[2] and "--generate The canal" in calls[2]
    assert all("OMP_NUM_THREADS=1 " in call for call in calls)
    assert (clone / CALIBRATION / "link.safetensors").is_file()
    assert all(line.startswith(("==> ", "    ")) for line in finished.stdout.splitlines())


def test_a_finished_demo_starts_over(clone):
    run_demo(clone)
    (clone / FOLDER / "old.json").write_text("{}")
    _, calls = run_demo(clone)
    assert len(calls) == 4 and not (clone / FOLDER / "old.json").exists()


@pytest.mark.parametrize(("fails", "num_left"), [("calibrate", 4), ("run_pipeline", 3), ("report", 3)])
def test_an_interrupted_demo_goes_on(clone, fails, num_left):
    finished, _ = run_demo(clone, fails=fails)
    assert finished.returncode != 0
    assert finished.stderr == "==> not finished; the same command goes on from here\n"
    (clone / FOLDER / "old.json").write_text("{}")
    finished, calls = run_demo(clone)
    assert finished.returncode == 0 and len(calls) == num_left
    assert "interrupted" in finished.stdout and (clone / FOLDER / "old.json").exists()


@pytest.mark.slow
def test_ctrl_c_says_that_it_goes_on(clone):
    (clone / "bin" / "python").write_text("#!/bin/sh\nexec sleep 20\n")
    environment = {"PATH": f"{clone / 'bin'}:/usr/bin:/bin", "FAILS": "nothing"}
    process = subprocess.Popen(
        [sys.executable, "-c", FOREGROUND],
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout.readline().startswith(b"==> calibrating")
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=15)[1].endswith(b"==> not finished; the same command goes on from here\n")
    assert process.returncode != 0


def test_the_threads_are_the_users_if_set(clone):
    _, calls = run_demo(clone, OMP_NUM_THREADS="2")
    assert all("OMP_NUM_THREADS=2 " in call for call in calls)


@pytest.mark.parametrize("script", ["cpu_demo.sh", "four_gpus.sh", "token_importance.sh"])
def test_without_torchrun(clone, script):
    (clone / "bin" / "torchrun").unlink()
    command = ["sh", f"torchrun_scripts/{script}", "demo_importance.yaml"]
    finished = subprocess.run(
        command, cwd=clone, env={"PATH": f"{clone / 'bin'}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: no torchrun on PATH; run make demo")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(clone):
    clone.chmod(0o555)
    finished, _ = run_demo(clone)
    clone.chmod(0o755)
    assert finished.returncode == 1 and f"error: cannot write to {FOLDER}" in finished.stderr


def test_its_sweep_uses_the_calibration_that_it_makes():
    sweep = load_sweep(find_sweep("demo.yaml"))
    specs = [dict(point.overrides)["compressor"] for point in sweep.points([])]
    assert specs[:4] == ["none", "int8", "nf4", "hadamard(int4)"]
    assert specs[4].startswith(f"klt(calibration={CALIBRATION},")
    assert load_config(ROOT / "configs" / "demo.yaml").dataset.name == "pydoc"
