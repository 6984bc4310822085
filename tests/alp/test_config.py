"""Settings are checked before a model is touched, and the message names the flag."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_alp.alp import parse_layers


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("0-4", (0, 1, 2, 3, 4)),
        ("2,3", (2, 3)),
        ("0-1,5", (0, 1, 5)),
        (" 5 , 1 - 2 ", (1, 2, 5)),
        ("3,3,2-4", (2, 3, 4)),
    ],
)
def test_layers_are_read(spec, expected):
    assert parse_layers(spec, 6) == expected


@pytest.mark.parametrize("spec", ["", "x", "1-", "-1", "1,,2", "4-2", "6", "0-6", "1.5", "all,"])
def test_unreadable_layers_name_the_flag_and_the_text(spec):
    with pytest.raises(ValueError, match=r"--alp\.layers is ") as caught:
        parse_layers(spec, 6)
    assert repr(spec) in str(caught.value)


@given(st.sets(st.integers(0, 79), min_size=1))
def test_any_selection_survives_being_written_down(selection):
    assert parse_layers(",".join(map(str, selection)), 80) == tuple(sorted(selection))


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"sigma0": -0.1}, "--alp.sigma0"),
        ({"sigma0": 2.0}, "--alp.sigma0"),
        ({"sigma0": math.nan}, "--alp.sigma0"),
        ({"kind": "matrix"}, "--alp.sigma "),
        ({"sigma_min": -1e-3}, "--alp.sigma_min"),
        ({"sigma_min": 1.0}, "--alp.sigma_max"),
        ({"sigma_max": math.inf}, "--alp.sigma_max"),
        ({"sigma_scale": "layer"}, "--alp.sigma_scale"),
        ({"sigma0": None, "sigma_min": 0.0}, "Set --alp.sigma_min 1e-6"),
        ({"seed": 1.5}, "--alp.seed"),
        ({"seed": True}, "--alp.seed"),
    ],
)
def test_bad_values_name_the_flag(settings, changes, flag):
    with pytest.raises(ValueError) as caught:
        settings(**changes)
    assert flag in str(caught.value)


def test_sigma0_may_sit_on_a_bound(settings):
    assert settings(sigma0=0.0).sigma0 == 0.0
    assert settings(sigma0=1.0).sigma0 == 1.0


def test_the_upper_bound_follows_the_unit(settings):
    assert settings(sigma_max=None).upper_bound == 0.1
    assert settings(sigma_max=None, sigma_scale="relative").upper_bound == 1.0
    assert settings(sigma_max=0.3, sigma_scale="relative").upper_bound == 0.3
