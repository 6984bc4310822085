"""The step's ratio metrics against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from openrlhf_alp.objective.metric_names import METRICS
from openrlhf_alp.objective.telemetry import (
    RatioTelemetry,
    cut_counts,
    cut_shares,
    figures,
    ratio_figures,
)

HALF = math.log(0.5)


def summary_of(log_ratio, actions, rollout_log_probs=None):
    log_ratio = torch.tensor(log_ratio)
    if rollout_log_probs is None:
        rollout_log_probs = torch.full_like(log_ratio, HALF)
    return ratio_figures(log_ratio, torch.tensor(actions), torch.as_tensor(rollout_log_probs))


def test_numbers_by_hand():
    """Tokens 0, ln 2, ln 3 in two samples: sums ln 2 and ln 3, means ln 2 / 2 and ln 3.

    Weights 1, 2, 3: (1 + 2 + 3)**2 / (3 * 14) = 36 / 42, chi-square (0 + 1 + 4) / 3. Of the sums 2,
    3: 25 / (2 * 13), (1 + 4) / 2. k3: (0 + 2 - 1 - ln 2 + 3 - 1 - ln 3) / 3 = (3 - ln 6) / 3.
    """
    summary = summary_of([[0.0, math.log(2), 9.0], [math.log(3), 9.0, 9.0]], [[1, 1, 0], [1, 0, 0]])
    assert summary["alp/num_tokens"] == 3
    assert summary["alp/log_ratio_p50"] == pytest.approx(math.log(2), rel=0.005)
    assert summary["alp/log_ratio_mean"] == pytest.approx(math.log(6) / 3)
    assert summary["alp/log_ratio_min"] == 0.0
    assert summary["alp/log_ratio_max"] == pytest.approx(math.log(3))
    assert summary["alp/token_ess"] == pytest.approx(36 / 42)
    assert summary["alp/chi2"] == pytest.approx(5 / 3)
    assert summary["alp/k3_kl"] == pytest.approx((3 - math.log(6)) / 3, rel=1e-6)
    assert summary["alp/sequence_ess"] == pytest.approx(25 / 26)
    assert summary["alp/sequence_chi2"] == pytest.approx(5 / 2)
    assert summary["alp/sequence_log_ratio_mean"] == pytest.approx(math.log(6) / 2)
    assert summary["alp/sequence_log_ratio_max"] == pytest.approx(math.log(3))
    assert summary["alp/geometric_log_ratio_min"] == pytest.approx(math.log(2) / 2)
    assert summary["alp/geometric_log_ratio_mean"] == pytest.approx(math.log(18) / 4)


def test_quantiles_by_hand():
    """0, 1, ..., 1000: the q % quantile is 10 q, with bins of 1 %."""
    summary = summary_of([[float(i) for i in range(1001)]], [[1] * 1001])
    expected = {"p00_1": 1, "p01": 10, "p25": 250, "p50": 500, "p75": 750, "p99": 990, "p99_9": 999}
    for name, value in expected.items():
        assert summary[f"alp/log_ratio_{name}"] == pytest.approx(value, rel=0.006)


def test_a_step_without_tokens_reads_zero_with_the_same_keys():
    empty = RatioTelemetry().summary()
    assert set(empty.values()) == {0.0}
    masked = summary_of([[1.0, 2.0]], [[0, 0]])
    assert masked == empty
    assert list(empty) == list(summary_of([[1.0, 2.0]], [[1, 1]]))


def test_whatever_stands_at_a_masked_position_is_dropped():
    assert summary_of([[1.0, math.nan]], [[1, 0]], [[HALF, math.nan]]) == summary_of([[1.0]], [[1]])


def test_huge_sequence_ratios_do_not_overflow_the_effective_sample_size():
    """Sums of 3,000 and 3,000 + ln 2: weights 1 and 2 up to a factor, ESS 9 / (2 * 5)."""
    huge = torch.tensor([[3000.0], [3000.0 + math.log(2)]], dtype=torch.float64)
    summary = ratio_figures(huge, torch.ones(2, 1), torch.full((2, 1), HALF))
    assert summary["alp/sequence_ess"] == pytest.approx(0.9)
    assert math.isfinite(summary["alp/sequence_chi2"])


def test_the_envelope_sorts_tokens_by_their_rollout_probability():
    """Two rare tokens (p 0.02: bin 2) at -1 and 2, two certain ones (p 1 and 0.995: bin 9) at 0."""
    rollout = torch.tensor([[0.02, 1.0, 0.02, 0.995]]).log()
    summary = summary_of([[-1.0, 0.0, 2.0, 0.0]], [[1, 1, 1, 1]], rollout)
    assert summary["alp/envelope_2_share"] == summary["alp/envelope_9_share"] == 0.5
    assert summary["alp/envelope_2_p50"] == pytest.approx(0.5, rel=0.02)
    assert summary["alp/envelope_2_p99"] == pytest.approx(-1 + 0.99 * 3, rel=0.01)
    assert summary["alp/envelope_9_p99"] == 0.0
    assert summary["alp/envelope_5_share"] == 0.0


@given(
    npst.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)),
                elements=st.floats(-5, 5, width=32)),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_micro_batches_and_ranks_add_up_to_one_batch(values, random):
    actions = np.array([[random.random() < 0.7 for _ in row] for row in values])
    rollout = np.log(np.array([[random.uniform(1e-4, 1) for _ in row] for row in values]))
    ranks = [RatioTelemetry(), RatioTelemetry()]
    for rows in zip(values, actions, rollout, strict=True):
        random.choice(ranks).add(*(torch.tensor(row[None]) for row in rows))
    maxima = torch.maximum(*(rank.maxima() for rank in ranks))
    reduced = figures(maxima, sum(rank.sums(maxima) for rank in ranks))
    assert reduced == pytest.approx(summary_of(values, actions, rollout), rel=1e-5, abs=1e-6)


def test_cuts_are_counted_by_the_sign_of_the_advantage():
    """Three tokens with A > 0, one of them cut; two with A < 0, both cut; a 0 and a masked one."""
    advantages = torch.tensor([[1.0, 2.0, 1.0, -1.0], [-2.0, 0.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    cut = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1]]).bool()
    counts = cut_counts({"clip": cut, "guard": ~cut}, advantages, mask)
    assert cut_shares(["clip", "guard"], 2 * counts) == {
        "alp/clip_share_positive": pytest.approx(1 / 3),
        "alp/guard_share_positive": pytest.approx(2 / 3),
        "alp/clip_share_negative": 1.0,
        "alp/guard_share_negative": 0.0,
        "alp/advantage_positive_tokens": 6.0,
        "alp/advantage_negative_tokens": 4.0,
    }


def test_every_metric_is_in_the_table_with_a_meaning():
    assert set(RatioTelemetry().summary()) <= set(METRICS)
    assert all(name.startswith("alp/") and len(text) > 10 for name, text in METRICS.items())
