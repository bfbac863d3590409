"""Records of tasks, and what a report makes of several: changes sample by sample."""

import csv
import io
import statistics

import pytest
from pydantic import ValidationError

from pipeline.records.store import read_any
from pipeline.report.recommendation import Outlook
from pipeline.report.results import read_results
from pipeline.report.summary import print_summary, write_report
from pipeline.report.tasks import task_scores, tasks_tables
from tests.helpers.records import make_tasks_record, write_tasks_point


def test_a_record_is_read_back(tmp_path):
    record = make_tasks_record("a", "nf4", bits=4)
    assert read_any(write_tasks_point(tmp_path, "a", "nf4", bits=4)).tasks == record.tasks


def test_what_does_not_agree_is_refused():
    with pytest.raises(ValidationError, match="acc of a_task has 4 samples, the task 5"):
        make_tasks_record("a", tasks=[make_tasks_record("b").tasks[0].model_dump() | {"num_samples": 5}])
    links = {name: link.model_dump() for name, link in make_tasks_record("b").traffic_per_link.items()}
    name = next(iter(links))
    with pytest.raises(ValidationError, match=f"traffic_per_link.{name}.bits_per_value is 4.0, its counts give 32.0"):
        make_tasks_record("a", traffic_per_link={**links, name: links[name] | {"bits_per_value": 4.0}})
    with pytest.raises(ValidationError, match="tasks is empty"):
        make_tasks_record("a", tasks=[])


def test_changes_are_paired():
    """Their standard error is that of the samples' differences, much less than of two scores apart."""
    none, nf4 = (1.0, 0.0, 1.0, 1.0, 0.0), (1.0, 0.0, 0.0, 1.0, 0.0)
    records = [make_tasks_record("a", samples=none), make_tasks_record("b", "nf4", samples=nf4, bits=4)]
    before, after = task_scores(records)
    assert (before.change, before.change_stderr) == (None, None)
    assert after.change == pytest.approx(-0.2)
    assert after.change_stderr == pytest.approx(statistics.stdev([0, 0, -1, 0, 0]) / 5**0.5)
    assert (before.bits_per_value, after.bits_per_value) == (32, 4)
    (table,) = tasks_tables(records)
    assert table.headings == ["codec", "bits/value", "a_task acc"]
    assert table.rows == [
        ["none", "32.000", "0.6 ± 0.25"],
        ["nf4", "4.000", "0.4 ± 0.25 (-0.2 ± 0.2)"],
    ]


@pytest.mark.parametrize("other", [{"docs_sha256": "cd" * 32}, {"version": "7"}])
def test_other_documents_are_not_compared(other):
    others = make_tasks_record("b").tasks[0].model_dump() | other
    records = [make_tasks_record("a"), make_tasks_record("b", "nf4", tasks=[others])]
    assert [score.change for score in task_scores(records)] == [None, None]


def test_other_settings_have_tables_of_their_own():
    records = [make_tasks_record("a"), make_tasks_record("b", "nf4", harness={"num_fewshot": 5})]
    tables = tasks_tables(records)
    assert [table.title for table in tables] == [
        "[1] model fp32, lm_eval 0.4.13",
        "[2] model fp32, lm_eval 0.4.13, 5 examples",
    ]
    assert [score.change for score in task_scores(records)] == [None, None]


def test_weights_that_were_held_differently_have_tables_of_their_own():
    blocks = {"types": ["Q4_1"], "made_at_load": True}
    records = [
        make_tasks_record("a"),
        make_tasks_record("b", "nf4", model={"blocks": blocks}),
        make_tasks_record("c", args={"load_in_8bit": True}),
    ]
    assert [table.title for table in tasks_tables(records)] == [
        "[1] model fp32, lm_eval 0.4.13",
        "[2] model fp32, Q4_1 blocks made at load, lm_eval 0.4.13",
        "[3] model fp32 8-bit weights, lm_eval 0.4.13",
    ]
    assert [score.change for score in task_scores(records)] == [None] * 3


def test_console_page_markdown_and_csv(tmp_path, capsys):
    write_tasks_point(tmp_path, "a")
    write_tasks_point(tmp_path, "b", "nf4", bits=4, samples=(1.0, 0.0, 0.0, 1.0))
    print_summary([tmp_path])
    cell = "0.5 ± 0.25 (-0.25 ± 0.25)"
    shown = capsys.readouterr()
    assert cell in shown.out and "perplexity" not in shown.out and not shown.err
    write_report([tmp_path], tmp_path / "report.html", Outlook())
    assert cell in (tmp_path / "report.html").read_text() and cell in (tmp_path / "report.md").read_text()
    lines = list(csv.DictReader(io.StringIO((tmp_path / "report.tasks.csv").read_text())))
    assert [(line["codec"], line["score"], line["change"]) for line in lines] == [
        ("none", "0.75", ""),
        ("nf4", "0.5", "-0.25"),
    ]
    assert len(read_results([tmp_path]).tasks) == 2
