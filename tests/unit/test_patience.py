"""Limits keep their length on a quiet machine, whatever the tests themselves run on it."""

import pytest

from tests.helpers.patience import allowed_s


@pytest.mark.parametrize(("load", "cores", "factor"), [(0, 2, 1), (4, 1, 1), (6, 2, 1), (14, 2, 5), (5, 16, 1)])
def test_limits_follow_the_load_of_others(load, cores, factor, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert allowed_s(3.0) == 3.0 * factor
