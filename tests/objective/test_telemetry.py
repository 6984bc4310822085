"""The step's ratio metrics against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from openrlhf_alp.objective.telemetry import METRICS, RatioTelemetry


def summary_of(log_ratio, actions):
    telemetry = RatioTelemetry()
    telemetry.add(torch.tensor(log_ratio), torch.tensor(actions))
    return telemetry.summary()


def test_numbers_by_hand():
    """Tokens 0, ln 2, ln 3 in two samples (sums ln 2 and ln 3).

    Weights 1, 2, 3: (1 + 2 + 3)**2 / (3 * 14) = 36 / 42. Sequence weights 2, 3: 25 / (2 * 13).
    k3: (0 + 2 - 1 - ln 2 + 3 - 1 - ln 3) / 3 = (3 - ln 6) / 3.
    """
    summary = summary_of([[0.0, math.log(2), 9.0], [math.log(3), 9.0, 9.0]], [[1, 1, 0], [1, 0, 0]])
    assert summary["alp/num_tokens"] == 3
    assert summary["alp/log_ratio_p50"] == pytest.approx(math.log(2))
    assert summary["alp/log_ratio_mean"] == pytest.approx(math.log(6) / 3)
    assert summary["alp/log_ratio_max"] == pytest.approx(math.log(3))
    assert summary["alp/token_ess"] == pytest.approx(36 / 42)
    assert summary["alp/sequence_ess"] == pytest.approx(25 / 26)
    assert summary["alp/sequence_log_ratio_mean"] == pytest.approx(math.log(6) / 2)
    assert summary["alp/sequence_log_ratio_max"] == pytest.approx(math.log(3))
    assert summary["alp/k3_kl"] == pytest.approx((3 - math.log(6)) / 3, rel=1e-6)


def test_quantiles_by_hand():
    """0, 1, ..., 100: the q % quantile is q."""
    values = [[float(i) for i in range(101)]]
    summary = summary_of(values, [[1] * 101])
    for percent in (1, 25, 50, 75, 99):
        assert summary[f"alp/log_ratio_p{percent:02d}"] == pytest.approx(percent)


def test_a_step_without_tokens_reads_zero_with_the_same_keys():
    empty = RatioTelemetry().summary()
    assert set(empty.values()) == {0.0}
    masked = summary_of([[1.0, 2.0]], [[0, 0]])
    assert masked == empty
    assert list(empty) == list(summary_of([[1.0, 2.0]], [[1, 1]]))


def test_huge_sequence_ratios_do_not_overflow_the_effective_sample_size():
    """Sums of 3,000 and 3,000 + ln 2: weights 1 and 2 up to a factor, ESS 9 / (2 * 5)."""
    summary = summary_of([[3000.0], [3000.0]], [[1], [0]])
    assert summary["alp/sequence_ess"] == 1.0
    telemetry = RatioTelemetry()
    telemetry.merge(
        {
            "tokens": np.zeros(1, dtype=np.float32),
            "sequences": np.array([3000.0, 3000.0 + math.log(2)]),
        }
    )
    assert telemetry.summary()["alp/sequence_ess"] == pytest.approx(0.9)


@hypothesis_settings(deadline=None)
@given(
    npst.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 5)),
                elements=st.floats(-5, 5, width=32)),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_micro_batches_and_ranks_add_up_to_one_batch(values, random):
    actions = np.array([[random.random() < 0.7 for _ in row] for row in values])
    whole = RatioTelemetry()
    whole.add(torch.tensor(values), torch.tensor(actions))
    ranks = [RatioTelemetry(), RatioTelemetry()]
    for row, mask in zip(values, actions, strict=True):
        random.choice(ranks).add(torch.tensor(row[None]), torch.tensor(mask[None]))
    merged = RatioTelemetry()
    for rank in ranks:
        merged.merge(rank.arrays())
    assert merged.summary() == pytest.approx(whole.summary(), rel=1e-5, abs=1e-6)


def test_every_metric_is_in_the_table_with_a_meaning():
    assert set(RatioTelemetry().summary()) <= set(METRICS)
    assert all(name.startswith("alp/") and len(text) > 10 for name, text in METRICS.items())
