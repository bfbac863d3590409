"""What the benchmark of drafts makes of its measurements; a run of it is not a test's business."""

import pytest

from benchmarks.draft_texts import KINDS, prompts_of
from benchmarks.drafts import (
    Cell,
    Measured,
    acceptance,
    acceptance_table,
    equal_share,
    forced_acceptance,
    main,
    predicted,
    repeated_share,
    row_of,
    table,
)
from pipeline.config.schema import DatasetConfig
from pipeline.drafting.drafter import Draft
from pipeline.records.drafts import Drafts
from tests.helpers.records import make_drafts
from tests.unit import test_docs

ALONE, DRAFTED = Cell("none", "chat", "20ms", "no drafts"), Cell("none", "chat", "50ms", "passes in flight")
FAR_ALONE, FAR_ONE = Cell("none", "chat", "50ms", "no drafts"), Cell("none", "chat", "50ms", "one pass")
CELLS = {
    ALONE: Measured(tokens_per_s=[4.0, 6.0], tpot_s=[0.2, 0.3], answers=[[1, 2, 3, 4]]),
    DRAFTED: Measured(
        tokens_per_s=[8.0, 9.0, 1.0],
        tpot_s=[0.1, 0.1, 0.9],
        drafts=[Drafts.from_plain(make_drafts()), Drafts.from_plain(make_drafts(void=3))],
        answers=[[1, 2, 9, 4]],
    ),
}

ONE_PASS = {
    FAR_ONE: Measured(
        drafts=[Drafts.from_plain(make_drafts(limits={"depth": 8, "passes": 1, "adapts": True}))]
    )
}


def test_rows_and_the_table():
    rows = [row_of(cell, CELLS) for cell in CELLS]
    assert (rows[0]["tokens_per_s"], rows[0]["tpot_s"], rows[0]["equal_share"]) == (5.0, 0.25, 1.0)
    assert rows[0]["void_share"] is rows[0]["drafts_right"] is rows[0]["tokens_per_pass"] is None
    assert rows[1]["first_right"] == 6 / 10 and rows[1]["drafts_right"] == 8 / 14 and rows[1]["void_share"] == 0.2
    rate = rows[1]["predicted_tokens_per_s"]
    assert table(rows).splitlines()[2:] == [
        "| chat, 20ms, no drafts | 5.00 | 250 |  |  |  |  |  | 100% |  |",
        f"| chat, 50ms, passes in flight | 8.00 | 100 | {rate:.2f} | 1.50 | 60% | 57% | 20% | 50% |  |",
    ]
    other = rows[0] | {"codec": "nf4"}
    assert "| `nf4`, chat, 20ms, no drafts |" in table([rows[0], other])
    assert row_of(DRAFTED, {DRAFTED: CELLS[DRAFTED]})["equal_share"] is None
    strange = Cell("none", "text", "50ms", "passes in flight")
    assert row_of(strange, CELLS | {strange: CELLS[DRAFTED]})["equal_share"] is None  # of another text


def test_what_is_predicted_is_of_the_ring_that_was_measured():
    drafts = CELLS[DRAFTED].drafts
    # Of ten rows behind certain tokens four, and one of these had no draft; eight at depth 2 are too few.
    assert acceptance(drafts) == pytest.approx([0.75 * 16 / 29])
    assert acceptance(drafts * 3) == pytest.approx([0.75 * 36 / 60, 12 / 25])
    cells = CELLS | {FAR_ALONE: CELLS[ALONE]}
    assert predicted(FAR_ALONE, cells) == pytest.approx(1 / (0.04 + 0.16))  # a lap, and what is no work
    assert predicted(DRAFTED, cells) > predicted(FAR_ONE, cells | ONE_PASS) > 5.0
    assert predicted(ALONE, CELLS) is None  # nothing was drafted at this delay


def test_tokens_before_the_first_that_differs_are_equal():
    assert equal_share([[1, 2, 3], [4, 5]], [[1, 9, 3], [4, 5]]) == 3 / 5


def test_grams_that_stood_there_before():
    once = [1, 2, 3, 4, 5, 6, 7, 8]
    assert repeated_share([once]) == 0.0 and repeated_share([once[:7]]) is None
    assert repeated_share([once * 2]) == 1 / 9  # of nine, the last
    assert repeated_share([once, once]) == 0.0


class Counting:
    """Drafts the next three numbers."""

    def draft(self, slot, ids):
        return iter(Draft(ids[-1] + step, 0.5) for step in (1, 2, 3))


def test_forced_acceptance_by_depth():
    # Behind 1 come 2, 3 and no 4; behind 2 comes 3; behind 3 no 4; behind 9 comes 10, and then the text ends.
    assert forced_acceptance(Counting(), [1, 2, 3, 9, 10], start=1, depth=3) == [(4, 3), (2, 1), (1, 0)]
    assert forced_acceptance(Counting(), [1, 2, 3, 9, 10], start=4, depth=2) == [(1, 1), (0, 0)]


def test_the_table_of_acceptance():
    by_depth = [{"judged": 5, "right": 4}, {"judged": 0, "right": 0}]
    rows = [{"text": "chat", "num_tokens": 11, "drafter": "ngram", "by_depth": by_depth}]
    assert acceptance_table(rows).splitlines()[2] == "| chat, `ngram` | 50% | 80% |  |"


def test_printed_tables_can_stand_in_the_documents():
    rows = [row_of(cell, CELLS) for cell in CELLS]
    by_depth = [{"judged": 7, "right": 4}, {"judged": 0, "right": 0}]
    forced = [{"text": "chat", "num_tokens": 12, "drafter": "ngram", "by_depth": by_depth}]
    for printed, known in (
        (table(rows), test_docs.of_drafts({"ladder": rows})),
        (table([rows[0], rows[1] | NF4]), test_docs.of_drafts({"codecs": [rows[0], rows[1] | NF4]})),
        (acceptance_table(forced), test_docs.of_acceptance({"acceptance": forced})),
    ):
        headings, _, *lines = map(test_docs.cells, printed.splitlines())
        for label, *shown in lines:
            for heading, cell in zip(headings[1:], shown, strict=True):
                expected = known[label].get(heading, [])
                assert test_docs.TestFigures().problem(cell, expected) is None, (label, heading)
        assert any(cell for _, *shown in lines for cell in shown)


NF4 = {"codec": "nf4"}


def test_prompts_of_every_kind():
    for kind in KINDS:
        prompts = prompts_of(kind, DatasetConfig(), 2)
        assert len(prompts) == 2 and all(prompt.keys() in ({"prompt"}, {"messages"}) for prompt in prompts)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--modes", "no drafts,fast"], "--modes: 'fast' is none of no drafts, one pass, passes in flight"),
        (["--kinds", "poems"], "--kinds: 'poems' is none of repetitive, chat, text"),
        (["--part", "codecs", "--codecs", "lzma"], "--codecs: 'lzma' is none of none, int8"),
        (["--part", "codecs", "--codecs", "klt 0.42"], "--codecs: klt 0.42 needs --calibration"),
    ],
)
def test_what_is_asked_for_is_checked(words, told, capsys):
    with pytest.raises(SystemExit) as raised:
        main(["--config", "demo.yaml", *words])
    assert raised.value.code == 2 and told in capsys.readouterr().err
