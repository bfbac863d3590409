"""Figures of runs on an emulated network: predicted, and tracked under its name."""

import json
import sys
import time
import types
from pathlib import Path

import pytest

from pipeline.records.store import read_any
from pipeline.report.generation_prediction import predicted_tpot_s
from pipeline.report.prediction import predicted_run_s
from tests.helpers.launch import call_on_ranks, run_ranks
from tests.helpers.tiny_models import tiny_arguments

FAR = ("--set", "links.delay=300ms", "--set", "links.rate=10mbit", "--set", "partition.num_nodes=2")


def run_tracked(rank, arguments, told):
    """`run_pipeline` with a W&B that writes down what it is told; what comes after the run takes long."""
    import run_pipeline
    from pipeline.evaluation import evaluation

    time_compress = evaluation.time_compress
    evaluation.time_compress = lambda *frame: (time.sleep(3), time_compress(*frame))[1]

    summary = {}

    def init(**options):
        def finish(**_):
            Path(told).write_text(json.dumps({"config": options["config"], "summary": summary}))

        return types.SimpleNamespace(
            log=lambda *_: None, define_metric=lambda *_, **__: None, summary=summary, finish=finish
        )

    settings = type("Settings", (), {"model_fields": ()})
    sys.modules["wandb"] = types.SimpleNamespace(init=init, Settings=settings)
    return run_pipeline.main(arguments)


def test_a_run_over_far_links_is_predicted_and_tracked_with_their_name(tmp_path):
    more = (*FAR, "--set", "runtime.in_flight=1", "--set", "wandb.enabled=true")
    arguments = tiny_arguments(tmp_path / "out", *more, num_tokens=128)
    for rank in call_on_ranks(2, run_tracked, arguments, str(tmp_path / "told")):
        rank.check()
    (path,) = (tmp_path / "out").glob("*.json")
    record = read_any(path)
    predicted_s = predicted_run_s(record)
    assert predicted_s > record.results.num_microbatches * 2 * 0.3
    assert predicted_s == pytest.approx(record.time_run_s, rel=0.3)  # the machine may be busy
    told = json.loads((tmp_path / "told").read_text())
    assert told["config"]["emulation"] == told["summary"]["emulation"] == "over 10 Mbit/s, 300 ms"
    assert told["summary"]["avg_ppl"] == record.results.avg_ppl


def test_generation_over_far_links_is_predicted(tmp_path):
    more = (*FAR, "--set", "generation.max_new_tokens=6", "--set", "generation.ignore_eos=true", "--generate", "a b")
    for rank in run_ranks([tiny_arguments(tmp_path, *more)] * 2):
        rank.check()
    (path,) = tmp_path.glob("*.json")
    record = read_any(path)
    assert predicted_tpot_s(record) == pytest.approx(record.results.tpot_s.median, rel=0.3)
    assert predicted_tpot_s(record) > 2 * 0.3
