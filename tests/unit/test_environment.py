"""What a run ran on, and how a report tells that points differ in it."""

import torch

from pipeline.comm.world import World
from pipeline.records.environment import environment_changes
from pipeline.report.html_page import html_page
from pipeline.report.recommendation import Outlook
from pipeline.report.results import read_results
from pipeline.report.text_page import csv_table, markdown_page
from pipeline.runtime.environment import gather_environment
from tests.helpers.records import losses, write_point


class Ranks:
    """A control whose other rank says the same but for `others`."""

    world = World()

    def __init__(self, **others):
        self.others = others

    def gather(self, own):
        return [own, {"1": own["0"] | self.others}]


def test_stages_that_differ_are_told_apart(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    alike = gather_environment(Ranks(), {0: torch.device("cpu")}, 2)
    assert alike["threads"] == "2" and alike["device"] == "cpu" and alike["variables"] == "MKL_CBWR=AVX2"
    assert {"torch", "transformers", "numpy", "cpu"} <= alike.keys()
    other = gather_environment(Ranks(threads="1", torch="2.12"), {0: torch.device("cpu")}, 2)
    assert other["threads"] == "2 at stage 0, 1 at stage 1"
    assert environment_changes(alike, alike) == ""
    changes = environment_changes(alike, other)
    assert changes.startswith("threads 2 at stage 0, 1 at stage 1, before 2; torch ")
    assert changes.endswith(f"before {alike['torch']}")


def test_a_report_tells_points_that_ran_on_something_else(tmp_path):
    write_point(tmp_path, environment={"threads": "1"})
    write_point(tmp_path, "int8", loss=losses(0.001), environment={"threads": "2"})
    write_point(tmp_path, "nf4", loss=losses(0.002), environment={"threads": "1"})
    write_point(tmp_path, "fp4", loss=losses(0.002))
    results = read_results([tmp_path])
    assert {p.label: p.elsewhere for p in results.points if p.elsewhere} == {"int8": "threads 2, before 1"}
    for shown in (html_page(results, Outlook()), markdown_page(results, Outlook()).replace("\\", "")):
        assert "int8 ran on something else than the uncompressed point, which may change its losses: threads 2" in shown
    assert csv_table(results).count("ran on something else") == 1
