"""Whatever lies in a folder of results: a report names and skips it or shows it; the other points stay as they were.

Files are made odd in every way that a disk, another program or another version may make them.
"""

import copy
import csv
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from pipeline.records.files import RecordError
from pipeline.records.store import read_any, read_record
from pipeline.report.html_page import html_page
from pipeline.report.importance_curves import collect
from pipeline.report.plots import plot_rate_quality
from pipeline.report.recommendation import Outlook, recommendation_text
from pipeline.report.results import load_files, load_records, read_results, setting_key
from pipeline.report.summary import print_summary, summary_rows, write_report
from pipeline.report.text_page import csv_table, markdown_page
from tests.helpers.marks import slow_but
from tests.helpers.records import (
    PLAN,
    losses,
    make_drafts,
    make_record,
    write_failed_point,
    write_generation_point,
    write_point,
)

MARKUP = "<script>alert(1)</script>"
LINK = PLAN.links[0].name
DEEP = "deep nesting stands here"
HUGE = "a float beyond the largest one stands here"
ODD_VALUES = [
    None, True, False, 0, -1, 1, 3.5, -0.0, 5e-324, 1e308, -1e308, 10**400, -(10**400), float("nan"), float("inf"),
    HUGE, "", "0", "x", MARKUP, '"><b>', "$x^{$", "\\frac{", "a\nb|c,d", "\x00\x1b[2J", "\ud800", "é–×", "2026",
    "9" * 5000, [], {}, [[]], [1], [1, 2, 3], [None], ["x"], {"": 1}, {"name": 1}, {"name": "none"}, {"x?": 1},
    {MARKUP: MARKUP}, DEEP,
]  # fmt: skip


