import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.report.html_page import html_page
from pipeline.report.prediction import Network
from pipeline.report.recommendation import Outlook, fastest, recommendation_text, verdict_text, within_budget
from pipeline.report.results import load_records, read_results, recommend
from pipeline.report.summary import summary_rows
from pipeline.report.text_page import csv_table, markdown_page
from tests.helpers.records import PLAN, losses, write_failed_point, write_point


def test_points_of_equal_model_text_and_protocol_share_a_setting_and_its_baseline(tmp_path):
    write_point(tmp_path)
    write_point(tmp_path, "int8", loss=losses(0.05), nbytes=66)
    write_point(tmp_path, "nf4", num_tokens=300)
    first, second = read_results([tmp_path]).settings
    assert [p.label for p in first.points] == ["none", "int8"] and first.baseline.label == "none"
    assert first.points[1].quality.ppl_ratio == pytest.approx(math.exp(0.05), rel=1e-6)
    assert first.points[1].ppl / first.baseline.ppl == pytest.approx(first.points[1].quality.ppl_ratio, rel=1e-9)
    assert (first.name, second.name) == ("1", "2")
    assert second.baseline is None and second.points[0].quality is None
    assert second.points[0].quality_note == "no uncompressed point of the same model, text and protocol"


@pytest.mark.parametrize(
    ("blocks", "title"),
    [
        ({"types": ["Q4_1", "Q8_0"], "made_at_load": False}, "model fp32, Q4_1 and Q8_0 blocks, 400 tokens"),
        ({"types": ["Q4_1"], "made_at_load": True}, "model fp32, Q4_1 blocks made at load, 400 tokens"),
        ({"types": ["BF16", "Q4_K", "Q6_K"], "made_at_load": False}, "model fp32, BF16, Q4_K and Q6_K blocks, 400"),
    ],
)
def test_weights_that_were_held_differently_are_settings_of_their_own(blocks, title, tmp_path):
    write_point(tmp_path)
    write_point(tmp_path, "int8", model={"blocks": blocks}, loss=losses(0.05))
    write_point(tmp_path, "nf4", model={"blocks": blocks | {"made_at_load": not blocks["made_at_load"]}})
    first, second, third = read_results([tmp_path]).settings
    assert first.title.startswith("model fp32, 400 tokens") and second.title.startswith(title)
    assert len({first.title, second.title, third.title}) == 3
    assert second.baseline is None and second.points[0].quality is None
    rows = summary_rows(load_records([tmp_path]))
    held = [first.title, second.title, third.title]
    for row, title in zip(sorted(rows, key=lambda row: held_order(row["codec"])), held, strict=True):
        assert row["note"].endswith(title.removeprefix("model ").partition(", 400")[0])
    assert [row["ppl_change"] for row in rows].count("–") == 2


def held_order(codec):
    return ["none", "int8", "nf4"].index(codec)


def test_a_link_alone_compressed_is_no_baseline(tmp_path):
    write_point(
        tmp_path,
        "none",
        codecs={link.name: {"name": "nf4" if link.index == 1 else "none"} for link in PLAN.links},
    )
    assert read_results([tmp_path]).settings[0].baseline is None


def test_what_is_no_record_is_named_and_skipped_and_failed_points_are_listed(tmp_path):
    whole = write_point(tmp_path)
    (tmp_path / "cut.json").write_text(whole.read_text()[:1000])
    (tmp_path / "foreign.json").write_text('{"run_id": 1}')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    hollow = json.loads(whole.read_text())
    del hollow["plan"]
    (tmp_path / "hollow.json").write_text(json.dumps(hollow | {"per_token_file": "x"}))
    odd = json.loads(whole.read_text()) | {"codecs": ["none"]}
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    write_failed_point(tmp_path, "nf5", "no such codec")
    results = read_results([tmp_path])
    assert [p.label for p in results.points] == ["none"]
    assert [(f.label, f.error) for f in results.failed] == [("nf5", "no such codec")]
    told = "\n".join(results.skipped)
    for name in ("cut", "foreign", "list", "binary", "hollow", "odd"):
        assert told.count(f"{name}.json") == 1, name
    assert "hollow.json is not a complete record: it lacks plan" in told


