import csv
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from pipeline.records.files import RecordError
from pipeline.report import published
from pipeline.report.__main__ import main
from pipeline.report.charts import ChartPoint, pareto_front, trade_off_svg
from pipeline.report.columns import percent, perplexity, shown, significant
from pipeline.report.generation import drafter_table
from pipeline.report.generation_columns import SHOWN_COLUMNS
from pipeline.report.html_page import html_page, templates
from pipeline.report.published import read_published
from pipeline.report.html_views import measured_panel
from pipeline.report.recommendation import Outlook, recommendation_text
from pipeline.report.results import read_results
from pipeline.report.summary import print_summary, write_report
from pipeline.report.text_page import csv_table, markdown_page
from tests.helpers.records import (
    PLAN,
    losses,
    make_drafts,
    write_failed_point,
    write_generation_point,
    write_point,
)

ROOT = Path(__file__).parents[2]
NASTY = "my.codecs:Odd(note=</script><img src=x onerror='alert(1)'>|\"&)"
VOID = {"meta", "input", "img", "br", "link"}


class Checker(HTMLParser):
    """Collects tags, attributes and what is left open."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def check(page):
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


@pytest.fixture
def folder(tmp_path):
    write_point(tmp_path)
    write_point(tmp_path, "int8", loss=losses(0.004, spread=0.01), nbytes=66)
    write_point(tmp_path, NASTY, loss=losses(0.3), nbytes=36, causal=False, codec="odd")
    write_point(tmp_path, "int2", loss=losses(9.0), nbytes=20)
    (tmp_path / "cut<b>.json").write_text('{"run_id": ')
    write_failed_point(tmp_path, "nf5", "no codec <nf5>")
    return tmp_path


def test_the_page_is_whole_and_asks_for_nothing_from_outside(folder):
    page = html_page(read_results([folder]), Outlook())
    checker = check(page)
    assert {"img", "link", "iframe", "object"}.isdisjoint(checker.tags)
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in checker.attributes}
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?:", page)
    assert "default-src 'none'" in page
    ids = [value for name, value in checker.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and {"points", "link", "traffic", "times", "provenance"} <= set(ids)


def test_what_the_user_typed_is_text(folder):
    page = html_page(read_results([folder]), Outlook())
    assert "<img" not in page and "cut&lt;b&gt;.json" in page and "no codec &lt;nf5&gt;" in page
    assert page.count("</script>") == 2
    assert "my.codecs:Odd(note=&lt;/script&gt;&lt;img" in page


def test_the_page_tells_points_that_are_not_causal_failed_or_skipped(folder):
    page = html_page(read_results([folder]), Outlook())
    assert "not causal" in page and 'class="point leaky"' in page
    assert "<b>failed</b>: nf5" in page and "<b>skipped</b>" in page


def test_a_page_without_points_or_links(tmp_path):
    check(html_page(read_results([tmp_path]), Outlook()))
    write_point(
        tmp_path,
        traffic_per_link={},
        codecs={},
        one_token={"links": {}},
        reconstruction={},
    )
    page = html_page(read_results([tmp_path]), Outlook())
    check(page)
    assert "unsplit" in page and "nothing to draw" in page


def test_measures_that_a_record_lacks_are_absent(tmp_path):
    write_point(tmp_path, one_token=None, reconstruction=None)
    page = html_page(read_results([tmp_path]), Outlook())
    assert (
        "Not measured: these runs timed no one-token forward." in page
        and "worst link" not in page.split("How to read")[0]
    )


def test_markdown_keeps_its_cells(folder):
    text = markdown_page(read_results([folder]), Outlook())
    rows = [line for line in text.splitlines() if line.startswith("|") and "Odd" in line]
    assert rows and all("\\|" in row and "&lt;/script>" in row for row in rows)
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert "- failed: nf5" in text and "Within +1% perplexity the cheapest is int8" in text


def test_runs_that_generated_read_alike_everywhere(folder, capsys):
    write_generation_point(folder, "generation")
    write_report([folder], folder / "out.html", Outlook())
    rows = list(csv.DictReader(io.StringIO((folder / "out.generation.csv").read_text(encoding="utf-8"))))
    (run,) = read_results([folder]).generated
    assert len(rows) == 1 and rows[0]["codec"] == run.label == "nf4, decoding int8"
    assert float(rows[0]["bytes_per_token_per_link"]) == run.payload_bytes_per_token == 64.0
    assert float(rows[0]["ms_per_token_p95"]) == 40.0 and rows[0]["run_id"] == "generation"
    page = (folder / "out.html").read_text(encoding="utf-8")
    section = page[page.index('<section id="generation">') :].partition("</section>")[0]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", section)
    assert cells == [column.text(run) for column in shown(SHOWN_COLUMNS, [run])[1:]]
    assert cells[1] == "fp32" and cells[5:10] == ["67.40", "20.0", "20.0", "40.0", "64.0"]
    assert "<li>something of note</li>" in section
    assert "| nf4, decoding int8 | " + " | ".join(cells) + " |" in (folder / "out.md").read_text(encoding="utf-8")
    capsys.readouterr()
    print_summary([folder])
    assert re.split(" {2,}", capsys.readouterr().out.splitlines()[-2]) == [run.label, *cells]


def test_drafts_stand_in_columns_and_by_depth(folder, capsys):
    drafts = make_drafts()
    deep = [{"judged": 1, "right": 0}] * 8 + [{"judged": 0, "right": 0}, {"judged": 1, "right": 1}]
    deep = drafts | {"drafters": [drafts["drafters"][0] | {"by_depth": deep}], "rows_by_tokens": [0, 5, 5]}
    write_generation_point(folder, "drafted", drafts=drafts)
    write_generation_point(folder, "undrafted")
    write_report([folder], folder / "out.html", Outlook())
    rows = {row["run_id"]: row for row in csv.DictReader((folder / "out.generation.csv").open(encoding="utf-8"))}
    own = ("drafters", "tokens_per_pass", "first_draft_accepted", "drafts_accepted", "void_passes")
    assert [rows["undrafted"][key] for key in own] == [""] * 5
    assert rows["drafted"]["drafters"] == "ngram(longest=4), shortcut(calibration=c)"
    assert [float(rows["drafted"][key]) for key in own[1:]] == pytest.approx([1.5, 6 / 10, 8 / 14, 0.1])
    page = (folder / "out.html").read_text(encoding="utf-8")
    check(page)
    text = (folder / "out.md").read_text(encoding="utf-8")
    capsys.readouterr()
    print_summary([folder])
    shown_text = ["ngram(longest=4), shortcut(calibration=c)", "1.50", "60.0%", "57.1%", "10.0%"]
    for told in (page, text, capsys.readouterr().out):
        assert re.search(r"[^–]*".join(map(re.escape, shown_text)), told)
    assert "| nf4, decoding int8 | ngram(longest=4) | 0.00 | 62.5% of 8 | 50.0% of 4 |" in text
    assert "| nf4, decoding int8 | shortcut(calibration=c) | 4.00 | 50.0% of 2 | – |" in text
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page[page.index("<h3>Drafts that were right</h3>") :])
    assert cells[:4] == ["ngram(longest=4)", "0.00", "62.5% of 8", "50.0% of 4"]
    write_generation_point(folder, "deep", drafts=deep)
    headings, table = drafter_table(read_results([folder]).generated)
    assert headings[-2:] == ["depth 8", "deeper"] and {len(row) for row in table} == {len(headings)}
    assert table[0][-2:] == ["0.0% of 1", "100.0% of 1"] and table[1][3:6] == ["62.5% of 8", "50.0% of 4", "–"]


def test_a_run_that_guessed_nothing_reads_as_ever(folder, capsys):
    write_generation_point(folder, "generation")
    write_report([folder], folder / "out.html", Outlook())
    print_summary([folder])
    section = (folder / "out.html").read_text(encoding="utf-8").partition('<section id="generation">')[2]
    text = (folder / "out.md").read_text(encoding="utf-8")
    for told in (section.partition("</section>")[0], text, capsys.readouterr().out):
        assert "draft" not in told.lower() and "void" not in told and "tokens/pass" not in told


def emulated(rate=1e7, delay=0.02, slowdown=(), **others):
    links = {name: {"bits_per_s": rate, "delay_s": delay, "jitter_s": 0.0} for name in PLAN.chain_names}
    links |= {name: link | {"jitter_s": 0.0} for name, link in others.items()}
    return {"links": links, "slowdown": list(slowdown)}


def headings(page, section):
    part = page[page.index(f'<section id="{section}">') :].partition("</thead>")[0]
    return [re.sub("<[^>]*>", "", cell).strip() for cell in re.findall(r"<th[^>]*>.*?</th>", part, re.DOTALL)]


EMULATED_HEADINGS = {"predicted tokens/s", "predicted/measured", "emulated network", "emulated slowdown"}


def test_points_under_an_emulated_network_say_so_everywhere(folder, capsys):
    write_point(folder, "nf4", nbytes=36, emulation=emulated(), run_id="thin", per_token_file="thin.safetensors")
    write_point(folder, "nf4", nbytes=36, emulation=emulated(slowdown=(1, 1, 3, 1), **{PLAN.links[1].name: LINK}))
    write_generation_point(folder, "generation", emulation=emulated(1e6))
    write_report([folder], folder / "out.html", Outlook())
    labels = ["nf4 over 10 Mbit/s, 20 ms", "nf4 over 4 unlike links, nodes x1 x1 x3 x1"]
    results = read_results([folder])
    assert len(results.settings) == 1 and [p.label for p in results.points][-2:] == labels
    page = (folder / "out.html").read_text(encoding="utf-8")
    check(page)
    text = (folder / "out.md").read_text(encoding="utf-8")
    capsys.readouterr()
    print_summary([folder])
    console = capsys.readouterr().out
    for label in (*labels, "nf4, decoding int8 over 1 Mbit/s, 20 ms"):
        assert label in page and f"| {label} |" in text and label in console
    assert EMULATED_HEADINGS < set(headings(page, "points")) and "<dt>predicted tokens/s</dt>" in page
    assert "emulated network" in headings(page, "generation")
    assert "predicted ms/token" not in headings(page, "generation")  # the helper's record does not tell enough
    assert "predicted/measured" in console.splitlines()[0]
    rows = list(csv.DictReader(io.StringIO(csv_table(results))))
    assert [row["emulated_network"] for row in rows[:4]] == [""] * 4
    assert rows[4]["emulated_network"] == "10 Mbit/s, 20 ms" and rows[4]["emulated_slowdown"] == ""
    assert f"; {PLAN.links[1].name}: 64 kbit/s, 300 ms; " in rows[5]["emulated_network"]
    assert rows[5]["emulated_slowdown"] == "x1 x1 x3 x1"
    point = results.points[-1]
    assert float(rows[5]["predicted_tokens_per_s"]) == point.predicted_tokens_per_s
    assert float(rows[5]["predicted_over_measured"]) == point.predicted_tokens_per_s / point.record.tokens_per_s
    assert not rows[0]["predicted_tokens_per_s"]


LINK = {"bits_per_s": 64e3, "delay_s": 0.3}


def test_points_on_the_machine_as_it_is_read_as_ever(folder, capsys):
    write_generation_point(folder, "generation")
    write_report([folder], folder / "out.html", Outlook())
    print_summary([folder])
    page = (folder / "out.html").read_text(encoding="utf-8")
    text = (folder / "out.md").read_text(encoding="utf-8")
    for told in (page.partition("<h3>The prediction's formula")[0], text, capsys.readouterr().out):
        assert "emulated" not in told and "predicted tokens/s" not in told and "predicted/measured" not in told


def test_runs_that_differ_in_the_network_alone_share_a_mark(tmp_path):
    write_point(tmp_path)
    for emulation in (None, emulated(), emulated(1e6)):
        write_point(tmp_path, "nf4", nbytes=36, emulation=emulation)
    write_point(tmp_path, "int8", nbytes=66, emulation=emulated())
    write_point(tmp_path, "none")  # no network sets it apart: a mark of its own, as ever
    (setting,) = read_results([tmp_path]).settings
    ((_, chart), _) = measured_panel(setting).charts
    assert chart.count('class="hit"') == 4
    assert re.findall(r'class="label"[^>]*>([^<]*)', chart).count("nf4 (3 runs)") == 1
    shared = next(t for t in re.findall(r'aria-label="([^"]*)"', chart) if "nf4" in t)
    assert "codec: nf4\n" in shared and "codec: nf4 over 10 Mbit/s, 20 ms\n" in shared and "1 Mbit/s" in shared
    assert "int8 over 10 Mbit/s, 20 ms" in chart
    assert "differ in what was emulated share a mark" in html_page(read_results([tmp_path]), Outlook())


def test_the_recommended_codec_is_named_without_its_network(tmp_path):
    write_point(tmp_path)
    write_point(tmp_path, "int8", loss=losses(0.001), nbytes=66, emulation=emulated())
    (setting,) = read_results([tmp_path]).settings
    assert "the cheapest is int8: 66.0 bytes" in recommendation_text(setting, Outlook())


def test_without_a_run_that_generated_there_is_no_table_of_them(folder):
    write_report([folder], folder / "out.html", Outlook())
    assert not (folder / "out.generation.csv").exists()
    assert 'id="generation"' not in (folder / "out.html").read_text(encoding="utf-8")


def test_a_name_that_a_template_misspells_is_an_error():
    with pytest.raises(UndefinedError, match="'resutls' is undefined"):
        templates().from_string("{{ resutls.points }}").render(results=None)


def test_json_cannot_end_its_script_element():
    shown = templates().from_string("{{ value | tojson }}").render(value=["</script><b>&'"])
    assert "<" not in shown and json.loads(shown) == ["</script><b>&'"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        templates().from_string("{{ value | tojson }}").render(value=float("nan"))


def test_csv_has_raw_values(folder):
    results = read_results([folder])
    rows = list(csv.DictReader(io.StringIO(csv_table(results))))
    assert [row["codec"] for row in rows] == ["none", "int8", NASTY, "int2"]
    int8 = results.points[1]
    assert float(rows[1]["perplexity"]) == int8.ppl
    assert float(rows[1]["ppl_change_high"]) == int8.quality.ppl_interval[1] - 1
    assert rows[2]["note"] == "not causal"


def test_command_writes_three_files_and_says_what_it_skips(folder):
    page = folder / "out" / "report.html"
    command = [
        sys.executable,
        "-m",
        "pipeline.report",
        folder,
        "-o",
        page,
        "--max-ppl-increase",
        "0.5%",
        "--mbits",
        "42",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert sorted(p.name for p in page.parent.iterdir()) == ["report.csv", "report.html", "report.md"]
    assert "Within +0.5% perplexity the cheapest is int8" in done.stdout
    assert "42 Mbit/s" in page.with_suffix(".md").read_text(encoding="utf-8")
    assert "skipped: " in done.stderr and "failed point: nf5" in done.stderr


@pytest.mark.parametrize(
    "option, value",
    [("--max-ppl-increase", "-1%"), ("--max-ppl-increase", "nan"), ("--mbits", "0"), ("--rtt-ms", "x")],
)
def test_command_refuses_bad_values(folder, option, value, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", str(folder), f"{option}={value}"])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and option in told and value in told


def test_command_refuses_a_folder_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "no such file or folder" in capsys.readouterr().err


def chart_point(label, bits, ppl, causal=True):
    return ChartPoint(label=label, bits_per_value=bits, ppl=ppl, causal=causal, detail=label)


def test_the_front_holds_what_no_causal_point_beats():
    points = [
        chart_point("none", 32, 10.0),
        chart_point("int8", 8, 10.1),
        chart_point("worse", 9, 10.2),
        chart_point("leaky", 4, 9.0, causal=False),
        chart_point("int4", 4, 12.0),
        chart_point("int2", 2, None),
    ]
    assert [p.label for p in pareto_front(points)] == ["int4", "int8", "none"]


def label_boxes(svg):
    for x, y, text in re.findall(r'<text class="label" x="([-\d.]+)" y="([-\d.]+)">([^<]*)</text>', svg):
        yield float(x), float(y) - 10, float(x) + 6.6 * len(text), float(y) + 3


@pytest.mark.parametrize("width", [350, 556])
def test_labels_of_the_published_points_do_not_collide(width):
    figures = read_published()
    points = [
        chart_point(p.method, p.bits_per_value, p.ppl, p.causal) for p in figures.points if p.first_k_tokens == 10_000
    ]
    svg = trade_off_svg(points, hidden_size=5120, base_ppl=7.15, width=width, height=400, title="t")
    boxes = list(label_boxes(svg))
    assert len(boxes) >= len(points) // 2 and svg.count('class="hit"') == len(points) == 23
    for i, a in enumerate(boxes):
        assert a[0] >= 0 and a[2] <= width
        for b in boxes[:i]:
            assert not (a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]), (a, b)


def test_ruinous_and_infinite_points_stand_in_the_band_and_leave_the_scale_alone():
    fine = [chart_point("none", 32, 10.0), chart_point("int8", 8, 10.1)]
    spots = re.compile(r'<circle class="mark" cx="([\d.]+)" cy="([\d.]+)"')
    svg = trade_off_svg(
        [*fine, chart_point("int2", 2, 1e9), chart_point("int1", 1.5, None)],
        hidden_size=64,
        base_ppl=10.0,
        width=556,
        height=400,
        title="t",
    )
    y_none, y_int8 = (float(y) for _, y in spots.findall(svg))
    assert y_none - y_int8 > 50 and 'class="band"' in svg and svg.count('<path class="mark"') == 2
    assert 'class="band"' not in trade_off_svg(fine, hidden_size=64, base_ppl=10.0, width=556, height=400, title="t")


def test_published_figures():
    figures = read_published()
    by_method = {(p.method, p.first_k_tokens): p for p in figures.points}
    assert len(figures.points) == len(by_method) == 62
    nf4 = by_method["bnb_nf4", 0]
    assert round(nf4.ppl, 3) == 6.768 and round(nf4.bits_per_value, 2) == 4.5 and nf4.causal
    assert not by_method["BlockRowColMean_Tb2Fb2", 10_000].causal


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"dtype",\n  "first_k_tokens"', '"first_k_tokens",\n  "dtype"', "columns are method, first_k_tokens, dtype,"),
        ("6.726", '"x"', "Invalid JSON"),
        ('"bf16", 0, 6.', '"bf16", 0, -6.', r"rows\[16\]\[3\] is '-6"),
    ],
)
def test_damaged_published_figures_are_refused(old, new, told, tmp_path, monkeypatch):
    text = published.PUBLISHED_FILE.read_text()
    assert old in text
    path = tmp_path / "published.json"
    path.write_text(text.replace(old, new))
    monkeypatch.setattr(published, "PUBLISHED_FILE", path)
    with pytest.raises(RecordError, match=f"^{re.escape(str(path))} is damaged: {told}"):
        read_published()


@pytest.mark.parametrize(
    "value, text",
    [
        (1234.5, "1,230"),
        (99.96, "100"),
        (12.34, "12.3"),
        (0.012345, "0.0123"),
        (0.0, "0"),
        (0.0001, "0.0001"),
        (0.0000999, "9.99e-05"),
        (1e-14, "1.00e-14"),
        (9.99e14, "999,000,000,000,000"),
        (-1e300, "-1.00e+300"),
        (None, "–"),
        (float("inf"), "not finite"),
    ],
)
def test_three_digits(value, text):
    assert significant(value) == text


@pytest.mark.parametrize("value, text", [(0.0127, "+1.27%"), (-0.001, "-0.10%"), (7.67, "× 8.67"), (None, "–")])
def test_changes(value, text):
    assert percent(value) == text


@pytest.mark.parametrize(
    "value, text",
    [(None, "not finite"), (12.34567, "12.3457"), (999.9, "999.9000"), (123456.7, "123,457"), (1e300, "1.00e+300")],
)
def test_perplexities(value, text):
    assert perplexity(value) == text


@pytest.mark.parametrize("width", [350, 556])
def test_labels_among_many_points_stand_beside_their_marks(width):
    bits = [1.2 * 1.012**i for i in range(200)]
    points = [chart_point(f"klt(step={b:.3f})", b, 10 + 10 / b + 0.3 * (i % 5)) for i, b in enumerate(bits)]
    svg = trade_off_svg(points, hidden_size=64, base_ppl=10.0, width=width, height=400, title="t")
    boxes = list(label_boxes(svg))
    assert 3 <= len(boxes) < 50 and svg.count('class="hit"') == 200
    for i, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])
    leaders = re.findall(r'class="leader" x1="(.*?)" y1="(.*?)" x2="(.*?)" y2="(.*?)"', svg)
    assert all(math.dist((float(x), float(y)), (float(u), float(v))) < 20 for x, y, u, v in leaders)
