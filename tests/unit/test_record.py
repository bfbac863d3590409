import json
import math

import numpy as np
import pytest

from pipeline.records.files import RecordError, check_writable
from pipeline.records.identity import digest_of, make_run_id
from pipeline.records.labels import codec_label
from pipeline.records.store import read_per_token, read_record, write_record

PER_TOKEN = {"loss": np.arange(3, dtype=np.float32)} | dict.fromkeys(("top1", "window"), np.arange(3, dtype=np.int32))


def record(**changes):
    base = {
        "run_id": "r",
        "args": {},
        "results": {"avg_ppl": 2.0},
        "traffic_totals": {},
        "traffic_per_link": {},
        "time_run_s": 1.0,
    }
    return base | changes


def test_round_trip_and_nothing_else_is_left(tmp_path):
    path = write_record(tmp_path, record(), PER_TOKEN)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.safetensors"]
    back = read_record(path)
    assert back["results"] == {"avg_ppl": 2.0} and back["finite"] is True
    assert all(np.array_equal(read_per_token(path)[k], v) for k, v in PER_TOKEN.items())


def test_non_finite_numbers_become_null_and_are_flagged(tmp_path):
    path = write_record(tmp_path, record(results={"avg_ppl": math.inf, "parts": [1.0, math.nan]}), PER_TOKEN)
    text = path.read_text()
    assert "Infinity" not in text and "NaN" not in text
    assert read_record(path)["results"] == {"avg_ppl": None, "parts": [1.0, None]}
    assert read_record(path)["finite"] is False


def test_a_taken_run_id_is_not_overwritten(tmp_path):
    first = write_record(tmp_path, record(), PER_TOKEN)
    second = write_record(tmp_path, record(), PER_TOKEN)
    assert (first.name, second.name) == ("r.json", "r-2.json")
    assert read_record(second)["run_id"] == "r-2"


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not a complete JSON file"),
        ("[]", "not a run record"),
        ('{"run_id": "x"}', "lacks schema_version, args"),
        (json.dumps(record(schema_version=99)), "schema version 99"),
    ],
)
def test_foreign_files_are_refused(tmp_path, text, words):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=words):
        read_record(path)


def test_a_truncated_record_and_a_damaged_per_token_file(tmp_path):
    path = write_record(tmp_path, record(), PER_TOKEN)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RecordError, match="not a complete JSON file"):
        read_record(path)
    path.with_suffix(".safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(RecordError, match="cannot be read"):
        read_per_token(path)


def test_an_unwritable_folder_is_found_before_the_run(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RecordError, match="cannot be written to"):
        check_writable(tmp_path / "file" / "folder")


def test_names_are_safe_and_digests_do_not_depend_on_order():
    run_id = make_run_id("org/model name:Q4", "", "a" * 100)
    assert all(c.isalnum() or c in "._-" for c in run_id) and len(run_id) < 110
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})


@pytest.mark.parametrize(
    "compressor, per_link, expected",
    [
        ("nf4", {}, "nf4"),
        ("outlier(channels=8, inner=int4)", {}, "outlier(channels=8, inner=int4)"),
        ({"name": "zstd", "inner": {"name": "int4"}}, {}, "zstd(inner=int4)"),
        ("none", {"layer:2:node0->node1": "nf4"}, "none, layer:2:node0->node1: nf4"),
    ],
)
def test_codec_labels(compressor, per_link, expected):
    args = {"config": {"compressor": compressor, "compressor_per_link": per_link}}
    assert codec_label({"codecs": {"x": {}}, "args": args}) == expected
    assert codec_label({"codecs": {}, "args": args}) == "unsplit"