def test_the_verdict_says_what_it_was_given_without(tmp_path):
    write_point(tmp_path)
    write_point(tmp_path, "int8", loss=losses(0.001), nbytes=66)

    def verdicts():
        results, outlook = read_results([tmp_path]), Outlook()
        (setting,) = results.settings
        told = verdict_text(results, setting, outlook)
        html, answer = html_page(results, outlook), f'<p class="answer">{told}</p>'
        assert answer in html and told.replace("_", "\\_") in markdown_page(results, outlook)
        return told.removeprefix(recommendation_text(setting, outlook))

    assert verdicts() == ""
    (tmp_path / "b.json").write_text("{}")
    assert verdicts() == " Not counted: 1 file that is no record, b.json."
    (tmp_path / "a.json").write_text("{}")
    assert verdicts() == " Not counted: 2 files that are no records, a.json first."


def test_points_come_in_the_order_of_their_ends_wherever_they_ran(tmp_path):
    ends = {
        "before": None,
        "first": "2026-01-02T00:30:00+09:00",  # 15:30 of the day before, in UTC
        "second": "2026-01-01T16:00:00",
        "third": "20260101T163000.5Z",
        "fourth": "2026-01-01T12:00:00-05:00",
    }
    for run_id, finished_at in reversed(ends.items()):
        write_point(tmp_path, run_id=run_id, finished_at=finished_at)
    assert [record.run_id for record in load_records([tmp_path])] == list(ends)


def paths(value, prefix=()):
    """Places of a JSON value, those of a list's first item for all."""
    children = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, child in children:
        yield (*prefix, key)
        yield from paths(child, (*prefix, key))


@pytest.mark.slow
@pytest.mark.parametrize("put", [None, "<b>x", [1]], ids=["null", "text", "list"])
def test_no_damaged_record_keeps_the_others_from_the_page(put, tmp_path):
    write_point(tmp_path)
    path = write_point(tmp_path, "int8", loss=losses(0.01), nbytes=66)
    whole = path.read_text()
    num_skipped = 0
    for place in paths(json.loads(whole)):
        if any(str(key).startswith("layer:") and "layer:0" not in key for key in place) or place[:2] == ("stages", "1"):
            continue  # alike
        record = json.loads(whole)
        owner = record
        for key in place[:-1]:
            owner = owner[key]
        if put is None and isinstance(owner, dict):
            del owner[place[-1]]
        else:
            owner[place[-1]] = put
        path.write_text(json.dumps(record))
        results = read_results([tmp_path])
        page = html_page(results, Outlook())
        assert "<b>x" not in page and markdown_page(results, Outlook()) and csv_table(results), place
        summary_rows(load_records([tmp_path]))
        assert len(results.points) + len(results.skipped) == 2, place
        num_skipped += len(results.skipped)
    assert num_skipped > 30


def test_numbers_and_depths_that_json_has_not_are_skipped(tmp_path):
    path = write_point(tmp_path)
    path.write_text(path.read_text().replace('"timed_tokens": 800', '"timed_tokens": NaN'))
    (tmp_path / "deep.json").write_text("[" * 100_000)
    results = read_results([tmp_path])
    assert results.settings == () and len(results.skipped) == 2


