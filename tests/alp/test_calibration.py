"""sigma0 is found where the noise moves the log-probs as much as the mismatch does."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from openrlhf_alp.alp import attach, calibrate_sigma0
from openrlhf_alp.objective.ratio import k3_kl

BOUNDS = {"sigma_min": 1e-6, "sigma_max": 1.0}


@hypothesis_settings(deadline=None)
@given(
    factor=st.floats(1e-2, 1e4),
    exponent=st.floats(1.2, 3.0),
    answer=st.floats(1e-5, 0.9),
)
def test_any_power_law_is_solved_in_a_few_evaluations(factor, exponent, answer):
    """KL = factor * sigma**exponent; the answer lies inside the bounds."""
    calls = []

    def kl(sigma):
        calls.append(sigma)
        return factor * sigma**exponent

    result = calibrate_sigma0(kl, kl(answer), **BOUNDS)
    assert result.reached_kl == pytest.approx(result.target_kl, rel=0.05)
    assert result.sigma0 == pytest.approx(answer, rel=0.05)
    assert result.evaluations == len(calls) - 1 <= 6
    assert result.at_bound is None
    assert all(BOUNDS["sigma_min"] <= sigma <= BOUNDS["sigma_max"] for sigma in calls)


def test_a_quadratic_needs_two_evaluations():
    """From 0.01 the slope 2 jumps straight to sqrt(0.0004) = 0.02."""
    result = calibrate_sigma0(lambda s: s**2, 4e-4, **BOUNDS)
    assert (result.evaluations, result.sigma0) == (2, pytest.approx(0.02))


def test_a_saturating_kl_is_solved():
    """Large noise stops mattering: KL = 2 (1 - exp(-1e4 sigma**2)), flat above 0.02."""
    result = calibrate_sigma0(
        lambda s: -2 * math.expm1(-1e4 * s**2), 1.0, start=0.5, max_evaluations=20, **BOUNDS
    )
    assert result.sigma0 == pytest.approx(math.sqrt(math.log(2) / 1e4), rel=0.05)


def test_noise_below_rounding_is_climbed_out_of():
    """A bfloat16 model does not see sigma below 1e-3: KL 0 there."""
    result = calibrate_sigma0(lambda s: s**2 if s > 1e-3 else 0.0, 4e-4, start=1e-6, **BOUNDS)
    assert result.sigma0 == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("target", "bound", "sigma"), [(9.0, "sigma_max", 1.0), (1e-20, "sigma_min", 1e-6)]
)
def test_an_unreachable_target_ends_at_the_bound_and_says_so(target, bound, sigma):
    result = calibrate_sigma0(lambda s: s**2, target, **BOUNDS)
    assert (result.at_bound, result.sigma0) == (bound, pytest.approx(sigma))
    assert result.reached_kl == pytest.approx(sigma**2)


def test_the_best_point_is_returned_when_evaluations_run_out():
    """A step function never comes within 5 %: the nearer side in ratio is 0.9, not 2."""
    result = calibrate_sigma0(lambda s: 0.9 if s < 0.05 else 2.0, 1.0, **BOUNDS)
    assert result.evaluations == 10
    assert result.reached_kl == 0.9


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_a_mismatch_of_zero_or_nan_is_an_error(target):
    with pytest.raises(ValueError, match=r"give --alp\.sigma0 a number"):
        calibrate_sigma0(lambda s: s, target, **BOUNDS)


def test_a_non_finite_measurement_is_an_error():
    with pytest.raises(ValueError, match=r"Lower --alp\.sigma_max"):
        calibrate_sigma0(lambda s: math.nan, 1.0, **BOUNDS)


def test_bounds_out_of_order_are_an_error():
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        calibrate_sigma0(lambda s: s, 1.0, sigma_min=1.0, sigma_max=0.5)


@pytest.mark.parametrize("kind", ["vector", "scalar"])
def test_a_real_model_reaches_its_own_bfloat16_mismatch(family, build_model, settings, kind,
                                                        log_probs_of):  # fmt: skip
    """The float32 learner against a bfloat16 copy of itself, the mismatch of a real engine."""
    model = build_model(family)
    perturbation = attach(model, settings(kind=kind))
    engine = copy.deepcopy(model).bfloat16()
    tokens = torch.randint(61, (16, 32), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)

    @torch.no_grad()
    def measure(policy):
        return log_probs_of(policy, tokens, mask)

    clean = measure(model)
    target = k3_kl(clean, measure(engine), mask[:, 1:])

    def perturbed_kl(sigma):
        perturbation.sigma0 = sigma
        with perturbation.enabled(update=0, sample_ids=torch.arange(16), attention_mask=mask):
            return k3_kl(measure(model), clean, mask[:, 1:])

    result = calibrate_sigma0(perturbed_kl, target, **BOUNDS)
    assert target > 0
    assert result.at_bound is None
    assert perturbed_kl(result.sigma0) == pytest.approx(target, rel=0.2)
    assert result.evaluations <= 6
