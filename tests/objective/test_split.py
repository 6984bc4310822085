"""The parts of a log-ratio against numbers worked out by hand."""

import math

import pytest
import torch

from openrlhf_alp.objective.metric_names import METRICS
from openrlhf_alp.objective.split import split_figures, split_sums


def sums_of(lags: list[int]) -> torch.Tensor:
    """Two samples of two tokens; of the second one only the first token is an action.

    Log-probs of the rollout are 0; the learner starts at 0.1, 0.1 and 0.4, moves by 0.2 each, and
    the noise adds 0.3, -0.3 and 0.
    """
    start = torch.tensor([[0.1, 0.1], [0.4, 7.0]])
    clean = start + 0.2
    noisy = clean + torch.tensor([[0.3, -0.3], [0.0, 7.0]])
    return split_sums(
        noisy=noisy,
        clean=clean,
        start=start,
        rollout=torch.tensor([[0.0, 0.0], [0.0, math.nan]]),
        entropy=torch.tensor([[1.0, 2.0], [3.0, 9.0]]),
        action_mask=torch.tensor([[1, 1], [1, 0]]),
        lags=lags,
    )


def test_the_three_parts_of_a_synchronous_step() -> None:
    found = split_figures(sums_of([0, 0]))
    assert found["alp/lag_0_share"] == 1.0
    assert found["alp/lag_0_perturbation_mean"] == pytest.approx(0.0, abs=1e-7)
    assert found["alp/lag_0_perturbation_rms"] == pytest.approx((0.18 / 3) ** 0.5, rel=1e-6)
    assert found["alp/lag_0_staleness_mean"] == pytest.approx(0.2, rel=1e-6)
    assert found["alp/lag_0_mismatch_mean"] == pytest.approx(0.2, rel=1e-6)
    assert found["alp/lag_0_mismatch_rms"] == pytest.approx((0.18 / 3) ** 0.5, rel=1e-6)
    assert found["alp/entropy"] == pytest.approx(2.0)
    expected = (2 * (math.exp(0.1) - 1.1) + math.exp(0.4) - 1.4) / 3
    assert found["alp/clean_start_k3_kl"] == pytest.approx(expected, rel=1e-5)
    expected = (2 * (math.exp(0.3) - 1.3) + math.exp(0.6) - 1.6) / 3
    assert found["alp/clean_k3_kl"] == pytest.approx(expected, rel=1e-5)
    assert found["alp/noisy_k3_kl"] > found["alp/clean_k3_kl"]


def test_an_older_sample_has_staleness_and_mismatch_in_one() -> None:
    """Its lag is 7: the weights that sampled it are gone. 0.4 + 0.2 = 0.6 is what remains."""
    found = split_figures(sums_of([0, 7]))
    assert found["alp/lag_0_share"] == pytest.approx(2 / 3)
    assert found["alp/lag_3_or_more_staleness_and_mismatch_mean"] == pytest.approx(0.6, rel=1e-6)
    assert found["alp/lag_3_or_more_perturbation_rms"] == pytest.approx(0.0, abs=1e-7)
    assert "alp/lag_3_or_more_mismatch_mean" not in found
    assert not any(name.startswith("alp/lag_1") for name in found)


def test_sums_of_ranks_add_up_and_no_token_gives_no_metric() -> None:
    twice = split_figures(2 * sums_of([0, 1]))
    assert twice == pytest.approx(split_figures(sums_of([0, 1])))
    assert split_figures(0 * sums_of([0, 1])) == {}


def test_every_part_is_in_the_table() -> None:
    assert split_figures(sums_of([0, 1])).keys() <= METRICS.keys()