def test_a_missing_or_foreign_per_token_file_costs_the_quality_only(tmp_path):
    write_point(tmp_path)
    write_point(tmp_path, "int8").with_suffix(".safetensors").unlink()
    other = write_point(tmp_path, "int4").with_suffix(".safetensors")
    (tmp_path / "elsewhere").mkdir()
    short = write_point(tmp_path / "elsewhere", loss=losses()[:80])
    other.write_bytes(short.with_suffix(".safetensors").read_bytes())
    by_label = {p.label: p for p in read_results([tmp_path]).points}
    assert by_label["int8"].quality is None and "cannot be read" in by_label["int8"].quality_note
    assert by_label["int4"].quality is None and "has 80 tokens, its record 400" in by_label["int4"].quality_note
    assert by_label["none"].quality.top1_agreement == 1.0


def test_a_run_that_only_wrote_its_record_has_no_costs(tmp_path):
    write_point(tmp_path, timed_tokens=0)
    assert read_results([tmp_path]).points[0].costs is None


@pytest.fixture
def setting(tmp_path):
    write_point(tmp_path)
    write_point(tmp_path, "int8", loss=losses(0.001), nbytes=66)
    write_point(tmp_path, "int6", loss=losses(0.009, spread=0.1), nbytes=50)
    write_point(tmp_path, "nf4", loss=losses(0.05), nbytes=36)
    write_point(tmp_path, "mean4", loss=losses(0.0), nbytes=20, causal=False)
    return read_results([tmp_path]).settings[0]


def test_the_cheapest_causal_point_within_the_budget_is_recommended(setting):
    best = recommend(setting, 0.06)
    assert (best.cheapest.label, best.certain.label) == ("nf4", "nf4")
    best = recommend(setting, 0.01)
    assert (best.cheapest.label, best.certain.label) == ("int6", "int8")
    assert recommend(setting, 0.0).cheapest.label == "none"


def test_the_recommendation_in_words(setting):
    text = recommendation_text(setting, Outlook(max_ppl_increase=0.06))
    assert text.startswith("Within +6% perplexity the cheapest is nf4: 36.0 bytes per token and link, 7.1 times fewer")
    assert "perplexity +5.13%" in text and text.endswith("Its whole 95% interval is within.")
    text = recommendation_text(setting, Outlook(max_ppl_increase=0.01))
    assert "cheapest is int6" in text and "the cheapest whose interval is: int8: 66.0" in text
    assert recommendation_text(setting, Outlook(max_ppl_increase=0.0)).startswith("No compressed causal point")


def test_the_fastest_point_depends_on_the_network(tmp_path):
    write_point(tmp_path)
    slow = {"compute_s": 3.0, "compress_s": 0.0, "decompress_s": 0.0, "wait_s": 0.0}
    write_point(tmp_path, "int8", nbytes=66, stages={str(i): slow for i in range(5)})
    setting = read_results([tmp_path]).settings[0]
    outlook = Outlook()
    labels = [
        fastest(setting.points, Network(bits_per_s=mbits * 1e6, rtt_s=0.0), outlook, decode=False).label
        for mbits in (0.01, 1000)
    ]
    assert labels == ["int8", "none"]
    assert all(within_budget(point, outlook) for point in setting.points)


def test_losses_that_are_not_finite(tmp_path):
    write_point(tmp_path)
    write_point(tmp_path, "int2", loss=np.full(400, np.nan, np.float32), nbytes=20)
    setting = read_results([tmp_path]).settings[0]
    assert setting.points[1].ppl is None and math.isnan(setting.points[1].quality.ppl_ratio)
    assert recommend(setting, 10.0).cheapest.label == "none"


def test_too_few_windows_are_said_to_be_too_few(tmp_path):
    few = np.zeros(400, np.int32)
    for label, change in (("none", 0.0), ("int8", 0.001)):
        path = write_point(tmp_path, label, loss=losses(change), nbytes=66 if change else 256)
        columns = load_file(path.with_suffix(".safetensors"))
        save_file(columns | {"window": few}, path.with_suffix(".safetensors"))
    text = recommendation_text(read_results([tmp_path]).settings[0], Outlook())
    assert "cheapest is int8" in text and "cannot be told from fewer than 8 windows" in text
