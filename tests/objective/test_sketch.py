"""Quantiles from counts against NumPy's over the values themselves."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from openrlhf_alp.objective.sketch import LIMIT, NUM_BINS, bins_of, quantiles


def counts_of(values):
    return torch.bincount(bins_of(torch.tensor(values)), minlength=NUM_BINS).double()


@given(
    npst.arrays(np.float64, st.integers(1, 40), elements=st.floats(-LIMIT, LIMIT)),
    st.floats(0, 1),
)
def test_a_quantile_is_exact_to_half_a_percent_of_its_neighbours(values, probability):
    place = probability * (values.size - 1)
    below, above = np.sort(values)[[int(np.floor(place)), int(np.ceil(place))]]
    expected = below + (above - below) * (place - np.floor(place))
    [found] = quantiles(counts_of(values), [probability])
    # Interpolation weighs the errors of both neighbours; 1e-8 covers even bins around 0.
    assert abs(found - expected) <= 0.0051 * max(abs(below), abs(above)) + 1e-8


def test_counts_of_two_halves_add_up():
    values = np.linspace(-3, 5, 101)
    both = counts_of(values[::2]) + counts_of(values[1::2])
    assert torch.equal(both, counts_of(values))
    assert quantiles(both, [0.5]) == pytest.approx([1.0], rel=0.005)


def test_signs_zero_and_values_beyond_the_limit():
    assert quantiles(counts_of([0.0]), [0.5]) == [0.0]
    low, high = quantiles(counts_of([-1e9, 1e9]), [0.0, 1.0])
    assert (low, high) == (pytest.approx(-LIMIT, rel=0.01), pytest.approx(LIMIT, rel=0.01))
    assert quantiles(torch.zeros(NUM_BINS), [0.1, 0.9]) == [0.0, 0.0]
