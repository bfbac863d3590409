"""The report page in a real browser: it sorts, predicts, shows figures, and fits a phone.

Headless Chromium opens a copy of the page with one more script, which acts as a user would and writes what
it sees into the document's title; the browser prints the document.
"""

import json
import re
import shutil
import struct
import subprocess
from html import unescape

import numpy as np
import pytest

from pipeline.partition.plan import default_plan
from pipeline.report.columns import significant
from pipeline.report.html_page import html_page
from pipeline.report.prediction import Network, emulated_network, predict_decode, predict_prefill
from pipeline.report.recommendation import Outlook
from pipeline.report.results import read_results
from tests.helpers.records import PLAN, losses, write_point

CHAIN = PLAN.chain_names
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on the PATH to open the report in"),
]


def browse(page, *arguments):
    """Open a file in the browser and return what it prints."""
    # Browsers do not start in a sandbox as root, and containers have a small /dev/shm.
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ]
    profile = page.parent / "profile"
    done = subprocess.run(
        [*command, f"--user-data-dir={profile}", *arguments, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(results, tmp_path, script):
    """Run `script` in the page and return what it sets `answer` to."""
    acting = f"<script>let answer;\n{{\n{script}\n}}\ndocument.title = JSON.stringify(answer);</script>"
    page = tmp_path / "acting.html"
    page.write_text(html_page(results, Outlook()).replace("</body>", acting + "</body>"), encoding="utf-8")
    printed = browse(page, "--dump-dom")
    return json.loads(unescape(re.search(r"<title>(.*?)</title>", printed, re.DOTALL).group(1)))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    write_point(folder)
    write_point(folder, "int8", loss=losses(0.004, spread=0.01), nbytes=66)
    write_point(folder, "nf4", loss=losses(0.08), nbytes=36)
    write_point(folder, "outlier(channels=8, inner=int4)", loss=losses(0.05), nbytes=34, causal=False)
    write_point(folder, "int2", loss=losses(2.5), nbytes=20)  # perplexity in the hundreds: 9 sorts before 100
    write_point(folder, "int1", loss=np.full(400, np.nan, np.float32), nbytes=12)
    return read_results([folder])


COLUMN = """
const table = document.querySelector("#points table");
const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent.trim());
const button = (text) => [...table.querySelectorAll("thead button")].find((b) => b.textContent === text);
"""


def test_a_click_sorts_by_numbers_a_second_one_turns_around(results, tmp_path):
    script = (
        COLUMN
        + """
    const before = names();
    button("perplexity").click(); const up = names();
    const sorted = button("perplexity").closest("th").getAttribute("aria-sort");
    button("perplexity").click(); const down = names();
    button("codec").click(); const byName = names();
    answer = [before, up, sorted, down, byName, table.querySelectorAll("[aria-sort]").length];
    """
    )
    before, up, sorted_, down, by_name, num_sorted = ask(results, tmp_path, script)
    points = {p.label + ("" if p.causal else "\N{NO-BREAK SPACE}*"): p for p in results.points}
    assert before == list(points)
    finite = sorted((name for name in points if points[name].ppl is not None), key=lambda name: points[name].ppl)
    assert up == [*finite, "int1"] and down == [*finite[::-1], "int1"]  # what is missing stays last
    assert sorted_ == "ascending" and num_sorted == 1
    assert by_name == ["int1", "int2", "int8", "nf4", "none", "outlier(channels=8, inner=int4)\N{NO-BREAK SPACE}*"]


def test_headings_can_be_reached_and_pressed_by_keyboard(results, tmp_path):
    script = (
        COLUMN
        + """
    const headings = [...document.querySelectorAll("table.sortable thead th")];
    const reachable = (button) => { button.focus(); return document.activeElement === button; };
    answer = headings.map((heading) => reachable(heading.querySelector("button")));
    """
    )
    reachable = ask(results, tmp_path, script)
    assert len(reachable) > 15 and all(reachable)


@pytest.mark.parametrize("mbits, rtt_ms", [(100, 1), (0.5, 1), (1000, 300), (37.5, 12), (1e-12, 0), (1e12, 0)])
def test_the_script_predicts_what_python_predicts(results, tmp_path, mbits, rtt_ms):
    script = f"""
    const form = document.getElementById("network");
    form.elements.bandwidth.value = "{mbits}"; form.elements.rtt.value = "{rtt_ms}";
    form.dispatchEvent(new Event("input", {{ bubbles: true }}));
    const texts = (row) => [...row.cells].slice(2).map((cell) => cell.textContent);
    answer = [...document.querySelectorAll("#own-link tbody tr")].map(texts);
    """
    network = Network(bits_per_s=mbits * 1e6, rtt_s=rtt_ms / 1e3)
    expected = []
    for point in results.points:
        prefill, decode = predict_prefill(point.costs, network), predict_decode(point.costs, network)
        expected.append(
            [
                significant(prefill.tokens_per_s),
                prefill.binds,
                significant(1e3 * decode.s_per_token),
                decode.binds,
            ]
        )
    assert ask(results, tmp_path, script) == expected


def test_the_script_predicts_under_unlike_links_what_python_predicts(tmp_path):
    """The networks that were emulated can be chosen, for all codecs; a point with other links is left out."""
    write_point(tmp_path)
    links = {name: {"bits_per_s": 1e6 * (i + 1), "delay_s": 0.01 * i, "jitter_s": 0.0} for i, name in enumerate(CHAIN)}
    links[CHAIN[2]] = {"bits_per_s": None, "delay_s": 0.2, "jitter_s": 0.1}
    write_point(tmp_path, "nf4", nbytes=36, emulation={"links": links, "slowdown": []})
    write_point(tmp_path, "int8", nbytes=66, plan=default_plan(8, 2))
    results = read_results([tmp_path])
    script = """
    const form = document.getElementById("network");
    const choose = (value) => {
      form.elements.network.value = value;
      form.dispatchEvent(new Event("input", { bubbles: true }));
      const rows = [...document.querySelectorAll("#own-link tbody tr")];
      return rows.map((row) => [...row.cells].slice(2).map((cell) => cell.textContent));
    };
    const before = choose(""), under = choose("0"), disabled = form.elements.bandwidth.disabled, after = choose("");
    answer = [before, under, disabled, after, [...form.elements.network.options].map((o) => o.textContent)];
    """
    before, under, disabled, after, names = ask(results, tmp_path, script)
    emulated = results.points[1]
    network = emulated_network(emulated.record.emulation)
    expected = []
    for point in results.points[:2]:
        prefill, decode = predict_prefill(point.costs, network), predict_decode(point.costs, network)
        figures = [significant(prefill.tokens_per_s), prefill.binds]
        expected.append([*figures, significant(1e3 * decode.s_per_token), decode.binds])
    assert under == [*expected, ["–", "", "–", ""]]
    assert disabled and before == after and before[:2] != expected and "–" not in before[2]
    assert names == ["the same on every link", f"as emulated: {emulated.network}"]


def test_a_bandwidth_of_nothing_is_refused(results, tmp_path):
    script = """
    const form = document.getElementById("network");
    form.elements.bandwidth.value = "0"; form.dispatchEvent(new Event("input"));
    answer = form.elements.problem.value;
    """
    assert "above 0" in ask(results, tmp_path, script)


def test_a_point_of_the_chart_shows_its_figures(results, tmp_path):
    script = """
    const tip = document.getElementById("tip");
    const point = document.querySelector(".wide .point");
    const hidden = tip.hidden;
    point.dispatchEvent(new PointerEvent("pointerenter"));
    answer = [hidden, tip.hidden, tip.textContent];
    """
    hidden, hidden_after, text = ask(results, tmp_path, script)
    assert hidden and not hidden_after and text.startswith("codec: none\nperplexity: ")


@pytest.mark.parametrize("width, emulated", [(390, False), (1280, False), (390, True)])
def test_only_tables_scroll_sideways(results, tmp_path, width, emulated):
    """In a frame of the width of a phone, since a browser's window cannot be that narrow."""
    if emulated:
        links = {name: {"bits_per_s": 1e6 + i, "delay_s": 0.01, "jitter_s": 0.002} for i, name in enumerate(CHAIN)}
        write_point(tmp_path, emulation={"links": links, "slowdown": [1, 1, 3, 1]})
        write_point(tmp_path, "nf4", emulation={"links": links | {CHAIN[0]: links[CHAIN[1]]}, "slowdown": []})
        results = read_results([tmp_path])
    (tmp_path / "report.html").write_text(html_page(results, Outlook()), encoding="utf-8")
    framed = f'<iframe id="frame" src="report.html" style="width:{width}px;height:900px;border:0"></iframe>'
    script = """<script>
    const frame = document.getElementById("frame");
    frame.addEventListener("load", () => {
      const page = frame.contentDocument, width = page.documentElement.clientWidth;
      const parts = page.querySelectorAll("main > *, main > section > *, figure, svg text, select");
      const wide = [...parts].filter((element) => {
        const box = element.getBoundingClientRect();
        return box.width > 0 && (box.right > width + 0.5 || box.left < -0.5);
      });
      const shown = ["wide", "narrow"].filter((name) => page.querySelector("." + name).offsetWidth > 0);
      const culprits = wide.map((element) => element.outerHTML.slice(0, 80));
      document.title = JSON.stringify([page.documentElement.scrollWidth, width, culprits, shown]);
    });
    </script>"""
    outer = tmp_path / "framed.html"
    outer.write_text(f"<!doctype html><title></title><body style='margin:0'>{framed}{script}</body>", encoding="utf-8")
    printed = browse(outer, "--allow-file-access-from-files", "--window-size=1400,1000", "--dump-dom")
    scroll_width, page_width, wide, shown = json.loads(unescape(re.search(r"<title>(.*?)</title>", printed).group(1)))
    assert page_width == width and scroll_width == width and wide == []
    assert shown == (["narrow"] if width == 390 else ["wide"])


@pytest.mark.parametrize("scheme, dark", [(0, True), (1, False)])
def test_screenshot_of_the_sorted_page_in_light_and_dark(results, tmp_path, scheme, dark):
    acting = "<script>[...document.querySelectorAll('#points thead button')][1].click();</script></body>"
    page = tmp_path / "sorted.html"
    page.write_text(html_page(results, Outlook()).replace("</body>", acting), encoding="utf-8")
    shot = tmp_path / "shot.png"
    browse(
        page,
        f"--blink-settings=preferredColorScheme={scheme}",
        "--window-size=1280,1600",
        f"--screenshot={shot}",
    )
    assert struct.unpack(">II", shot.read_bytes()[16:24]) == (1280, 1600)
    from matplotlib import image

    pixels = image.imread(shot)[..., :3]
    background = pixels[5, 5].mean()
    assert background < 0.2 if dark else background > 0.9
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # text and marks, not an empty page


def test_a_long_table_scrolls_under_its_heading(tmp_path):
    for number in range(60):
        write_point(tmp_path, f"klt(step={number})" if number else "none", nbytes=256 - number)
    script = """
    const box = document.querySelector("#points .scroller"), heading = box.querySelector("thead th");
    const offset = () => heading.getBoundingClientRect().top - box.getBoundingClientRect().top;
    const before = offset();
    box.scrollTop = 300;
    answer = [box.clientHeight < window.innerHeight, box.scrollTop, before, offset()];
    """
    fits, scrolled, before, after = ask(read_results([tmp_path]), tmp_path, script)
    assert fits and scrolled == 300 and after == pytest.approx(before, abs=1)
