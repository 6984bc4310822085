"""Log-ratios at the three levels, and the KL estimate, against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_alp.objective.ratio import k3_kl, per_token_log_ratio, token_log_ratio

LEVELS = ["token", "sequence", "geometric"]

# Two samples: three and one action tokens. Log-ratios 0.1, -0.3, 0.5 (sum 0.3, mean 0.1) and 0.7.
LOG_PROBS = torch.tensor([[-1.0, -2.0, -3.0, -9.0], [-8.0, -0.5, -7.0, -6.0]])
ROLLOUT = torch.tensor([[-1.1, -1.7, -3.5, 0.0], [0.0, -1.2, 0.0, 0.0]])
ACTIONS = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0]])
EXPECTED = {
    "token": [[0.1, -0.3, 0.5, 0.0], [0.0, 0.7, 0.0, 0.0]],
    "sequence": [[0.3, 0.3, 0.3, 0.0], [0.0, 0.7, 0.0, 0.0]],
    "geometric": [[0.1, 0.1, 0.1, 0.0], [0.0, 0.7, 0.0, 0.0]],
}


@pytest.mark.parametrize("level", LEVELS)
def test_values(level):
    ratio = per_token_log_ratio(LOG_PROBS, ROLLOUT, ACTIONS, level)
    torch.testing.assert_close(ratio, torch.tensor(EXPECTED[level]))


@pytest.mark.parametrize("level", LEVELS)
def test_every_action_token_has_gradient_one_in_its_own_log_prob(level):
    """The sequence's value is a constant: d log r_t / d l_t = 1 and no cross terms."""
    log_probs = LOG_PROBS.clone().requires_grad_()
    ratio = per_token_log_ratio(log_probs, ROLLOUT, ACTIONS, level)
    weights = torch.tensor([[1.0, 10.0, 100.0, 1000.0], [2.0, 20.0, 200.0, 2000.0]])
    (weights * ratio).sum().backward()
    assert torch.equal(log_probs.grad, weights * ACTIONS)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_masked_positions_contribute_nothing_whatever_they_hold(level, garbage):
    dirty = torch.where(ACTIONS.bool(), LOG_PROBS, garbage).requires_grad_()
    ratio = per_token_log_ratio(dirty, ROLLOUT, ACTIONS, level)
    torch.testing.assert_close(ratio.detach(), torch.tensor(EXPECTED[level]))
    ratio.sum().backward()
    assert torch.equal(dirty.grad, ACTIONS.float())


@pytest.mark.parametrize("level", LEVELS)
def test_a_sample_without_actions_is_zero(level):
    ratio = per_token_log_ratio(LOG_PROBS, ROLLOUT, torch.zeros(2, 4), level)
    assert torch.equal(ratio, torch.zeros(2, 4))


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="'token', 'sequence' or 'geometric'"):
        per_token_log_ratio(LOG_PROBS, ROLLOUT, ACTIONS, "turn")


finite = st.floats(-20, 0, width=32)


@given(st.lists(st.tuples(finite, finite, st.booleans()), min_size=1, max_size=12))
def test_levels_agree_with_one_another(rows):
    """Mean of the token ratios = geometric, times the length = sequence."""
    log_probs, rollout, actions = (torch.tensor(column)[None] for column in zip(*rows, strict=True))
    log_probs, rollout = log_probs.double(), rollout.double()
    token = token_log_ratio(log_probs, rollout, actions)
    sequence = per_token_log_ratio(log_probs, rollout, actions, "sequence")
    geometric = per_token_log_ratio(log_probs, rollout, actions, "geometric")
    total = token.sum().item()
    for value in sequence[actions].tolist():
        assert value == pytest.approx(total, abs=1e-9)
    for value in geometric[actions].tolist():
        assert value == pytest.approx(total / actions.sum().item(), abs=1e-9)


def test_k3_by_hand():
    """d = ln 2, -ln 2, masked: (2 - 1 - ln 2 + 1/2 - 1 + ln 2) / 2 = 1/4."""
    policy = torch.tensor([math.log(2), 0.0, 99.0])
    reference = torch.tensor([0.0, math.log(2), 0.0])
    assert k3_kl(policy, reference, torch.tensor([1, 1, 0])) == pytest.approx(0.25)


def test_k3_estimates_the_kl_of_reference_against_policy():
    """Exact expectation over the reference's own draws: sum_y q(y) k3(y) = KL(q || p)."""
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    p = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    expected = (q * (q / p).log()).sum().item()
    per_token = [k3_kl(p.log()[[y]], q.log()[[y]], torch.ones(1)) for y in range(3)]
    assert sum(w * k for w, k in zip(q.tolist(), per_token, strict=True)) == pytest.approx(expected)


def test_k3_of_a_tiny_difference_keeps_its_digits():
    """exp(d) - 1 - d = d**2 / 2 for d = 2**-12; float32 arithmetic would lose half the digits."""
    value = k3_kl(torch.tensor([2.0**-12]), torch.zeros(1), torch.ones(1))
    assert value == pytest.approx(2.0**-25, rel=1e-3)


def test_k3_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="selects no token"):
        k3_kl(torch.zeros(2), torch.zeros(2), torch.zeros(2))
