"""How much noise fits into a clip window."""

import math

import pytest

from openrlhf_alp.objective.config import ObjectiveConfig, noise_budget
from openrlhf_alp.objective.methods import METHODS


def test_the_budget_of_a_sequence_falls_with_its_length_by_hand():
    """The nearer edge of [0.5, 4] is log 2 = 0.693 away; half of it squared, over 2 T."""
    ratio = METHODS["seq-alp"].objective
    for length in (1, 100, 2048):
        assert noise_budget(ratio, length) == pytest.approx(0.3466**2 / 2 / length, rel=1e-3)


def test_the_budget_of_a_token_does_not_know_the_length():
    """The nearer edge of [0.8, 1.28] is -log 0.8 = 0.2231 away."""
    ratio = METHODS["token-alp"].objective
    for length in (1, 10, 1000):
        assert noise_budget(ratio, length) == pytest.approx(0.11157**2 / 2, rel=1e-3)


def test_a_geometric_mean_of_long_sequences_is_limited_by_its_shift():
    """The spread falls with T, the mean shift of -k does not: k <= half of 3e-4."""
    ratio = METHODS["gspo-alp"].objective
    assert noise_budget(ratio, 1e9) == pytest.approx(1.5e-4, rel=1e-3)
    assert noise_budget(ratio, 100) == pytest.approx(1.5e-4**2 / 2 * 100, rel=1e-3)


def test_a_window_without_a_lower_edge_is_measured_by_its_upper_one():
    ratio = ObjectiveConfig(level="token", clip_low=1.0, clip_high=math.e - 1, dual_clip=None)
    assert noise_budget(ratio, 1) == pytest.approx(0.125)
