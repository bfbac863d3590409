"""The checks of one GPU: their own code in small on the CPU, and what becomes of one that goes wrong."""

import json

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_checks import CHECKS, Skip

SLOW = ["four_ranks", "gpu_tests"]  # they start processes


def dry_run(folder, names):
    out = folder / "gpu.json"
    status = gpu_check.main(["--dry-run-cpu", "--out", str(out), "--only", *names])
    return status, json.loads(out.read_text())["checks"]


@pytest.mark.slow
def test_every_check_runs_in_small(tmp_path):
    names = [name for name in CHECKS if name not in SLOW]
    status, checks = dry_run(tmp_path, names)
    assert list(checks) == names
    states = {name: (outcome["state"], outcome.get("reason")) for name, outcome in checks.items()}
    needs_cuda = ("waits", "nccl", "contexts")
    assert states == {n: ("skip", "needs a CUDA device") if n in needs_cuda else ("pass", None) for n in names}
    assert status == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_checks_that_start_processes_run_in_small(tmp_path, name):
    status, checks = dry_run(tmp_path, [name])
    assert (status, checks[name]["state"]) == (0, "pass")


def test_a_check_that_goes_wrong_is_told_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def unequal(device, figures):
        figures["bytes"] = 3
        raise AssertionError("int8 differs")

    def raises(device, figures):
        raise RuntimeError("CUDA error: an illegal memory access")

    def skips(device, figures):
        raise Skip("needs two of them")

    def lacks(device, figures):
        import no_such_package  # noqa: F401

    for check in (unequal, raises, skips, lacks):
        monkeypatch.setitem(CHECKS, check.__name__, check)
    status, checks = dry_run(tmp_path, ["unequal", "raises", "skips", "lacks", "environment"])
    assert status == 1
    assert [outcome["state"] for outcome in checks.values()] == ["fail", "fail", "skip", "skip", "pass"]
    assert checks["unequal"] | {"wall_s": 0} == {
        "state": "fail", "reason": "int8 differs", "figures": {"bytes": 3}, "wall_s": 0
    }  # fmt: skip
    assert checks["raises"]["reason"] == "RuntimeError: CUDA error: an illegal memory access"
    assert "no_such_package" in checks["lacks"]["reason"]
    assert "1 passed, 2 failed, 2 skipped" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is meant")
def test_without_a_gpu(capsys, tmp_path, monkeypatch):
    assert gpu_check.main([]) == 2
    assert "no usable CUDA device" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # but not in the process that a check runs in
    out = tmp_path / "gpu.json"
    assert gpu_check.main(["--only", "environment", "--out", str(out)]) == 1
    outcome = json.loads(out.read_text())["checks"]["environment"]
    assert outcome["state"] == "fail" and outcome["reason"].startswith("exit code 2: error: no usable CUDA device")
