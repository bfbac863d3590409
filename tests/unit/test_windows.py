import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.windows import make_microbatches, make_windows


def counts(windows):
    return len(windows), sum(w.num_scored for w in windows), sum(w.num_inputs for w in windows)


@pytest.mark.parametrize(
    "num_tokens, max_length, stride, expected",
    [
        (10_000, 2048, 512, (17, 9_999, 34_576)),  # the original benchmark's records: 9,999 scored, 4 x 34,576 sent
        (10_000, 1024, 1024, (10, 9_990, 10_000)),
        (5, 8, 8, (1, 4, 5)),
        (1, 8, 8, (1, 0, 1)),
        (0, 8, 8, (0, 0, 0)),
        (9, 8, 8, (2, 7, 9)),
    ],
)
def test_gold_counts(num_tokens, max_length, stride, expected):
    assert counts(make_windows(num_tokens, max_length, stride)) == expected


def test_the_published_runs_sent_nine_frames_a_link():
    assert len(make_microbatches(make_windows(10_000, 2048, 512), 2)) == 9


windows_arguments = st.tuples(st.integers(0, 300), st.integers(2, 40), st.integers(1, 40), st.booleans(), st.booleans())


@given(windows_arguments)
def test_every_token_is_scored_at_most_once_with_context(arguments):
    num_tokens, max_length, stride, window_bos, text_has_bos = arguments
    stride = min(stride, max_length - window_bos)
    windows = make_windows(num_tokens, max_length, stride, window_bos=window_bos, text_has_bos=text_has_bos)
    scored = [i for w in windows for i in range(w.end - w.num_scored, w.end)]
    assert scored == sorted(set(scored))
    assert all(w.num_inputs <= max_length for w in windows)
    # What is not scored is a window's first token with nothing before it.
    unscored = set(range(num_tokens)) - set(scored)
    assert unscored == {w.start for w in windows if not w.prepend_bos} - set(scored)
    if window_bos:
        assert unscored == ({0} if text_has_bos and num_tokens else set())


@given(windows_arguments, st.integers(1, 5))
def test_microbatches_keep_order_and_never_mix_lengths(arguments, batch_size):
    num_tokens, max_length, stride, window_bos, _ = arguments
    windows = make_windows(num_tokens, max_length, min(stride, max_length - window_bos), window_bos=window_bos)
    microbatches = make_microbatches(windows, batch_size)
    assert [w for m in microbatches for w in m.windows] == windows
    for m in microbatches:
        assert len(m.windows) <= batch_size
        assert {w.num_inputs for w in m.windows} == {m.shape[1]}
        assert m.num_tokens == sum(w.num_inputs for w in m.windows)
