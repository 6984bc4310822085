"""Log-ratios at the three levels against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from openrlhf_alp.alp import per_token_log_ratio, token_log_ratio

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


@hypothesis_settings(deadline=None)
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