def places(value, prefix=()):
    """Paths of all parts of a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*prefix, key)
        yield from places(child, (*prefix, key))


def changed(record, changes):
    """`record` with `changes` applied: (place, whether to delete, else the new value). Returns JSON text."""
    record = copy.deepcopy(record)
    for place, delete, value in changes:
        owner = record
        try:
            for key in place[:-1]:
                owner = owner[key]
            owner[place[-1]]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change has taken it away
        if not isinstance(owner, (dict, list)):
            continue
        if delete:
            del owner[place[-1]]
        else:
            owner[place[-1]] = value
    text = json.dumps(record)
    return text.replace(json.dumps(DEEP), "[" * 500 + "]" * 500).replace(json.dumps(HUGE), "1e999")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three whole points, a failed one, and a run that generated."""
    folder = tmp_path_factory.mktemp("records")
    for label, change, nbytes in (("none", 0.0, 256), ("int8", 0.001, 66), ("nf4", 0.05, 36)):
        write_point(folder, label, loss=losses(change), nbytes=nbytes, run_id=label, notes=[])
    write_failed_point(folder, "nf5", "no such codec")
    write_generation_point(folder, "generation")
    return folder


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What is to become odd."""
    path = write_point(tmp_path_factory.mktemp("odd"), "int6", loss=losses(0.009), nbytes=50, run_id="odd")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def generation(tmp_path_factory):
    """What is to become odd, too."""
    path = write_generation_point(tmp_path_factory.mktemp("odd"), "odd", drafts=make_drafts())
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def tables(folder):
    return tables_of(folder)


OWN = ("none", "int8", "nf4")


def tables_of(folder):
    """The rows of the whole points, on the console and in the CSV, and what the folder has besides them."""
    results = read_results([folder])
    page = html_page(results, Outlook())
    assert MARKUP not in page and page.encode()
    markdown_page(results, Outlook()).encode()
    for setting in results.settings:
        recommendation_text(setting, Outlook())
    rows = list(csv.DictReader(io.StringIO(csv_table(results))))
    console = summary_rows(load_records([folder]))
    own = {row["run_id"]: row for row in rows if row["run_id"] in OWN}
    said = {row["codec"]: row | {"note": ""} for row in console if row["codec"] in OWN}
    assert len(console) == len(rows) == len(results.points)
    (generated,) = [run for run in results.generated if run.run_id == "generation"]
    return own, said, generated, len(rows) + len(results.generated), results


def check(folder, tables, name):
    """The file is shown or named, and the other points are as without it."""
    *found, count, results = tables_of(folder)
    named = [text for text in results.skipped if name in text]
    failed = len(results.failed) - 1
    assert (count - len(OWN) - 1) + len(named) + failed == 1, results.skipped
    assert found == list(tables[:3])


def put(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


FOLDER = Path(__file__).parent / "records"
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec=None)), inner, max_size=3),
    max_leaves=6,
)
CHANGES = st.tuples(st.integers(0, 10_000), st.booleans(), st.sampled_from(ODD_VALUES) | ANY_JSON)
SAMPLES = sorted(path.name for path in FOLDER.glob("*.json"))



@pytest.mark.slow
@pytest.mark.parametrize("sample", ["record", "generation", "failed point", *SAMPLES], ids=str)
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(CHANGES, min_size=1, max_size=3))
def test_reading_gives_a_record_or_a_record_error(sample, changes, folder, record, generation):
    """Of every kind and version; what is read can be written again, and comes back as it was."""
    whole = {"record": record, "generation": generation, "failed point": json.loads(failure_of(folder))}
    value = whole[sample] if sample in whole else json.loads((FOLDER / sample).read_text())
    everywhere = list(places(value))
    chosen = [(everywhere[number % len(everywhere)], delete, value) for number, delete, value in changes]
    path = put(folder.parent, "odd.json", changed(value, chosen))
    try:
        read = read_any(path)
    except RecordError as e:
        assert str(e).startswith(str(path)) and len(str(e)) < 1000
        return
    put(folder.parent, "odd.json", json.dumps(read.model_dump(mode="json")))
    assert read_any(path) == read


def failure_of(folder):
    return (folder / "failed-1.json").read_text()


@pytest.mark.slow
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(CHANGES, min_size=1, max_size=3))
def test_a_record_of_odd_values(folder, record, tables, changes):
    everywhere = list(places(record))
    chosen = [(everywhere[number % len(everywhere)], delete, value) for number, delete, value in changes]
    path = put(folder, "odd.json", changed(record, chosen))
    try:
        check(folder, tables, "odd.json")
    finally:
        path.unlink()


@pytest.mark.slow
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(CHANGES, min_size=1, max_size=3))
def test_a_record_of_generation_of_odd_values(folder, generation, tables, changes, capsys):
    everywhere = list(places(generation))
    chosen = [(everywhere[number % len(everywhere)], delete, value) for number, delete, value in changes]
    path = put(folder, "odd.json", changed(generation, chosen))
    try:
        check(folder, tables, "odd.json")
        print_summary([folder])
        assert "\x1b" not in capsys.readouterr().out
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("schema_version",), 6, "schema_version is '6', this program reads 1 to 5"),
        (("schema_version",), True, "schema_version is 'True', this"),
        (("results", "tokens_per_s"), 10**400, "results.tokens_per_s is"),
        (("results", "num_requests"), -1, "results.num_requests is '-1': input should be greater than or equal to 0"),
        (("results", "ttft_s"), [], "results.ttft_s is '[]'"),
        (("traffic_per_link",), [], "traffic_per_link is '[]'"),
        (("results", "num_failed"), 0, "results.num_failed is 0, the sum over requests 1"),
        (("results", "generated_tokens"), 13, "results.generated_tokens is 13, the sum over requests 12"),
        (("traffic_per_link", LINK, "bytes_per_token"), 6, f"traffic_per_link.{LINK}.bytes_per_token is 6.0, "),
        (("codecs",), {}, "traffic_per_link, codecs and codecs_decode name other links"),
        (("drafts", "drafters", 0, "by_depth", 1, "right"), 5, "by_depth[1]: right is 5, judged only 4"),
        (("drafts", "drafters"), [], "drafts.drafters is '[]'"),
        (("drafts", "drafters", 1, "name"), "ngram", "drafts: a drafter stands twice in drafters"),
        (("drafts", "rows_by_tokens", 0), 3, "drafts: passes is 10, the sum over rows_by_tokens 11"),
        (("drafts", "rows_by_in_flight", 1), 5, "drafts: passes is 10, the sum over rows_by_in_flight 9"),
        (("drafts", "limits", "depth"), 1, "drafts: rows_by_tokens has rows of 3 tokens, limits.depth allows fewer"),
        (("drafts", "void"), 11, "drafts: void is 11, more than 10"),
        (("drafts", "drafters", 0, "by_depth", 0, "judged"), 15, "drafts: judged is 21, more than 18"),
        (("drafts", "tokens"), 23, "drafts: tokens is 23, more than 22"),
        (("drafts", "tokens_per_pass"), 1.4, "drafts: tokens_per_pass is 1.4, its counts give 1.5"),
        (("drafts", "costs", "num_tokens", 1), 1, "drafts.costs: num_tokens does not rise"),
        (("drafts", "costs", "busy_s"), [], "drafts.costs: 2 num_tokens, 2 lap_s, 0 busy_s"),
        (("requests", 0, "num_drafts_accepted"), 7, "num_drafts_accepted of line 1 is 7, of 6 tokens"),
        (("drafts",), None, None),
        (("notes",), ["\x1b[2J"], None),
        (("args", "config", "compressor"), {"name": MARKUP}, None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_odd_in_a_record_of_generation_is_told(place, value, told, folder, generation, tables):
    path = put(folder, "odd.json", changed(generation, [(place, False, value)]))
    try:
        check(folder, tables, "odd.json")
        skipped = "\n".join(read_results([folder]).skipped)
        assert told in skipped if told else skipped == ""
    finally:
        path.unlink()


def test_the_codec_of_sampled_tokens_is_named_once(tables):
    assert tables[2].label == "nf4, decoding int8"


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("plan", 0, "layers"), [], "it lacks plan[0].layers[0]"),
        (("plan", 0, "layers"), [5, 2], "plan[0]: layers of stage 0 are [5, 2], not a start and an end"),
        (("plan",), [], "stages are"),
        (("stages",), {}, "stages are '', those of the plan '0, 1, 2, 3, 4'"),
        (("plan", 1, "stage"), 0, "stages are '0, 1, 2, 3, 4', those of the plan '0, 2, 3, 4'"),
        (("plan",), [{"stage": n, "node": 0, "layers": [0, 1]} for n in (0, 1, 2, 3, 4, 4)], "a stage stands twice"),
        (("one_token", "links"), {}, "one_token.links has '', the run 'layer:0:node0->node1"),
        (("one_token", "stages"), {}, "one_token.stages has '', the run '0, 1, 2, 3, 4'"),
        (("reconstruction",), {"x": {"relative_squared_error": 0.1}}, "reconstruction has 'x', the run 'layer:0:"),
        (("codecs_decode",), {"x": {"name": "nf4"}}, "codecs_decode has 'x', the run 'layer:0:"),
        (("schedule", "in_flight"), 0, "schedule.in_flight is '0'"),
        (("results", "avg_ppl"), 0, "results.avg_ppl is '0'"),
        (("results", "avg_ppl"), 10**400, "results.avg_ppl is"),
        (("timed_tokens",), 10**400, "timed_tokens is '1000000"),
        (("traffic_totals", "bits_per_value"), 10**400, "traffic_totals.bits_per_value is"),
        (("stages", "0", "compute_s"), -1.0, "stages.0.compute_s is '-1.0'"),
        (("traffic_totals", "total_bytes"), 1, "traffic_totals.total_bytes is 1, the sum over links 160000"),
        (("traffic_totals", "total_tx"), 1, "traffic_totals.total_tx is 1, the sum over links 32"),
        (("traffic_totals", "bytes_per_token"), 5.0, "traffic_totals.bytes_per_token is 5.0, its counts give 50.0"),
        (("traffic_totals", "bits_per_value"), None, "traffic_totals.bits_per_value is None, its counts give 6.25"),
        (("traffic_per_link", LINK, "bytes"), 0, "traffic_totals.total_bytes is 160000, the sum over links 120000"),
        (("traffic_per_link", LINK, "bits_per_value"), 1, f"traffic_per_link.{LINK}.bits_per_value is 1.0, "),
        (("ranks",), [], "ranks is empty"),
        (("finished_at",), "yesterday", "finished_at: 'yesterday' is no time in ISO 8601"),
        (("causal",), 1, "causal is '1'"),
        (("timed_tokens",), True, "timed_tokens is 'True'"),
        (("digest",), ["x"], "digest is"),
        (("args", "model_name"), "\ud800", "is not a complete JSON file: 'utf-8' codec can't encode"),
        (("tokens_per_s",), HUGE, "is not a complete JSON file: Out of range float values"),
        (("model", "extra"), 0, "model.extra is not a key of it"),
        (("args", "config", "wandb"), DEEP, "recursion limit exceeded"),
        (("args", "config", "wandb"), [[1]], None),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_is_odd_is_told(place, value, told, folder, record, tables):
    extra = {"model": record["model"] | {"extra": 0}} if "extra" in place else {}
    path = put(folder, "odd.json", changed(record | extra, [(place, False, value)]))
    try:
        check(folder, tables, "odd.json")
        assert told is None or told in "\n".join(read_results([folder]).skipped)
    finally:
        path.unlink()


def test_times_that_are_all_zero_bind_nothing(tmp_path):
    zero = {"compute_s": 0, "compress_s": 0, "decompress_s": 0, "wait_s": 0}
    silent = {link.name: {"bytes": 0, "header_bytes": 0} for link in PLAN.links}
    write_point(tmp_path, "int8", nbytes=0, stages={str(i): zero for i in range(5)}, traffic_per_link=silent)
    assert "not finite" in html_page(read_results([tmp_path]), Outlook(rtts_ms=(5e-324,)))


def as_folder(path, text):
    path.mkdir()


def as_pipe(path, text):
    os.mkfifo(path)


def as_loop(path, text):
    path.symlink_to(path)


def as_dangling_link(path, text):
    path.symlink_to(path.with_name("nowhere"))


def as_device(path, text):
    path.symlink_to("/dev/zero")


def as_huge_file(path, text):
    path.write_text(text)
    os.truncate(path, 1 << 40)


def as_unreadable(path, text):
    path.write_text(text)
    path.chmod(0)
    if os.access(path, os.R_OK):
        path.unlink()
        pytest.skip("this user may read everything")


def as_truncated(path, text):
    path.write_text(text[: len(text) // 2])


def as_empty(path, text):
    path.write_text("")


def as_binary(path, text):
    path.write_bytes(np.random.default_rng(0).bytes(3000))


def as_foreign(path, text):
    path.write_text('{"name": "package", "version": 3}')


def as_bottomless(path, text):
    path.write_text("[" * 100_000)


def as_another_version(path, text):
    path.write_text(json.dumps(json.loads(text) | {"schema_version": [2]}))


def as_odd_failure(path, text):
    path.write_text(json.dumps({"kind": "failed point", "label": ["<b>"], "error": {"x": None}}))


def as_empty_failure(path, text):
    path.write_text('{"kind": "failed point"}')


FORMS = [value for name, value in sorted(globals().items()) if name.startswith("as_")]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("kind", slow_but(["record"], ["record", "generation"]))
def test_a_file_of_another_form(kind, form, folder, tables, request):
    path = folder / "odd.json"
    form(path, json.dumps(request.getfixturevalue(kind)))
    try:
        check(folder, tables, "odd.json")
    finally:
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_name_that_is_no_text_and_a_folder_that_cannot_be_listed(folder, tmp_path, capsys, monkeypatch):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b.json")
    try:
        with open(odd, "w") as file:
            file.write("{")
    except OSError as e:
        pytest.skip(f"the file system takes no such name: {e}")
    write_report([folder, tmp_path], tmp_path / "page.html", Outlook())
    for name in ("page.html", "page.md"):
        assert "is not a complete JSON file" in (tmp_path / name).read_text(encoding="utf-8")

    def deny(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.iterdir", deny)
    print_summary([folder])
    assert f"skipped: {folder} cannot be listed: Permission denied" in capsys.readouterr().err


def test_text_that_is_no_formula_can_be_drawn(tmp_path):
    record = make_record("$x^{$", loss=losses(0.1), args={"model_name": "some/$x^{$"})
    plot_rate_quality([record], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


# Per-token files.


def save_columns(path, **changes):
    columns = load_file(path) | changes
    save_file({name: column for name, column in columns.items() if column is not None}, path)


PER_TOKEN = {
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a loop": lambda path: (path.unlink(), path.symlink_to(path)),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "corrupt": lambda path: path.write_bytes(b"\xff" * 200),
    "a huge header": lambda path: path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}"),
    "short": lambda path: save_columns(path, **{name: column[:80] for name, column in load_file(path).items()}),
    "of two lengths": lambda path: save_columns(path, top1=np.zeros(399, np.int32)),
    "of another dtype": lambda path: save_columns(path, loss=losses(0.05).astype(np.float64)),
    "of another shape": lambda path: save_columns(path, loss=losses(0.05).reshape(2, 200)),
    "a scalar": lambda path: save_columns(path, loss=np.array(3.0, np.float32)),
    "of other windows": lambda path: save_columns(path, window=np.zeros(400, np.int32)),
    "without windows": lambda path: save_columns(path, window=None),
    "another run's": lambda path: save_columns(path, loss=losses(0.3)),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", PER_TOKEN.values(), ids=PER_TOKEN)
@pytest.mark.parametrize("which", slow_but(["every codec"], ["none", "nf4", "every codec"]))
def test_an_odd_per_token_file_is_no_verdict(damage, which, tmp_path):
    """It costs the figures that need it, and the report says so where it would have drawn a conclusion from them."""
    whole = {}
    for label, change, nbytes in (("none", 0.0, 256), ("int8", 0.02, 66), ("nf4", 0.05, 36)):
        path = write_point(tmp_path, label, loss=losses(change), nbytes=nbytes, run_id=label)
        whole[label] = path.with_suffix(".safetensors")
    for label in [which] if which in whole else ["int8", "nf4"]:
        damage(whole[label])
    results = read_results([tmp_path])
    assert results.skipped == () and len(results.points) == 3
    (setting,) = results.settings
    text = recommendation_text(setting, Outlook())
    why = {p.label: p.quality_note for p in setting.points}
    unread = {p.label for p in setting.points if p.unread}
    markdown, page = markdown_page(results, Outlook()), html_page(results, Outlook())
    if damage is PER_TOKEN["of other windows"] and which == "none":
        expected = {"int8", "nf4"}  # what the baseline has is whole, and fits none
    else:
        expected = {"none": {"none", "int8", "nf4"}, "nf4": {"nf4"}, "every codec": {"int8", "nf4"}}[which]
    assert unread == expected, why
    if which == "nf4":
        assert text == (
            "No compressed causal point that could be compared stays within +1% perplexity. "
            "Left out: the per-token data of nf4 cannot be used."
        )
        generous = recommendation_text(setting, Outlook(max_ppl_increase=0.1))
        assert "cheapest is int8" in generous and generous.endswith("the per-token data of nf4 cannot be used.")
    else:
        assert text.startswith("No recommendation within +1% perplexity: ")
    for shown in (markdown, page):
        assert shown.count("per-token data cannot be used") >= len(expected)
    listed = {row["codec"]: row for row in csv.DictReader(io.StringIO(csv_table(results)))}
    assert {label for label, row in listed.items() if "per-token data cannot be used" in row["note"]} == expected
    assert {label for label, row in listed.items() if row["ppl_change"] == ""} == expected


# What other commands read from the same folder.


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(CHANGES, min_size=1, max_size=3))
@example(changes=[(0, True, None)])
@example(changes=[(7, False, True)])
@pytest.mark.slow
def test_importance_curves_read_on(tmp_path_factory, record, changes):
    mixed = {"name": "token_mixed", "metric": "norm", "fraction": 0.25}
    mixed |= {"high": {"name": "int8"}, "low": {"name": "int4"}}
    mixed_record = record | {"codecs": {name: mixed for name in record["codecs"]}, "run_id": "mixed"}
    folder = tmp_path_factory.mktemp("curves")
    put(folder, "mixed.json", json.dumps(mixed_record))
    expected = collect(load_files([folder])).points
    parts = ("codecs", "args", "results", "traffic_totals")
    everywhere = [("codecs",), *(place for place in places(mixed_record) if place[0] in parts)]
    chosen = [(everywhere[number % len(everywhere)], delete, value) for number, delete, value in changes]
    put(folder, "odd.json", changed(mixed_record | {"run_id": "odd"}, chosen))
    files = load_files([folder])
    if len({setting_key(record) for _, record in files}) > 1:  # whole, and of another precision
        with pytest.raises(ValueError, match="several models, texts or protocols"):
            collect(files)
        return
    curves = collect(files)
    assert tuple(p for p in curves.points if p.run_id == "mixed") == expected
    json.dumps(curves.model_dump(), allow_nan=False)


def test_a_whole_record_is_whole(folder):
    assert len([read_record(path) for path in sorted(folder.glob("*.json")) if path.stem in OWN]) == 3
