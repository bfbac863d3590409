import sys
import types

import pytest

from pipeline.config.schema import WandbConfig
from pipeline.evaluation.tracking import Tracker


def track(tmp_path, **settings):
    tracker = Tracker(WandbConfig(**settings), run_id="run", config={"batch_size": 1}, folder=tmp_path)
    tracker.log({"window_ppl": 3.0}, num_tokens=10)
    tracker.finish({"avg_ppl": 3.0})


def test_off_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    track(tmp_path)


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
    wandb = types.SimpleNamespace(init=lambda **_: run)
    setattr(wandb if failing == "init" else run, failing, fail)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    track(tmp_path, enabled=True)
    assert "W&B is switched off for this run: no route to host" in caplog.text
