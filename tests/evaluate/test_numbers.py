"""Estimators against numbers that were worked out by hand."""

import math
from itertools import combinations

import pytest

from openrlhf_alp.evaluate.comparison import paired_difference
from openrlhf_alp.evaluate.numbers import (
    average,
    majority,
    mean_estimate,
    pass_at,
    pass_at_k,
    powers_of_two,
)


@pytest.mark.parametrize(
    ("num_right", "n", "k", "expected"),
    [
        (0, 4, 1, 0.0),
        (1, 4, 1, 1 / 4),
        (1, 4, 2, 1 / 2),  # 3 of the 6 pairs hold the right one
        (2, 4, 2, 5 / 6),  # only one pair is of wrong ones
        (3, 4, 2, 1.0),
        (1, 4, 4, 1.0),
        (0, 32, 32, 0.0),
        (1, 32, 8, 8 / 32),
    ],
)
def test_pass_at_k_is_the_closed_form(num_right, n, k, expected):
    assert pass_at_k(num_right, n, k) == expected


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer():
    """All C(7, k) draws of 7 answers, 3 of them right, one by one."""
    answers = [True] * 3 + [False] * 4
    for k in range(1, 8):
        draws = list(combinations(answers, k))
        share = sum(any(draw) for draw in draws) / len(draws)
        assert pass_at_k(3, 7, k) == pytest.approx(share, abs=1e-15)


def test_pass_at_k_is_unbiased_where_best_of_draws_with_replacement_is_low():
    """One right of two: both answers together hold it for certain; with replacement 3 of 4 do."""
    assert pass_at_k(1, 2, 2) == 1.0


@pytest.mark.parametrize("k", [0, 5, -1])
def test_a_k_above_n_or_below_1_is_refused_and_not_nan(k):
    with pytest.raises(ValueError, match=r"k must be in 1\.\.4"):
        pass_at_k(1, 4, k)


def test_no_answers_no_problems_and_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="n is 0"):
        average([0], 0)
    with pytest.raises(ValueError, match="no problem"):
        average([], 4)
    with pytest.raises(ValueError, match="5 right answers out of 4"):
        average([5], 4)
    with pytest.raises(ValueError, match="n is 0"):
        powers_of_two(0)


@pytest.mark.parametrize(
    ("n", "curve"),
    [(1, [1]), (2, [1, 2]), (4, [1, 2, 4]), (6, [1, 2, 4, 6]), (32, [1, 2, 4, 8, 16, 32])],
)
def test_the_curve_ends_at_n(n, curve):
    assert powers_of_two(n) == curve


def test_an_average_counts_every_problem_alike_and_its_error_is_over_problems():
    """Shares 1, 0.5, 0, 0.5: variance 1/6 over 4 problems, so the error is sqrt(1/24)."""
    estimate = average([4, 2, 0, 2], 4)
    assert estimate.value == 0.5
    assert estimate.stderr == pytest.approx(math.sqrt(1 / 24))
    # Wilson: size 0.25 / (1/24) = 6, t(3 degrees, 97.5 %) = 3.18245.
    z, size = 3.18245, 6
    centre = (0.5 + z * z / 12) / (1 + z * z / 6)
    half = z / (1 + z * z / size) * math.sqrt(0.25 / size + z * z / (4 * size * size))
    assert (estimate.low, estimate.high) == pytest.approx((centre - half, centre + half), abs=1e-5)


def test_answers_of_one_problem_are_one_observation():
    """32 equal answers per problem tell no more than one: the interval is the same."""
    once, often = average([1, 0, 1, 0], 1), average([32, 0, 32, 0], 32)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    spread = average([16, 16, 16, 16], 32)
    assert spread.high - spread.low < once.high - once.low


@pytest.mark.parametrize("right", [[0, 0, 0], [4, 4, 4], [2, 2, 2], [1], [0]])
def test_an_interval_is_finite_holds_its_value_and_never_shrinks_to_a_point(right):
    estimate = average(right, 4)
    assert 0.0 <= estimate.low <= estimate.value <= estimate.high <= 1.0
    assert estimate.high - estimate.low > 0.1


def test_fewer_problems_never_make_a_narrower_interval():
    """With one problem nothing is known about the others of its set."""
    widths = [average([0] * num, 4).high for num in (1, 2, 3, 10)]
    assert widths[0] == 1.0 and widths == sorted(widths, reverse=True)
    assert (average([3], 4).low, average([3], 4).high) == (0.0, 1.0)


def test_the_interval_covers_what_it_says():
    """200 sets of 40 problems with shares drawn from 0.2, 0.5, 0.8: their mean is 0.5."""
    import random

    draw = random.Random(0)
    covered = 0
    for _ in range(200):
        shares = [draw.choice((0.2, 0.5, 0.8)) for _ in range(40)]
        right = [sum(draw.random() < share for _ in range(8)) for share in shares]
        estimate = average(right, 8)
        covered += estimate.low <= 0.5 <= estimate.high
    assert 183 <= covered <= 199  # 190 expected, standard deviation 3.1


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([("3", False), ("3", False), ("5", True)], 0.0),
        ([("5", True), ("5.0", True), ("3", False)], 1.0),  # two spellings, one choice
        ([("5", True), ("3", False)], 0.5),
        ([(None, False), (None, False), ("5", True)], 1.0),  # who says nothing has no vote
        ([(None, False)], 0.0),
        ([("1", False), ("2", False), ("5", True), ("5", True)], 1.0),
        ([("1", False), ("2", False), ("5", True)], 1 / 3),
    ],
)
def test_the_majority_is_the_most_frequent_answer(votes, expected):
    assert majority(votes) == pytest.approx(expected)


def test_pass_at_averages_over_problems():
    assert pass_at([0, 1], 4, 2).value == 0.25
    assert mean_estimate([0.25, 0.75]).value == 0.5


def test_a_paired_difference_is_sharper_than_the_runs_alone():
    """Problems differ a lot, runs by 0.1 on each: the pairs agree on the sign every time."""
    first = {str(i): i / 100 for i in range(50)}
    second = {name: share + 0.1 for name, share in first.items()}
    found = paired_difference([(first, second)])
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.p_value < 0.001 and found.num_problems == 50


def test_two_equal_runs_differ_by_nothing():
    shares = {"a": 0.25, "b": 1.0}
    found = paired_difference([(shares, shares)])
    assert (found.value, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_the_average_of_suites_does_not_follow_the_larger_one():
    small = ({"a": 0.0}, {"a": 1.0})
    large = ({str(i): 0.5 for i in range(99)}, {str(i): 0.5 for i in range(99)})
    assert paired_difference([small, large]).value == 0.5


def test_the_interval_of_a_difference_is_that_of_the_mean_of_changes():
    """Changes +1 and -1 in 50 problems each: standard deviation 1, of the mean 0.1."""
    first = {str(i): float(i % 2) for i in range(100)}
    second = {str(i): float(1 - i % 2) for i in range(100)}
    found = paired_difference([(first, second)])
    assert found.value == 0.0 and found.p_value == 1.0
    assert (found.low, found.high) == pytest.approx((-0.196, 0.196), abs=0.021)


def test_runs_on_different_problems_are_not_compared():
    with pytest.raises(ValueError, match="in one only"):
        paired_difference([({"a": 1.0}, {"b": 1.0})])
    with pytest.raises(ValueError, match="no problem"):
        paired_difference([])
