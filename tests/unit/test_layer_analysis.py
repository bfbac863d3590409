import numpy as np
import pytest
from scipy import stats

from pipeline.analysis.layer_statistics import MEASURES, compare_layers, early_and_late, position_correlation


def random_window(num_layers=4, num_tokens=30, seed=0):
    return np.random.default_rng(seed).random((num_layers, num_tokens))


def test_measures_are_scipys_pair_by_pair():
    window = random_window()
    measured = compare_layers([window], 0.2)
    assert tuple(measured) == MEASURES
    for i in range(4):
        for j in range(4):
            a, b = window[i], window[j]
            assert measured["spearman"][i, j] == pytest.approx(stats.spearmanr(a, b).statistic)
            assert measured["kendall"][i, j] == pytest.approx(stats.kendalltau(a, b).statistic)
            top = len({*np.argsort(-a)[:6]} & {*np.argsort(-b)[:6]}) / 6
            assert measured["top_k_overlap"][i, j] == pytest.approx(top)
            # In one dimension the distance is the area between the cumulative distributions.
            area = np.abs(np.cumsum(a / a.sum() - b / b.sum())).sum() / 30
            assert measured["wasserstein"][i, j] == pytest.approx(area)


def test_equal_layers_are_alike_and_disjoint_ones_are_not():
    window = np.array([[1, 2, 3, 0, 0, 0], [1, 2, 3, 0, 0, 0], [0, 0, 0, 3, 2, 1]], dtype=float)
    measured = compare_layers([window], 0.5)
    for name, same, other in (
        ("spearman", 1, None),
        ("kendall", 1, None),
        ("top_k_overlap", 1, 0),
        ("jensen_shannon", 0, 1),
        ("wasserstein", 0, None),
    ):
        assert measured[name][0, 1] == pytest.approx(same, abs=1e-9)
        if other is None:
            assert measured[name][0, 2] != pytest.approx(same, abs=0.1)
        else:
            assert measured[name][0, 2] == pytest.approx(other, abs=1e-9)


def test_windows_of_different_lengths_are_averaged():
    a, b = random_window(seed=1), random_window(num_tokens=11, seed=2)
    both, first, second = (compare_layers(windows, 0.3) for windows in ([a, b], [a], [b]))
    for name in MEASURES:
        np.testing.assert_allclose(both[name], (first[name] + second[name]) / 2)


def test_summary_names_early_and_late():
    matrix = np.arange(36, dtype=float).reshape(6, 6)
    summary = early_and_late({"spearman": matrix})["spearman"]
    assert summary["first_against_last"] == 5
    assert summary["early_against_late_third"] == np.mean([4, 5, 10, 11])
    assert summary["neighbours"] == np.mean([1, 8, 15, 22, 29])


@pytest.mark.parametrize(
    "windows, top, message",
    [
        ([], 0.1, "without a window"),
        ([np.ones((2, 1))], 0.1, "1 tokens"),
        ([np.array([[1.0, np.nan], [1, 1]])], 0.1, "not finite"),
        ([np.array([[0.0, 0], [1, 1]])], 0.1, "zero in a whole layer"),
        ([np.ones((2, 5))], 0.0, "top fraction is 0.0"),
        ([np.ones((2, 5))], 1.5, "top fraction is 1.5"),
    ],
)
def test_what_cannot_be_compared_is_named(windows, top, message):
    with pytest.raises(ValueError, match=message):
        compare_layers(windows, top)


def test_position_correlation_is_the_mean_over_windows():
    rising, falling = np.arange(1.0, 9), np.arange(8.0, 0, -1)
    windows = [np.stack([rising, falling]), np.stack([rising, rising])]
    np.testing.assert_allclose(position_correlation(windows), [1, 0], atol=1e-12)
