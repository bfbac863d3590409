"""What stands in a record's file comes back as it was; what does not fit is not written, what is no record not read."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.config.reading import load_config
from pipeline.config.schema import FLAG_KEYS
from pipeline.records.base import now
from pipeline.records.failed_point import FailedPoint
from pipeline.records.files import RecordError, check_writable
from pipeline.records.identity import digest_of, make_run_id
from pipeline.records.json_schema import schema_text
from pipeline.records.labels import codec_label, config_label
from pipeline.records.run_record import Args, CodecConfig, RunLink, RunRecord
from pipeline.records.store import (
    read_any,
    read_failure,
    read_generation,
    read_per_token,
    read_record,
    write_failure,
    write_record,
)
from tests.helpers.records import make_record, write_failed_point, write_generation_point, write_point

ROOT = Path(__file__).parents[2]
PER_TOKEN = {"loss": np.arange(3, dtype=np.float32)} | dict.fromkeys(("top1", "window"), np.arange(3, dtype=np.int32))


def test_round_trip_and_nothing_else_is_left(tmp_path):
    record = make_record(run_id="r", per_token_file="r.safetensors")
    path = write_record(tmp_path, record, PER_TOKEN)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.safetensors"]
    assert read_record(path) == record and record.finite
    assert all(np.array_equal(read_per_token(path)[k], v) for k, v in PER_TOKEN.items())


def test_the_three_kinds_say_what_they_are(tmp_path):
    paths = [write_point(tmp_path), write_generation_point(tmp_path, "g"), write_failed_point(tmp_path, "a", "b")]
    files = [json.loads(path.read_text()) for path in paths]
    assert [(file["schema_version"], file["kind"]) for file in files] == [
        (5, "thinwire run"),
        (5, "thinwire generation"),
        (5, "failed point"),
    ]
    assert [read_any(path).model_dump(mode="json") for path in paths] == files
    with pytest.raises(RecordError, match=r"g\.json is not the record of an evaluation: its kind is 'thinwire gen"):
        read_record(paths[1])
    with pytest.raises(RecordError, match=r"run\.json is not the record of answers: its kind is 'thinwire run'"):
        read_generation(paths[0])
    assert read_failure(paths[0]) is None and read_failure(paths[2]).error == "b"


def test_the_original_benchmarks_keys_are_there(tmp_path):
    record = json.loads(write_point(tmp_path).read_text())
    assert FLAG_KEYS.keys() <= record["args"].keys()
    assert {"avg_ppl", "total_nll", "total_loss_tokens", "total_processed_tokens"} <= record["results"].keys()
    assert {"total_bytes", "total_tokens", "total_tx"} <= record["traffic_totals"].keys()
    for link in record["traffic_per_link"].values():
        assert {"bytes", "tokens", "tx", "bytes_per_token"} <= link.keys()


def test_numbers_that_are_not_finite_become_null_and_are_flagged(tmp_path):
    record = make_record(results={"avg_ppl": math.inf, "total_nll": math.nan})
    path = write_record(tmp_path, record, PER_TOKEN)
    text = path.read_text()
    assert "Infinity" not in text and "NaN" not in text
    back = read_record(path)
    assert (back.results.avg_ppl, back.results.total_nll, back.finite) == (None, None, False)


def test_a_taken_run_id_is_not_overwritten(tmp_path):
    first, second = (write_record(tmp_path, make_record(run_id="r"), PER_TOKEN) for _ in range(2))
    assert (first.name, second.name) == ("r.json", "r-2.json")
    back = read_record(second)
    assert (back.run_id, back.per_token_file) == ("r-2", "r-2.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("tokens_per_s", -1.0, "tokens_per_s is '-1.0': input should be greater than or equal to 0"),
        ("tokens_per_s", math.inf, "Out of range float|tokens_per_s is"),
        ("timed_tokens", 10**6, "timed_tokens is 1000000, more than results.total_processed_tokens, 800"),
        ("codecs", {}, "links are 'layer:0:.*', those with codecs ''"),
        ("ranks", (), "ranks is empty"),
        ("causal", 1, "causal is '1': input should be a valid boolean"),
        ("notes", (3,), r"notes\[0\] is '3': input should be a valid string"),
    ],
)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_a_record_that_does_not_fit_is_not_written(key, value, told, tmp_path):
    record = make_record().model_copy(update={key: value})
    with pytest.raises((RuntimeError, ValueError), match=told) as raised:
        write_record(tmp_path, record, PER_TOKEN)
    assert not isinstance(raised.value, RecordError) and list(tmp_path.iterdir()) == []


def test_a_figure_that_does_not_fit_cannot_be_made():
    figures = {"bytes": 1, "tokens": 1, "tx": 1, "bytes_per_token": 1.0, "bits_per_value": 1.0}
    whole = figures | {"header_bytes": 1, "padding_bytes": 0}
    RunLink(**whole)
    wrong_ones = [{"tokens": 0}, {"bytes": 1.5}, {"bytes": True}, {"tx": 10**16}, {"bits_per_value": math.nan}]
    for wrong in [*wrong_ones, {"x": 1}]:
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            RunLink(**whole | wrong)
    with pytest.raises(ValidationError, match="padding_bytes"):
        RunLink(**figures, header_bytes=1)
    with pytest.raises(ValidationError, match="frozen"):
        RunLink(**whole).bytes = 2


def test_the_whole_config_is_kept():
    config = load_config(None, [("compressor", "nf4"), ("partition.num_nodes", 2), ("generation.stop", ["x"])])
    args = Args.from_plain(config.original_args() | {"config": config.as_dict()})
    assert args.model_dump(mode="json")["config"] == json.loads(json.dumps(config.as_dict()))


def test_options_of_a_codec_are_its_own():
    config = CodecConfig.from_plain({"name": "mine", "levels": (1, 2), "inner": {"name": "int4"}, "limit": math.inf})
    assert config.others == {"levels": [1, 2], "inner": {"name": "int4"}, "limit": None}
    assert config.model_dump() == {"name": "mine", **config.others}


def test_words_that_are_no_text_are_kept_readable(tmp_path):
    words = {"failure_id": "1", "label": "x", "error": "no file \udcff", "args": {}, "finished_at": now()}
    for failure in (FailedPoint(**words), FailedPoint.from_plain(words | {"args": {"\ud800": "\udcff"}})):
        back = read_failure(write_failure(tmp_path, failure))
        assert back.error == "no file \\udcff" and json.dumps(dict(back.args)) in ("{}", r'{"\\ud800": "\\udcff"}')


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a complete JSON file"),
        ("[]", "not a record: it holds a list, not a mapping"),
        ('{"run_id": "x"}', "not a record: it lacks schema_version"),
        ('{"schema_version": 99}', "schema_version is '99', this program reads 1 to 5"),
        ('{"schema_version": true}', "schema_version is 'True'"),
        ('{"schema_version": 1}', "not a complete record: it lacks"),
        ('{"schema_version": 2}', "kind is 'None', not 'thinwire run', 'thinwire generation', 'thinwire tasks', '"),
        ('{"schema_version": 2, "kind": ["x"]}', r"kind is \"\['x'\]\""),
        ('{"schema_version": 1, "kind": "thinwire importance curves"}', "kind is 'thinwire importance curves'"),
    ],
)
def test_foreign_files_are_refused(tmp_path, text, words):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=words):
        read_record(path)


def test_a_key_that_nobody_knows_is_named(tmp_path):
    path = write_point(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sent_bytes": 3}))
    with pytest.raises(RecordError, match="sent_bytes is not a key of it"):
        read_record(path)


def test_a_truncated_record_and_a_damaged_per_token_file(tmp_path):
    path = write_point(tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RecordError, match="not a complete JSON file"):
        read_record(path)
    path.with_suffix(".safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(RecordError, match="cannot be read"):
        read_per_token(path)


def test_the_json_schema_is_that_of_the_models():
    """Made by `python -m pipeline.records.json_schema`."""
    assert (ROOT / "docs" / "record.schema.json").read_text(encoding="utf-8") == schema_text()
    schema = json.loads(schema_text())
    assert set(schema["$defs"]["RunRecord"]["required"]) == RunRecord.model_fields.keys()


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
    ("compressor", "per_link", "decode", "expected"),
    [
        ("nf4", {}, None, "nf4"),
        ("outlier(channels=8, inner=int4)", {}, None, "outlier(channels=8, inner=int4)"),
        ({"name": "zstd", "inner": {"name": "int4"}}, {}, None, "zstd(inner=int4)"),
        ("none", {"layer:2:node0->node1": "nf4"}, None, "none, layer:2:node0->node1: nf4"),
        ("nf4", {}, "int8", "nf4, decoding int8"),
        ({"levels": 3}, {}, None, "{'levels': 3}"),
    ],
)
def test_codec_labels(compressor, per_link, decode, expected):
    config = {"compressor": compressor, "compressor_per_link": per_link, "compressor_decode": decode}
    record = make_record(args={"config": config})
    assert codec_label(record) == config_label(config) == expected
    assert codec_label(record.model_copy(update={"codecs": {}})) == "unsplit"
