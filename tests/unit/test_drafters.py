"""Drafters by name, and the n-gram drafter against a naive one."""

import itertools
import random
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.reading import load_config
from pipeline.config.schema import DRAFTERS, ConfigError
from pipeline.drafting.drafter import Draft
from pipeline.drafting.ngram import Ngram
from pipeline.drafting.registry import check_drafters, make_drafters

CONTEXT = SimpleNamespace()  # of which these drafters need nothing
HERE = "tests.unit.test_drafters"
ROOT = Path(__file__).parents[2]


class Steady:
    """Always the same token."""

    name = "steady"

    def __init__(self, *, context, token=7):
        self.context, self.token = context, token

    def draft(self, slot, ids):
        while True:
            yield Draft(self.token, 0.5)


class Twin(Steady):
    pass


class Needy(Steady):
    name = "needy"

    def __init__(self, *, context, path):
        raise ValueError(f"path is {path!r}, which is no folder")


class Nameless:
    def draft(self, slot, ids):
        return iter(())


class WithoutContext(Steady):
    name = "without"

    def __init__(self):
        pass


class Usurper(Steady):
    name = "ngram"


def test_drafters_in_the_order_of_the_config():
    steady, ngram = make_drafters([f"{HERE}:Steady(token=9)", "ngram(longest=3, shortest=2)"], CONTEXT)
    assert (steady.name, steady.token, steady.context) == ("steady", 9, CONTEXT)
    assert isinstance(ngram, Ngram)
    assert make_drafters([], CONTEXT) == []


