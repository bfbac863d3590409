"""Records of every version are read: samples of what the first release wrote, and of version 1 as it was last.

`records/first_release.json` was written by that release's own writer, its figures put together by hand.
`last_of_version_1.json` is a run's, edited so that it looks resumed, `generation_1.json` a run's, shortened;
`failed_point_1.json` was written by hand.
"""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.records.migrations import lift
from pipeline.records.run_record import RunRecord
from pipeline.records.store import read_failure, read_generation, read_record, write_record
from pipeline.report.html_page import html_page
from pipeline.report.recommendation import Outlook
from pipeline.report.results import read_results, setting_key
from tests.helpers.records import make_record, write_generation_point, write_point, write_tasks_point

SAMPLES = Path(__file__).parent / "records"


def test_what_the_first_release_wrote():
    record = read_record(SAMPLES / "first_release.json")
    assert (record.schema_version, record.kind) == (5, "thinwire run")
    assert record.results.avg_ppl == pytest.approx(22.7599)
    assert record.traffic_totals.total_bytes == 2 * 56 * 580 and record.traffic_per_link.keys() == record.codecs.keys()
    # What was not measured is null, what did not exist took no time, what was fixed is said.
    assert record.finished_at is record.one_token is record.reconstruction is record.environment is None
    assert record.traffic_other is record.codecs_decode is record.resumed.environments is None
    assert [rank.warm_up_s for rank in record.ranks] == [rank.pss_bytes for rank in record.ranks] == [None, None]
    assert {(s.importance_s, s.measure_s, s.head_s) for s in record.stages.values()} == {(0.0, 0.0, 0.0)}
    assert record.args.config.model.load_in_8bit_threshold == 6.0
    assert (record.protocol.mode, record.protocol.decode_chunk, record.importance) == ("window", None, {})
    assert record.args.config.importance.seed is None
    assert record.timed_tokens == 56 and record.model.blocks is None


def test_tokens_that_a_resumed_run_has_timed_are_not_made_up(tmp_path):
    value = json.loads((SAMPLES / "first_release.json").read_text())
    value["resumed"]["num_sessions"] = 2
    (tmp_path / "resumed.json").write_text(json.dumps(value))
    assert read_record(tmp_path / "resumed.json").timed_tokens is None
    (point,) = read_results([tmp_path]).points
    assert point.costs is None


def test_the_last_of_version_1_keeps_all_that_it_has():
    value = json.loads((SAMPLES / "last_of_version_1.json").read_text())
    record = read_record(SAMPLES / "last_of_version_1.json")
    assert record.resumed.environments[1].others["threads"] == "2" and record.one_token.cached_tokens == 16
    _check_kept(value, record.model_dump(mode="json"))


def test_generation_and_failed_points_of_version_1():
    value = json.loads((SAMPLES / "generation_1.json").read_text())
    record = read_generation(SAMPLES / "generation_1.json")
    assert record.interruptions is record.drafts is None
    assert {(r.num_passes, r.num_drafts_accepted) for r in record.requests} == {(None, None)}
    assert record.requests[0].tpot_s.p95 == pytest.approx(0.11826, rel=1e-3)
    _check_kept(value, record.model_dump(mode="json"))
    failure = read_failure(SAMPLES / "failed_point_1.json")
    assert (failure.label, failure.args["point"]) == ("nf5", {"compressor": "nf5"})


def test_generation_of_version_3_had_no_drafts(tmp_path):
    path = write_generation_point(tmp_path, "g")
    newest = json.loads(path.read_text())
    old = json.loads(path.read_text()) | {"schema_version": 3}
    del old["drafts"]
    for request in old["requests"]:
        del request["num_passes"], request["num_drafts_accepted"]
    lifted = lift(old)
    assert lifted["drafts"] is None and lifted.keys() == newest.keys()
    expected = [r | {"num_passes": None, "num_drafts_accepted": None} for r in newest["requests"]]
    assert lifted["requests"] == expected
    path.write_text(json.dumps(lifted))
    assert read_generation(path).requests[0].num_passes is None


@pytest.mark.parametrize("write", [write_point, write_generation_point, write_tasks_point])
def test_no_weights_of_version_4_were_blocks(write, tmp_path):
    path = write(tmp_path, "g")
    newest = json.loads(path.read_text())
    old = json.loads(path.read_text()) | {"schema_version": 4}
    del old["model"]["blocks"]
    assert lift(old) == newest and newest["model"]["blocks"] is None


def _check_kept(old, new, place=""):
    """Every value of `old` but the version is where it was."""
    for key, value in old.items():
        here = f"{place}.{key}"
        if isinstance(value, dict):
            _check_kept(value, new[key], here)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for one, other in zip(value, new[key], strict=True):
                _check_kept(one, other, here)
        elif here != ".schema_version":
            assert new[key] == value, here


def test_points_of_both_versions_stand_in_one_setting(tmp_path):
    """A sweep that an older version began goes on in the same folder."""
    path = write_point(tmp_path, run_id="new")
    old = json.loads(path.read_text())
    del old["kind"], old["codecs_decode"], old["environment"], old["protocol"]["mode"], old["protocol"]["decode_chunk"]
    for stage in old["stages"].values():
        del stage["head_s"]
    old |= {"schema_version": 1, "run_id": "old", "per_token_file": "old.safetensors"}
    (tmp_path / "old.json").write_text(json.dumps(old))
    shutil.copy(path.with_suffix(".safetensors"), tmp_path / "old.safetensors")
    results = read_results([tmp_path])
    assert results.skipped == () and len(results.settings) == 1
    assert [p.quality.ppl_ratio for p in results.points] == [1.0, 1.0]


def test_a_record_without_a_time_of_its_end_is_the_oldest(tmp_path):
    write_point(tmp_path, run_id="a")
    write_point(tmp_path, run_id="b", finished_at=None, environment={"threads": "1"})
    results = read_results([tmp_path])
    assert [p.record.run_id for p in results.points] == ["b", "a"]
    assert html_page(results, Outlook())


def test_a_record_that_was_lifted_is_written_as_the_newest(tmp_path):
    record = read_record(SAMPLES / "first_release.json")
    path = write_record(tmp_path, record, {})
    assert json.loads(path.read_text())["schema_version"] == 5
    assert read_record(path).model_copy(update={"per_token_file": record.per_token_file}) == record
    assert setting_key(read_record(path)) == setting_key(record) != setting_key(make_record())


@pytest.mark.parametrize("key", ["args", "protocol", "ranks", "stages", "resumed", "one_token", "results"])
@pytest.mark.parametrize("value", [None, [], {}, 3, "x", [None], {"0": []}], ids=str)
def test_what_stands_where_it_should_not_is_left_for_the_models(key, value):
    damaged = json.loads((SAMPLES / "first_release.json").read_text()) | {key: value}
    lifted = lift(damaged)
    assert lifted["schema_version"] == 5 and lifted.keys() == RunRecord.model_fields.keys()
