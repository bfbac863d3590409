"""Texts of the calibration's mixture, and how kinds are shared out and put together."""

import unicodedata

import numpy as np
import pytest

from pipeline.data.mixture import PIECE_TOKENS, apportion, load_kinds, mix

SCRIPTS = {
    "arabic": "ARABIC", "chinese": "CJK", "greek": "GREEK", "hebrew": "HEBREW", "hindi": "DEVANAGARI",
    "japanese": "HIRAGANA", "korean": "HANGUL", "russian": "CYRILLIC", "thai": "THAI",
}  # fmt: skip


def test_texts_of_the_mixture_are_whole_and_no_paragraph_is_there_twice():
    kinds = load_kinds()
    assert {*SCRIPTS, "chat", "code", "markdown", "math", "python", "records"} <= kinds.keys()
    paragraphs = [p.strip() for kind, text in kinds.items() if kind != "python" for p in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))
    for kind, text in kinds.items():
        assert len(text) > 1000, kind
        assert unicodedata.normalize("NFC", text) == text
        assert not {"\r", "\N{REPLACEMENT CHARACTER}"} & set(text)


@pytest.mark.parametrize(("kind", "script"), SCRIPTS.items())
def test_a_kind_is_written_in_its_script(kind, script):
    letters = [c for c in load_kinds()[kind] if c.isalpha()]
    own = [c for c in letters if unicodedata.name(c).startswith((script, "CJK", "KATAKANA"))]
    assert len(own) > 0.9 * len(letters)


def test_the_first_python_source_is_of_several_modules():
    beginning = load_kinds()["python"][:20_000]
    assert "def heappush" in load_kinds()["python"] and load_kinds()["python"] == load_kinds()["python"]
    assert all(word in beginning for word in ("import", "class", "def ", "statistics"))


@pytest.mark.parametrize(
    ("num_tokens", "available", "expected"),
    [
        (90, [100, 100, 100], [30, 30, 30]),
        (100, [10, 1000, 3, 1000], [10, 43, 3, 44]),
        (100, [1, 2], [1, 2]),
        (7, [5, 5], [3, 4]),
        (0, [5], [0]),
        (5, [], []),
    ],
)
def test_kinds_give_alike_and_short_ones_all_they_have(num_tokens, available, expected):
    assert apportion(num_tokens, available) == expected


def mixed(lengths, *, window, every):
    """Kinds numbered from 0, whose tokens are numbered by 1000 * kind + place."""
    kinds = [100_000 * kind + np.arange(length) for kind, length in enumerate(lengths)]
    held_out = np.arange(sum(lengths)) // window % every == every - 1
    return kinds, held_out, mix(kinds, held_out)


@pytest.mark.parametrize(
    ("lengths", "window"),
    [([20_000, *[1300] * 15, 500], 1024), ([2048, *[113] * 18, 14], 512), ([6000], 500), ([700, 700, 0, 100], 64)],
)
def test_every_token_is_there_once_and_every_kind_among_those_held_out(lengths, window):
    kinds, held_out, ids = mixed(lengths, window=window, every=6)
    assert sorted(ids) == sorted(np.concatenate(kinds)) and ids.dtype == np.int64
    assert (mix(kinds, held_out) == ids).all()
    assert ids[0] == kinds[0][0]
    for own in kinds:
        here = np.isin(ids, own)
        expected = len(own) * held_out.mean()
        assert abs((here & held_out).sum() - expected) <= 1
        if len(own):  # the last ones are held out, in their order
            assert (ids[here & held_out] == own[len(own) - (here & held_out).sum() :]).all()
            assert (ids[here & ~held_out] == own[: (here & ~held_out).sum()]).all()


def test_kinds_are_spread_over_the_whole():
    kinds, held_out, ids = mixed([24_000, *[1400] * 17, 200], window=1024, every=6)
    quarters = np.array_split(ids[~held_out], 4)
    for own in kinds[:-1]:
        shares = [np.isin(quarter, own).sum() / len(own) for quarter in quarters]
        assert max(shares) - min(shares) <= 3 * PIECE_TOKENS / len(own)


def test_all_may_be_held_out():
    assert sorted(mix([np.arange(5), np.arange(5, 8)], np.ones(8, dtype=bool))) == list(range(8))
