"""The figures of a mismatch, and from where on they are suspicious or broken."""

from __future__ import annotations

import math

import numpy as np
import pytest

from openrlhf_alp.learner.mismatch.judge import CAUSES, Level, judge
from openrlhf_alp.learner.mismatch.measure import METRICS, Mismatch, metrics_of


def test_the_figures_are_those_of_the_log_ratios() -> None:
    mismatch = Mismatch.of(np.array([-0.2, 0.0, 0.1, 0.1], dtype=np.float32))
    assert mismatch.num_tokens == 4
    assert mismatch.mean == pytest.approx(0.0, abs=1e-7)
    assert mismatch.std == pytest.approx(math.sqrt((0.04 + 0.01 + 0.01) / 4))
    assert mismatch.quantiles["p50"] == pytest.approx(0.05)
    assert mismatch.max_abs == pytest.approx(0.2)
    # The mean of exp(d) - 1 - d.
    k3 = (math.exp(-0.2) - 1 + 0.2 + 2 * (math.exp(0.1) - 1 - 0.1)) / 4
    assert mismatch.k3_kl == pytest.approx(k3)


def test_equal_log_probs_are_ok_and_need_no_cause() -> None:
    verdict = judge(Mismatch.of(np.zeros(100, dtype=np.float32)).figures())
    assert (verdict.level, verdict.findings, verdict.causes) == (Level.OK, (), ())


def test_the_rounding_of_bfloat16_is_ok() -> None:
    noise = 0.06 * np.random.default_rng(0).standard_normal(4000)
    assert judge(Mismatch.of(noise.astype(np.float32)).figures()).level is Level.OK


def test_a_wide_tail_is_suspicious_whatever_the_mean() -> None:
    values = np.zeros(1000, dtype=np.float32)
    values[:20] = -0.6
    verdict = judge(Mismatch.of(values).figures())
    assert verdict.level is Level.SUSPICIOUS
    assert verdict.findings == ("|p01| is 0.6, the limit 0.5",)
    assert verdict.causes == CAUSES[Level.SUSPICIOUS]


def test_another_policy_is_broken_and_the_worst_figure_comes_first() -> None:
    verdict = judge(Mismatch.of(np.full(100, -1.0, dtype=np.float32)).figures())
    assert verdict.level is Level.BROKEN
    assert verdict.findings == (
        "|k3_kl| is 0.37, the limit 0.1",
        "|mean| is 1, the limit 0.2",
        "|p01| is 1, the limit 0.5",
        "|p99| is 1, the limit 0.5",
    )


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_log_prob_that_is_no_number_is_broken(value: float) -> None:
    values = np.zeros(100, dtype=np.float32)
    values[7] = value
    assert judge(Mismatch.of(values).figures()).level is Level.BROKEN


def test_no_token_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="no token was sampled"):
        Mismatch.of(np.zeros(0, dtype=np.float32))


def test_every_metric_is_explained() -> None:
    mismatch = Mismatch.of(np.zeros(3, dtype=np.float32))
    assert metrics_of(mismatch, judge(mismatch.figures())).keys() == METRICS.keys()
