"""sigma0 is found where the noise moves the log-probs as much as the mismatch does."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_alp.alp import attach, calibrate_sigma0
from openrlhf_alp.alp.calibration import PROBES
from openrlhf_alp.objective.ratio import k3_kl

BOUNDS = {"sigma_min": 1e-6, "sigma_max": 1.0}


@given(
    floor=st.floats(0, 1e-2),
    slope=st.floats(1e-1, 1e4),
    answer=st.floats(1e-3, 0.9),
    unit=st.floats(1e-2, 10.0),
)
def test_floor_and_slope_are_found_from_three_probes(floor, slope, answer, unit):
    """KL = floor + slope * sigma**2; the target is what the noise adds to the floor."""
    probed = []

    def kl(sigma):
        probed.append(sigma)
        return floor + slope * sigma**2

    result = calibrate_sigma0(kl, slope * answer**2, unit=unit, **BOUNDS)
    assert probed == [*(probe * unit for probe in PROBES), result.sigma0]
    assert result.sigma0 == pytest.approx(answer, rel=1e-3)
    assert result.floor_kl == pytest.approx(floor, rel=2e-3, abs=1e-8 * slope * unit**2)
    assert result.at_bound is None


def test_a_quadratic_is_solved_by_hand():
    """2e-3 + 4 sigma**2 adds 4e-4 at sqrt(4e-4 / 4) = 0.01."""
    result = calibrate_sigma0(lambda s: 2e-3 + 4 * s**2, 4e-4, **BOUNDS)
    assert (result.sigma0, result.floor_kl) == (pytest.approx(0.01), pytest.approx(2e-3))


@given(
    power=st.floats(1, 4),
    most=st.floats(1, 20),
    scale=st.floats(0.1, 100),
    rounded_away=st.sampled_from([0.0, 1e-3, 0.03]),
    target=st.floats(1e-3, 0.1),
)
def test_noise_that_is_no_parabola_still_ends_at_its_target(
    power, most, scale, rounded_away, target
):
    """It may grow with another power, saturate, and have no effect at all where it is small, as the
    noise of bfloat16 logits: a sweep of `--alp.layers logits` stopped at a sigma of 1."""

    def kl(sigma):
        if sigma < rounded_away:
            return 0.0
        return most * -math.expm1(-((scale * sigma) ** power) / most)

    result = calibrate_sigma0(kl, target, sigma_min=0.0, sigma_max=1.0)
    wanted = target + result.floor_kl
    # No sigma has the wanted KL where the KL jumps over it: the answer then lies at the jump.
    less, more = kl(result.sigma0 / 1.15), kl(result.sigma0 * 1.15)
    assert (less < 2 * wanted and more > wanted / 2) or result.at_bound == "sigma_max"


def test_the_answer_does_not_depend_on_the_bounds_that_it_lies_within():
    """The floor was once measured at sigma_min; at 0 it read 0, and sigma0 was arbitrary."""
    answers = {
        calibrate_sigma0(
            lambda s: (2e-3 if s else 0.0) + 4 * s**2, 4e-4, sigma_min=low, sigma_max=1.0
        ).sigma0
        for low in (0.0, 1e-9, 1e-3)
    }
    assert len(answers) == 1


@pytest.mark.parametrize("sign", [1, -1])
def test_measurement_noise_of_ten_per_cent_moves_sigma0_by_little(sign):
    """Each probe in turn is off by 10 %; the target is well above the floor's own error."""
    for disturbed in range(3):
        calls = itertools.count()

        def kl(sigma, calls=calls, disturbed=disturbed):
            return (2e-3 + 4 * sigma**2) * (1 + 0.1 * sign * (next(calls) == disturbed))

        assert calibrate_sigma0(kl, 2e-3, **BOUNDS).sigma0 == pytest.approx(0.0224, rel=0.1)


@pytest.mark.parametrize(
    ("target", "bound", "sigma"), [(9.0, "sigma_max", 1.0), (1e-20, "sigma_min", 1e-6)]
)
def test_an_unreachable_target_ends_at_the_bound_and_says_so(target, bound, sigma):
    result = calibrate_sigma0(lambda s: s**2, target, **BOUNDS)
    assert (result.at_bound, result.sigma0) == (bound, pytest.approx(sigma))


@pytest.mark.parametrize("kl", [lambda s: 0.0, lambda s: 1e-3, lambda s: 2e-3 - s**2 / 10])
def test_noise_without_effect_is_an_error(kl):
    with pytest.raises(ValueError, match=r"give --alp\.sigma0 a"):
        calibrate_sigma0(kl, 1e-3, **BOUNDS)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_a_mismatch_of_zero_or_nan_is_an_error(target):
    with pytest.raises(ValueError, match=r"give --alp\.sigma0 a number"):
        calibrate_sigma0(lambda s: s, target, **BOUNDS)


def test_a_non_finite_measurement_is_an_error():
    with pytest.raises(ValueError, match="Look for an overflow"):
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

    unit = relative_scales(model, perturbation, tokens, mask)[0]
    result = calibrate_sigma0(perturbed_kl, target, unit=unit, **BOUNDS)
    assert target > 0
    assert result.at_bound is None
    assert perturbed_kl(result.sigma0) == pytest.approx(target + result.floor_kl, rel=0.3)


def relative_scales(model, perturbation, tokens, mask):
    with perturbation.observed(mask) as observer, torch.no_grad():
        model(tokens, attention_mask=mask, use_cache=False)
    return {layer: figures.scale for layer, figures in observer.figures().items()}