@pytest.mark.parametrize(
    "specs, message",
    [
        (["ngrm"], "unknown drafter 'ngrm', did you mean 'ngram'?; built-in: ngram, shortcut; a class of your own"),
        (["ngram(longest=4"], "drafter 'ngram(longest=4' is not of the form name or name(option=value, ...)"),
        (["ngram(4)"], "drafter 'ngram(4)': write '4' as option=value"),
        (["ngram(longest=4, longest=5)"], "option longest is given twice"),
        (["ngram", "ngram(longest=4)"], "drafter 'ngram' is named twice"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_config(specs, message):
    for refusing in (lambda: load_config(None, [("generation.draft", specs)]), lambda: check_drafters(specs)):
        with pytest.raises(ConfigError, match=re.escape(message)) as refused:
            refusing()
        assert str(refused.value).startswith("generation.draft: ")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("ngram(longst=4)", "drafter 'ngram' has no option 'longst' (got 4), did you mean 'longest'?; allowed: lon"),
        ("ngram(context=4)", "drafter 'ngram' has no option 'context' (got 4); allowed: longest, shortest"),
        (f"{HERE}:Needy", f"drafter '{HERE}:Needy' needs option 'path'; its options: path"),
        ("no_such_module:Mine", "drafter 'no_such_module:Mine': cannot import module 'no_such_module'"),
        (f"{HERE}:Missing", f"module '{HERE}' has no 'Missing'"),
        (f"{HERE}:CONTEXT", "CONTEXT is not a class with a method draft(slot, ids)"),
        (f"{HERE}:Nameless", "Nameless has no class attribute `name`"),
        (f"{HERE}:WithoutContext", "WithoutContext.__init__ must take the keyword argument context"),
        (f"{HERE}:Usurper", "Usurper.name is 'ngram', which is a shipped one's"),
    ],
)
def test_classes_and_options_are_checked_before_there_is_a_model(spec, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        check_drafters([spec])
    assert str(refused.value).startswith("generation.draft: ")


@pytest.mark.parametrize(
    "specs, message",
    [
        (["ngram(longest=0)"], "drafter 'ngram': longest is 0, allowed: an integer from 1 to 16"),
        (["ngram(longest=true)"], "drafter 'ngram': longest is True, allowed: an integer from 1 to 16"),
        (["ngram(longest=3, shortest=4)"], "drafter 'ngram': shortest is 4, allowed: an integer from 1 to 3"),
        ([f"{HERE}:Needy(path=x)"], f"drafter '{HERE}:Needy': path is 'x', which is no folder"),
        ([f"{HERE}:Steady", f"{HERE}:Twin"], "two drafters are called 'steady'"),
    ],
)
def test_what_a_drafter_refuses_names_it(specs, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_drafters(specs, CONTEXT)


def test_the_config_page_names_those_that_are_shipped():
    page = (ROOT / "docs/drafts.md").read_text()
    assert all(f"`{name}" in page for name in DRAFTERS)


def naive(ids, longest, shortest, count):
    """Token ids that the n-gram drafter is to draft, as its docstring says."""
    for length in range(min(longest, len(ids) - 1), shortest - 1, -1):
        for end in range(len(ids) - 1, length - 1, -1):
            if ids[end - length : end] == ids[-length:]:
                drafts = list(ids)
                for place in range(end, end + count):
                    drafts.append(drafts[place])
                return drafts[len(ids) :]
    return []


changes = st.lists(
    st.one_of(
        st.tuples(st.just("grow"), st.lists(st.integers(0, 3), min_size=1, max_size=12)),
        st.tuples(st.just("crop"), st.integers(0, 12)),
        st.tuples(st.just("swap"), st.lists(st.integers(0, 3), min_size=1, max_size=30)),
        st.tuples(st.just("edit"), st.integers(0, 30)),
    ),
    min_size=1,
    max_size=12,
)


@given(changes, st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_ngrams_are_those_of_a_naive_search(changes, longest, shortest, is_tuple):
    longest, shortest = max(longest, shortest), min(longest, shortest)
    drafter = Ngram(context=CONTEXT, longest=longest, shortest=shortest)
    slots = {0: [1], 1: [2, 2]}
    for turn, (what, value) in enumerate(changes):
        ids = slots[turn % 2]
        if what == "grow":
            ids = [*ids, *value]
        elif what == "crop":
            ids = ids[: max(1, len(ids) - value)]
        elif what == "swap":
            ids = list(value)
        elif value < len(ids):
            ids = [*ids[:value], 9, *ids[value + 1 :]]
        slots[turn % 2] = ids
        drafts = list(itertools.islice(drafter.draft(turn % 2, tuple(ids) if is_tuple else ids), 9))
        assert [draft.token_id for draft in drafts] == naive(ids, longest, shortest, 9)
        assert all(0 < draft.confidence < 1 for draft in drafts)


def test_confidence_grows_with_the_match():
    drafter = Ngram(context=CONTEXT, longest=2)
    short = next(drafter.draft(0, [1, 2, 3, 9, 2]))
    long = next(drafter.draft(0, [5, 6, 7, 8, 1, 0, 5, 6, 7, 8]))
    assert (short.token_id, long.token_id) == (3, 1)
    assert long.confidence > short.confidence
    first, second = itertools.islice(drafter.draft(0, [1, 2, 3, 9, 2]), 2)
    assert second.confidence > first.confidence


def test_a_call_does_not_search_all_ids():
    """Against one naive search of the same ids, which the time of a machine cancels out of."""
    draw = random.Random(0)
    ids = [draw.randrange(50_000) for _ in range(8192)]
    drafter = Ngram(context=CONTEXT)
    next(drafter.draft(0, ids), None)
    times = []
    for _ in range(50):
        ids = [*ids[:-2], *(draw.randrange(50_000) for _ in range(3))]
        start_s = time.perf_counter()
        next(drafter.draft(0, ids), None)
        times.append(time.perf_counter() - start_s)
    start_s = time.perf_counter()
    naive(ids, 6, 1, 1)
    assert min(times) < (time.perf_counter() - start_s) / 20
    print(f"{1e6 * min(times):.0f} us a call")


def test_the_example_for_writers(tmp_path, monkeypatch):
    example = re.search(r"```python\n(.*?)```", (ROOT / "docs/writing_a_drafter.md").read_text(), re.DOTALL)[1]
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    (tmp_path / "my_drafters.py").write_text(example)
    monkeypatch.syspath_prepend(tmp_path)
    (drafter,) = make_drafters(["my_drafters:Pairs(least=1)"], CONTEXT)
    drafts = list(itertools.islice(drafter.draft(0, [1, 2, 1, 2, 1, 3, 1]), 3))
    assert drafts == [Draft(2, 2 / 3), Draft(1, 1.0), Draft(2, 2 / 3)]
    (careful,) = make_drafters(["my_drafters:Pairs"], CONTEXT)
    assert not list(careful.draft(0, [1, 2, 1]))
