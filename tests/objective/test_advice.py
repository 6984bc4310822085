"""Each warning is given for the condition it names, and for no healthy step."""

import pytest

from openrlhf_alp.objective.advice import advice
from openrlhf_alp.objective.metric_names import METRICS

HEALTHY = {
    "alp/num_tokens": 1000.0,
    "alp/advantage_positive_tokens": 400.0,
    "alp/advantage_negative_tokens": 500.0,
    "alp/clip_low_share_negative": 0.05,
    "alp/clip_high_share_positive": 0.02,
    "alp/log_ratio_p01": -0.4,
    "alp/log_ratio_p99": 0.3,
    "alp/layer_changed_share_min": 0.9,
    "alp/sigma_bound_share": 0.0,
    "alp/layer_variance_share_max": 0.1,
    "alp/layer_variance_share_argmax": 29.0,
}
NO_ADVANTAGE = {"alp/advantage_positive_tokens": 0.0, "alp/advantage_negative_tokens": 0.0}
CLIPPED = {"alp/clip_low_share_negative": 0.99, "alp/mask_share_positive": 0.95}


@pytest.mark.parametrize("perturbed", [True, False])
def test_a_healthy_step_and_an_empty_one_have_no_warning(perturbed: bool) -> None:
    assert HEALTHY.keys() <= METRICS.keys()
    assert advice(HEALTHY, perturbed=perturbed, num_layers=30) == []
    assert advice({}, perturbed=perturbed, num_layers=30) == []


@pytest.mark.parametrize(
    ("name", "changes", "perturbed", "fix"),
    [
        ("no_advantage", NO_ADVANTAGE, True, "--rollout.n_samples_per_prompt"),
        ("clipped", CLIPPED, False, "--alp.clip_low_high"),
        ("rounded", {"alp/layer_changed_share_min": 0.07}, True, "--alp.sigma_scale relative"),
        ("at_bound", {"alp/sigma_bound_share": 0.3}, True, "--alp.sigma_max"),
        ("one_layer", {"alp/layer_variance_share_max": 0.92}, True, "layer 29 makes 92%"),
        ("tail", {"alp/log_ratio_p01": -3.7}, False, "beyond -3.7"),
        ("tail", {"alp/log_ratio_p99": 2.5}, False, "beyond 2.5"),
    ],
)
def test_each_condition_is_named_with_its_fix(
    name: str, changes: dict[str, float], perturbed: bool, fix: str
) -> None:
    [found] = advice(HEALTHY | changes, perturbed=perturbed, num_layers=30)
    assert found.name == name and fix in found.text


def test_one_of_two_layers_may_have_most_of_the_noise() -> None:
    metrics = HEALTHY | {"alp/layer_variance_share_max": 0.92}
    assert advice(metrics, perturbed=True, num_layers=2) == []


def test_half_of_the_tokens_clipped_is_no_warning() -> None:
    metrics = HEALTHY | {"alp/clip_low_share_negative": 0.99}
    assert advice(metrics, perturbed=False) == []
