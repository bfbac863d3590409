import os
import re
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest

from pipeline.config.schema import WandbConfig
from pipeline.evaluation.tracking import Tracker


@pytest.fixture(autouse=True)
def nothing_has_failed(monkeypatch):
    monkeypatch.setattr(Tracker, "has_failed", False)


def track(tmp_path, **settings):
    tracker = Tracker(WandbConfig(**settings), run_id="run", config={"batch_size": 1}, folder=tmp_path)
    tracker.log({"window_ppl": 3.0}, num_tokens=10)
    tracker.finish({"avg_ppl": 3.0})


def test_off_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    track(tmp_path)


@pytest.mark.slow
def test_offline_needs_no_account(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track(tmp_path, enabled=True, mode="offline")
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_failure_switches_it_off(tmp_path, monkeypatch, caplog, failing):
    def fail(*_, **__):
        raise OSError("no route to host")

    run = types.SimpleNamespace(
        log=lambda *_: None, finish=lambda **_: None, define_metric=lambda *_, **__: None, summary={}
    )
    calls = []
    settings = type("Settings", (), {"model_fields": ()})
    wandb = types.SimpleNamespace(init=lambda **_: calls.append(1) or run, Settings=settings)
    setattr(wandb if failing == "init" else run, failing, fail)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    track(tmp_path, enabled=True)
    track(tmp_path, enabled=True)  # the next point of a sweep
    assert caplog.text.count("W&B is switched off from here on: no route to host") == 1
    assert len(calls) == (failing != "init")


SWEEP = """
import logging, sys, time
from pathlib import Path
from pipeline.config.schema import WandbConfig
from pipeline.evaluation import tracking
import wandb
logging.basicConfig(level=logging.WARNING)
tracking._ANSWER_S = 3.0
start_s = time.monotonic()
for run_id in "abc":
    tracker = tracking.Tracker(WandbConfig(enabled=True), run_id=run_id, config={}, folder=Path(sys.argv[1]), group="g")
    tracker.log({"ppl": 1.0}, num_tokens=1)
    tracker.finish({"ppl": 1.0})
print(f"{time.monotonic() - start_s:.1f} s")
"""


@pytest.mark.slow
def test_a_server_that_never_answers_costs_one_bounded_wait(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    with socket.create_server(("127.0.0.1", 0)) as server:  # the system takes connections, and nobody answers
        server_settings = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "WANDB_API_KEY": "a" * 40}
        ended = subprocess.run(
            [sys.executable, "-c", SWEEP, str(tmp_path)],
            cwd=Path(__file__).parents[2],
            env={**os.environ, **server_settings, "WANDB_SILENT": "true"},
            capture_output=True,
            text=True,
            timeout=200,
        )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("W&B is switched off from here on") == 1
    (seconds,) = re.findall(r"^([0-9.]+) s$", ended.stdout, re.MULTILINE)
    assert float(seconds) < 3.0 + 30  # the bound, and W&B's own start on a busy machine; 300 without it
