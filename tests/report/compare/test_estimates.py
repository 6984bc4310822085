import math

import pytest

from openrlhf_alp.report.compare.estimates import over_seeds, paired


def test_the_interval_is_students_t_over_seeds():
    """1, 2, 3: mean 2, s = 1, and t(2) at 97.5 % is 4.302653, so 4.302653 / sqrt(3) each way."""
    interval = over_seeds([1.0, 2.0, 3.0])
    assert interval is not None and interval.num == 3
    assert interval.mean == 2.0
    assert interval.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_one_seed_has_a_value_and_no_interval():
    interval = over_seeds([0.5])
    assert interval is not None
    assert (interval.mean, interval.low, interval.half) == (0.5, None, None)
    assert not interval.excludes_zero


def test_without_a_finite_value_there_is_nothing_to_show():
    assert over_seeds([math.nan, math.inf]) is None
    assert over_seeds([]) is None


def test_differences_are_taken_seed_by_seed():
    """Ours is 0.1 above theirs on seeds 1 and 2; 7 has no twin."""
    difference = paired({1: 0.3, 2: 0.9, 7: 5.0}, {1: 0.2, 2: 0.8})
    assert difference is not None and difference.num == 2
    assert difference.mean == pytest.approx(0.1)
    assert difference.excludes_zero
    assert paired({1: 0.3}, {2: 0.3}) is None
