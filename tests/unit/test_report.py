import io
import re

from pipeline.partition.plan import default_plan
from pipeline.records.labels import codec_labels
from pipeline.report.columns import shown
from pipeline.report.point_columns import CONSOLE_COLUMNS
from pipeline.report.recommendation import Outlook
from pipeline.report.results import read_results
from pipeline.report.summary import load_records, print_summary, summary_rows, write_report
from tests.helpers.records import losses, make_record, write_failed_point, write_point


def record(compressor, ppl, **changes):
    """Of one link and two stages; 2,000 of 4,000 tokens were timed by an interrupted session."""
    results = {"avg_ppl": ppl, "total_processed_tokens": 4000}
    stages = {
        "0": {"compress_s": 0.5, "decompress_s": 0.0},
        "1": {"compress_s": 0.0, "decompress_s": 0.25},
    }
    changes = {"dataset": {"num_tokens": 5}, "protocol": {"max_length": 8, "stride": 4}} | changes
    plan = default_plan(2, 2, wrap=False)
    return make_record(compressor, plan=plan, results=results, stages=stages, timed_tokens=2000, **changes)


def test_rows_compare_with_none_on_the_same_text():
    rows = summary_rows(
        [
            record("none", 10.0),
            record("nf4", 11.5),
            record("int2", 2e6, causal=False),
            record("int3", None),
            record("int4", 20.0, dataset={"num_tokens": 6}),
            record("int5", 20.0, args={"load_in_8bit": True}),
        ]
    )
    changes = ["+0.00%", "+15.00%", "× 200,000", "not finite", "–", "–"]
    assert [row["ppl_change"] for row in rows] == changes
    perplexities = ["10.0000", "11.5000", "2,000,000", "not finite", "20.0000", "20.0000"]
    assert [row["perplexity"] for row in rows] == perplexities
    assert rows[2]["note"] == "5 tokens, windows 8/4, fp32, not causal"
    assert rows[4]["note"] == "6 tokens, windows 8/4, fp32"
    assert rows[5]["note"] == "5 tokens, windows 8/4, fp32 8-bit weights"
    assert [row["note"] for row in summary_rows([record("none", 10.0), record("nf4", 11.5)])] == ["", ""]
    assert (rows[0]["encode_us_per_token"], rows[0]["decode_us_per_token"]) == ("250", "125")


def test_the_console_says_what_the_page_says(tmp_path, capsys):
    write_point(tmp_path, environment={"threads": "1"})
    write_point(tmp_path, "int8", loss=losses(0.004), nbytes=66, environment={"threads": "2"})
    write_point(tmp_path, "int2", loss=losses(2.0), nbytes=20, causal=False)
    print_summary([tmp_path])
    lines = [re.split(" {2,}", line) for line in capsys.readouterr().out.splitlines()[:4]]
    points = read_results([tmp_path]).points
    columns = shown(CONSOLE_COLUMNS, points)
    assert lines[0] == [column.heading for column in columns]
    for line, point in zip(lines[1:], points, strict=True):
        texts = [column.text(point) for column in columns]
        assert line == texts[: len(line)] and not any(texts[len(line) :])
    assert [line[2] for line in lines[1:]] == ["+0.00%", "+0.40%", "× 7.39"]
    assert [line[-1] for line in lines[2:]] == ["ran on something else", "not causal"]


def test_a_console_without_the_signs_of_the_table(tmp_path, monkeypatch):
    write_point(tmp_path, "int2", loss=losses(2.0), nbytes=20)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    print_summary([tmp_path])
    out.flush()
    assert "encode, \\xb5s/token" in out.buffer.getvalue().decode("ascii")


def test_what_is_no_record_is_named_and_skipped(tmp_path, capsys):
    (tmp_path / "foreign.json").write_text('{"run_id": 1}')
    (tmp_path / "cut.json").write_text('{"run_id": ')
    assert load_records([tmp_path]) == []
    told = capsys.readouterr().err
    assert "foreign.json is not a record: it lacks" in told and "cut.json is not a complete JSON file" in told
    print_summary([tmp_path])
    assert "records in" in capsys.readouterr().out


def test_what_stands_in_files_of_others_moves_no_cursor(tmp_path, capsys):
    write_failed_point(tmp_path, "\x1b[31mred", "\x1b[2J\nb")
    (tmp_path / "\x1b[2Jb\n.json").write_text("{")
    write_point(tmp_path, "int4", loss=losses(0.1), dataset={"description": "~a~\x1b[3m"})
    print_summary([tmp_path])
    write_report([tmp_path], tmp_path / "page\x1b.html", Outlook())
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err + (tmp_path / "page\x1b.md").read_text()
    assert "failed point: \\x1b[31mred: \\x1b[2J\\nb\n" in told.err and "\\x1b[2Jb\\n.json is not" in told.err
    assert "\\~a\\~\\\\x1b\\[3m" in (tmp_path / "page\x1b.md").read_text()


def test_the_place_of_several_records_is_said_once(tmp_path, capsys):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    print_summary(paths)
    assert capsys.readouterr().out.count(str(tmp_path)) == 1
    print_summary(paths[:1])
    assert f"record: {paths[0]}" in capsys.readouterr().out


def test_calibrations_are_named_only_to_tell_rows_apart():
    specs = ["none", "klt(calibration=results/a, step=0.7)", "klt(calibration=results/a, step=1)"]
    assert codec_labels([record(spec, 10.0) for spec in specs]) == ["none", "klt(step=0.7)", "klt(step=1)"]
    specs.append("klt(calibration=results/b, step=1)")
    assert codec_labels([record(spec, 10.0) for spec in specs]) == specs
