import math

import numpy as np
import pytest

from pipeline.report.quality import MIN_WINDOWS, compare


def per_token(loss, window, top1=None):
    return {
        "loss": np.array(loss, np.float32),
        "window": np.array(window, np.int32),
        "top1": np.array(range(len(loss)) if top1 is None else top1, np.int32),
    }


def random_pair(rng, num_windows, tokens_per_window, mean_change, window_spread):
    """A baseline, and a point whose windows differ from it by `mean_change`, more or less."""
    window = np.repeat(np.arange(num_windows), tokens_per_window)
    base = rng.gamma(2.0, 1.5, len(window))
    change = mean_change + window_spread * rng.standard_normal(num_windows)[window]
    return per_token(base, window), per_token(base + change, window)


def test_figures_of_a_small_case_by_hand():
    base = per_token([1.0, 2.0, 3.0, 2.0], [0, 0, 1, 1], [5, 6, 7, 8])
    point = per_token([1.5, 2.0, 4.0, 1.5], [0, 0, 1, 1], [5, 6, 9, 8])
    quality = compare(base, point)
    assert quality.mean_loss_change == pytest.approx(0.25)
    assert quality.ppl_ratio == pytest.approx(math.exp(2.25) / math.exp(2.0))
    assert quality.top1_agreement == 0.75
    assert quality.p99_loss_change == pytest.approx(np.quantile([0.5, 0, 1, -0.5], 0.99))
    assert (quality.num_tokens, quality.num_windows) == (4, 2)


def test_against_itself_nothing_changes():
    base = per_token(range(8), range(8))
    quality = compare(base, base)
    assert (quality.ppl_ratio, quality.ppl_interval, quality.top1_agreement) == (1.0, (1.0, 1.0), 1.0)


def test_the_interval_is_the_same_each_time_and_holds_the_ratio():
    base, point = random_pair(np.random.default_rng(3), 20, 50, 0.02, 0.03)
    quality = compare(base, point)
    assert quality.ppl_interval[0] < quality.ppl_ratio < quality.ppl_interval[1]
    assert compare(base, point) == quality


@pytest.mark.slow
def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(200):
        low, high = compare(*random_pair(rng, 40, 4, 0.05, 0.1)).ppl_interval
        covered += low <= math.exp(0.05) <= high
    assert 0.88 * 200 <= covered <= 0.99 * 200


def test_pairing_cancels_what_windows_have_in_common():
    """Windows of very different difficulty do not widen the interval of a change that is the same in each."""
    rng = np.random.default_rng(5)
    window = np.repeat(np.arange(10), 30)
    base = 5.0 * rng.random(10)[window] + rng.random(300)
    low, high = compare(per_token(base, window), per_token(base + 0.1, window)).ppl_interval
    assert high - low < 1e-5


def test_windows_count_by_their_tokens():
    base = per_token([1.0] * 10, [0] * 9 + [1])
    point = per_token([1.0] * 9 + [2.0], [0] * 9 + [1])
    assert compare(base, point).ppl_ratio == pytest.approx(math.exp(0.1))


def test_few_windows_have_no_interval():
    for num_windows in (1, MIN_WINDOWS - 1, MIN_WINDOWS):
        base, point = random_pair(np.random.default_rng(1), num_windows, 5, 0.1, 0.1)
        assert (compare(base, point).ppl_interval is None) == (num_windows < MIN_WINDOWS)


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_losses_that_are_not_finite_spoil_the_ratio_only(loss):
    base = per_token(range(8), range(8))
    quality = compare(base, per_token([*range(7), loss], range(8), [*range(7), 0]))
    assert not math.isfinite(quality.ppl_ratio) and math.isnan(quality.p99_loss_change)
    assert quality.ppl_interval is None and quality.top1_agreement == 7 / 8


def test_other_tokens_are_refused():
    with pytest.raises(ValueError, match="3 scored tokens in other windows than the baseline's 2"):
        compare(per_token([1, 2], [0, 1]), per_token([1, 2, 3], [0, 1, 1]))
    with pytest.raises(ValueError, match="no token was scored"):
        compare(per_token([], []), per_token([], []))
