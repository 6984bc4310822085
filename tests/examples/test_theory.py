"""The mathematics behind `examples/theory`: closed forms, lemmas, and the bounds at every sigma."""

import sys

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from examples.theory import smoothing_toy, theorem_1, theorem_2

POLICIES = theorem_1.policies()


@pytest.fixture(scope="module")
def rows():
    return {
        name: [theorem_1.measure(policy, float(sigma)) for sigma in theorem_1.SIGMAS]
        for name, policy in POLICIES.items()
    }


@pytest.fixture(scope="module")
def field():
    return theorem_2.hessian_field()


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.5])
def test_the_toys_closed_form_is_the_average_over_noise(sigma):
    for x in (-0.4, 1.2):
        expected, _ = quad(
            lambda delta, x=x: (
                smoothing_toy.smoothed_loss(np.array([x + delta]), 0.0)[0]
                * np.exp(-(delta**2) / (2 * sigma**2))
                / (sigma * np.sqrt(2 * np.pi))
            ),
            -8 * sigma,
            8 * sigma,
            points=[smoothing_toy.NARROW.centre - x] if sigma > 0.1 else None,
            limit=500,
        )
        assert smoothing_toy.smoothed_loss(np.array([x]), sigma)[0] == pytest.approx(expected)


def test_the_toys_curvature_is_the_second_difference_of_its_loss():
    x, step = np.array([-1.0, 0.3, 1.18]), 1e-4
    left, middle, right = (smoothing_toy.smoothed_loss(x + k * step, 0.05) for k in (-1, 0, 1))
    assert smoothing_toy.smoothed_curvature(x, 0.05) == pytest.approx(
        (left - 2 * middle + right) / step**2, rel=1e-4
    )


def test_noise_moves_the_toys_global_minimum_from_the_narrow_well_to_the_wide_one():
    assert smoothing_toy.global_minimum(0.0) == pytest.approx(smoothing_toy.NARROW.centre, abs=2e-3)
    assert abs(smoothing_toy.global_minimum(0.2)) < 0.01


def test_lemma_2_the_posterior_mean_is_sigma_squared_times_the_score():
    policy, sigma, step = POLICIES["hidden layer"], 0.2, 1e-5
    h = theorem_1.prompts()
    _, mean = theorem_1.perturbed(policy, h, sigma)
    for axis in range(theorem_1.DIMENSIONS):
        shift = step * np.eye(theorem_1.DIMENSIONS)[axis]
        above, below = (theorem_1.perturbed(policy, h + s, sigma)[0] for s in (shift, -shift))
        score = (np.log(above) - np.log(below)) / (2 * step)
        assert mean[..., axis] == pytest.approx(sigma**2 * score, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name", POLICIES)
def test_both_bounds_of_theorem_1_hold_at_every_sigma(rows, name):
    for row in rows[name]:
        assert 0.0 < row.reverse <= row.bound_a
        # Equal at sigma = s, so that only the error of the quadrature separates the two.
        assert 0.0 < row.forward <= row.bound_b * (1 + 1e-9)


@pytest.mark.parametrize("name", POLICIES)
def test_the_divergence_from_the_rollout_policy_falls_until_sigma_is_the_bias_then_rises(
    rows, name
):
    forward = [row.forward for row in rows[name]]
    best = int(np.argmin(forward))
    assert theorem_1.SIGMAS[best] == pytest.approx(theorem_1.BIAS_STD)
    assert (np.diff(forward[: best + 1]) < 0).all() and (np.diff(forward[best:]) > 0).all()


def test_the_opposite_divergence_only_rises_when_logits_are_linear(rows):
    assert (np.diff([row.reverse for row in rows["linear"]]) > 0).all()


def test_the_noise_is_resolved_by_the_nodes(monkeypatch):
    sigma = float(theorem_1.SIGMAS.max())
    coarse, _ = theorem_1.perturbed(POLICIES["hidden layer"], theorem_1.prompts(), sigma)
    monkeypatch.setattr(theorem_1, "NUM_NODES", 97)
    fine, _ = theorem_1.perturbed(POLICIES["hidden layer"], theorem_1.prompts(), sigma)
    assert np.log(coarse) == pytest.approx(np.log(fine), abs=1e-4)


def test_the_smoothed_hessian_is_that_of_the_average_loss(field):
    sigma, index = 0.3, (155, 145)
    delta = torch.cartesian_prod(*[torch.linspace(-6, 6, 121, dtype=torch.float64)] * 2)
    weight = torch.softmax(-(delta**2).sum(-1) / 2, 0)

    def average(x: torch.Tensor) -> torch.Tensor:
        return (torch.func.vmap(theorem_2.loss)(x + sigma * delta) * weight).sum()

    point = torch.tensor(index, dtype=torch.float64) * theorem_2.SPACING - theorem_2.HALF_WIDTH
    expected = torch.func.hessian(average)(point).numpy()
    actual = theorem_2.smoothed(field, sigma)[index]
    assert actual == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_noise_lowers_the_largest_curvature_and_the_bound_of_theorem_2_holds(field):
    own = theorem_2.curvature(field)
    largest = [
        theorem_2.curvature(theorem_2.smoothed(field, s)).max() for s in theorem_2.SIGMAS[1:]
    ]
    bounds = [theorem_2.bound(own, s) for s in theorem_2.SIGMAS[1:]]
    assert largest[0] < own.max() and (np.diff(largest) < 0).all()
    assert all(value <= limit < own.max() for value, limit in zip(largest, bounds, strict=True))


def test_the_grid_of_theorem_2_holds_every_sharp_place(field):
    own = theorem_2.curvature(field)
    edge = np.concatenate([own[0], own[-1], own[:, 0], own[:, -1]])
    assert edge.max() < 1e-6


@pytest.mark.parametrize("example", [smoothing_toy, theorem_1, theorem_2])
def test_each_example_prints_a_table_and_draws_its_figure(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(theorem_1, "SIGMAS", theorem_1.SIGMAS[:2])  # the fixture has them all
    monkeypatch.setattr(sys, "argv", ["example", "--out", str(tmp_path / "figures")])
    example.main()
    assert "sigma" in capsys.readouterr().out
    (figure,) = (tmp_path / "figures").iterdir()
    assert figure.name == f"{example.__name__.rpartition('.')[2]}.png"
    assert figure.read_bytes().startswith(b"\x89PNG")
