"""The unified ratio loss against numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openrlhf_alp.objective.config import ObjectiveConfig
from openrlhf_alp.objective.loss import (
    MAX_LOG_RATIO,
    NonFiniteLogProbError,
    masked_mean,
    policy_loss,
)
from openrlhf_alp.objective.methods import METHODS


def config(**changes):
    defaults = {"level": "token", "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0}
    return ObjectiveConfig(**{**defaults, **changes})


def loss_of(ratios, advantages, actions=None, *, settings=None, **kwargs):
    """Loss with rollout log-probs -3 and the given ratios; also the gradient in the log-probs."""
    log_ratio = torch.tensor(ratios, dtype=torch.float64).log()
    log_probs = (log_ratio - 3.0).requires_grad_()
    output = policy_loss(
        log_probs=log_probs,
        rollout_log_probs=torch.full_like(log_ratio, -3.0),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        action_mask=torch.ones_like(log_ratio) if actions is None else torch.tensor(actions),
        config=settings or config(),
        **kwargs,
    )
    output.loss.backward()
    return output, log_probs.grad


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_ratio_one_gives_the_reinforce_gradient(level):
    """grad of -mean(A log pi) is -A / n: n = 3 action tokens."""
    advantages = [[2.0, 2.0, 2.0], [-1.0, -1.0, -1.0]]
    output, gradient = loss_of(
        [[1.0] * 3] * 2, advantages, [[1, 1, 0], [0, 0, 1]], settings=config(level=level)
    )
    expected = [[-2 / 3, -2 / 3, 0.0], [0.0, 0.0, 1 / 3]]
    torch.testing.assert_close(gradient, torch.tensor(expected, dtype=torch.float64))
    assert output.loss.item() == pytest.approx((-2 - 2 + 1) / 3)
    assert output.clip_fraction == output.approx_kl == 0.0


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # inside the window [0.8, 1.28]: L = -A r, dL/dl = -A r
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
        # too high already and asked to rise: cut at 1.28
        (1.5, 2.0, -2.56, 0.0),
        # too low already and asked to fall: cut at 0.8
        (0.5, -2.0, 1.6, 0.0),
        # outside, but pulled back inside: not cut
        (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0),
        # dual clip at 10 |A|, only where A < 0
        (12.0, -2.0, 20.0, 0.0),
        (9.0, -2.0, 18.0, 18.0),
        (12.0, 2.0, -2.56, 0.0),
    ],
)
def test_clip_and_dual_clip_at_one_token(ratio, advantage, loss, gradient):
    output, grad = loss_of([[ratio]], [[advantage]])
    assert output.loss.item() == pytest.approx(loss)
    assert grad.item() == pytest.approx(gradient)


def test_without_dual_clip_a_negative_advantage_is_unbounded():
    output, gradient = loss_of([[12.0]], [[-2.0]], settings=config(dual_clip=None))
    assert output.loss.item() == pytest.approx(24.0)
    assert gradient.item() == pytest.approx(24.0)
    assert output.dual_clip_fraction == 0.0


def test_sequence_ratio_by_hand():
    """r = 2 * 0.9 * 1.5 = 2.7 for both advantages signs; window [0.5, 4.0].

    Sample 1 (A = 1): three tokens at -2.7. Sample 2 (r = 0.5 * 0.8 = 0.4, A = -1): cut at 0.5,
    two tokens at 0.5, no gradient. Mean over 5 tokens: (-8.1 + 1.0) / 5.
    """
    output, gradient = loss_of(
        [[2.0, 0.9, 1.5], [0.5, 0.8, 7.0]],
        [[1.0] * 3, [-1.0] * 3],
        [[1, 1, 1], [1, 1, 0]],
        settings=METHODS["seq-alp"].objective,
    )
    assert output.loss.item() == pytest.approx((-8.1 + 1.0) / 5)
    expected = torch.tensor([[-2.7 / 5] * 3, [0.0] * 3], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected)
    assert output.clip_low_fraction == pytest.approx(2 / 5)


def test_geometric_ratio_by_hand():
    """(2 * 0.5 * 1.331) ** (1/3) = 1.1: inside the token window although 2.0 is not."""
    output, gradient = loss_of([[2.0, 0.5, 1.331]], [[3.0] * 3], settings=config(level="geometric"))
    assert output.loss.item() == pytest.approx(-3.3)
    torch.testing.assert_close(gradient, torch.full((1, 3), -1.1, dtype=torch.float64))


def test_fractions_count_action_tokens():
    """Eight action tokens: 1 cut low, 2 cut high, 1 dual; the masked ninth would be cut high."""
    output, _ = loss_of(
        [[0.5, 1.5, 1.5, 12.0, 1.0, 1.0, 1.0, 1.0, 9.0]],
        [[-1.0, 1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 0.0, 1.0]],
        [[1] * 8 + [0]],
    )
    assert output.clip_low_fraction == 1 / 8
    assert output.clip_high_fraction == 2 / 8
    assert output.clip_fraction == 3 / 8
    assert output.dual_clip_fraction == 1 / 8
    assert output.guard_fraction == 0.0
    mean_log_ratio = (math.log(0.5) + 2 * math.log(1.5) + math.log(12)) / 8
    assert output.approx_kl == pytest.approx(-mean_log_ratio)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_guard_keeps_a_huge_ratio_finite_and_is_counted(sign):
    ratios = [[math.exp(sign * 25.0), 1.0]]
    output, gradient = loss_of(ratios, [[-1.0, 1.0]], settings=config(dual_clip=None))
    cut = 0.5 * (math.exp(MAX_LOG_RATIO) - 1) if sign > 0 else 0.5 * (0.8 - 1)
    assert output.loss.item() == pytest.approx(cut)
    assert gradient[0, 0] == 0.0
    assert output.guard_fraction == 0.5
    assert output.log_ratio[0, 0].item() == pytest.approx(sign * 25.0)


def test_log_ratio_is_per_token_at_every_level_and_carries_no_gradient():
    ratios = [[2.0, 0.5, 3.0]]
    for level in ("token", "sequence", "geometric"):
        output, _ = loss_of(ratios, [[1.0] * 3], [[1, 1, 0]], settings=config(level=level))
        expected = torch.tensor([[math.log(2), -math.log(2), 0.0]], dtype=torch.float64)
        torch.testing.assert_close(output.log_ratio, expected)
        assert not output.log_ratio.requires_grad


def test_the_normaliser_is_the_callers():
    """A global count of 10 tokens, of which this rank holds 2."""
    output, gradient = loss_of(
        [[1.0, 1.0]], [[5.0, 5.0]], aggregate=lambda loss, mask: (loss * mask).sum() / 10
    )
    assert output.loss.item() == pytest.approx(-1.0)
    assert gradient.tolist() == [[-0.5, -0.5]]


def test_two_ranks_with_a_global_count_sum_to_one_rank():
    def total(loss, mask):
        return (loss * mask).sum() / 5

    ratios = [[1.1, 0.9, 1.2], [0.7, 1.5, 1.0]]
    advantages = [[1.0, -1.0, 2.0], [0.5, -2.0, 1.0]]
    actions = [[1, 1, 1], [1, 1, 0]]
    whole, whole_gradient = loss_of(ratios, advantages, actions, aggregate=total)
    parts = [
        loss_of([r], [a], [m], aggregate=total)
        for r, a, m in zip(ratios, advantages, actions, strict=True)
    ]
    assert whole.loss.item() == pytest.approx(sum(part.loss.item() for part, _ in parts))
    torch.testing.assert_close(whole_gradient, torch.cat([gradient for _, gradient in parts]))


def test_masked_garbage_reaches_neither_loss_nor_gradient():
    """Tool output and padding may hold anything, nan included."""
    log_probs = torch.tensor([[-1.0, math.nan, -math.inf]], requires_grad=True)
    output = policy_loss(
        log_probs=log_probs,
        rollout_log_probs=torch.tensor([[-1.0, math.inf, math.nan]]),
        advantages=torch.tensor([[1.0, math.nan, math.inf]]),
        action_mask=torch.tensor([[True, False, False]]),
        config=config(),
    )
    output.loss.backward()
    assert output.loss.item() == -1.0
    assert log_probs.grad.tolist() == [[-1.0, 0.0, 0.0]]


def test_an_empty_mask_gives_zero_and_zero_gradient():
    output, gradient = loss_of([[2.0, 3.0]], [[1.0, 1.0]], [[0, 0]])
    assert output.loss.item() == output.clip_fraction == output.approx_kl == 0.0
    assert gradient.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("name", ["log_probs", "rollout_log_probs", "advantages"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_action_token_is_an_error_that_says_where(name, value):
    inputs = {n: torch.zeros(2, 3) for n in ("log_probs", "rollout_log_probs", "advantages")}
    inputs[name][1, 2] = value
    with pytest.raises(NonFiniteLogProbError) as caught:
        policy_loss(**inputs, action_mask=torch.ones(2, 3), config=config())
    message = str(caught.value)
    assert message.startswith(f"1 of 6 action tokens have a nan or infinite value in {name}")
    assert "[(1, 2)]" in message


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.ones(2, 2), torch.zeros(2, 2)).item() == 0.0


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"level": "turn"}, "--alp.method"),
        ({"clip_low": 0.0}, "--alp.clip_low_high"),
        ({"clip_low": 1.5}, "--alp.clip_low_high"),
        ({"clip_high": 0.0}, "--alp.clip_low_high"),
        ({"clip_high": math.inf}, "--alp.clip_low_high"),
        ({"dual_clip": 1.0}, "--alp.dual_clip"),
        ({"dual_clip": math.nan}, "--alp.dual_clip"),
    ],
)
def test_bad_settings_name_the_flag(changes, flag):
    with pytest.raises(ValueError, match=flag):
        config(**changes)


def test_alp_and_bypass_differ_in_the_noise_only():
    for level in ("token", "seq", "gspo"):
        alp, bypass = METHODS[f"{level}-alp"], METHODS[f"{level}-bypass"]
        assert alp.objective == bypass.objective
        assert alp.perturbed and not bypass.perturbed


def test_presets_hold_the_papers_windows():
    assert METHODS["token-alp"].objective == config()
    assert METHODS["seq-alp"].objective == config(level="sequence", clip_low=0.5, clip_high=3.0)


@given(
    ratio=st.floats(1e-4, 1e4),
    advantage=st.floats(-3, 3),
    low=st.floats(0.05, 1),
    high=st.floats(0.05, 5),
    dual=st.none() | st.floats(1.1, 20),
)
def test_loss_is_the_pessimistic_bound_up_to_the_dual_clip(ratio, advantage, low, high, dual):
    """Per token: -A r <= L unless the dual clip lowers it, and L <= c |A| when A < 0."""
    settings = config(clip_low=low, clip_high=high, dual_clip=dual)
    loss = loss_of([[ratio]], [[advantage]], settings=settings)[0].loss.item()
    plain = -advantage * ratio
    slack = 1e-9 * (1 + abs(plain))
    if advantage >= 0 or dual is None:
        assert loss >= plain - slack
    else:
        assert loss <= dual * -advantage + slack
        assert loss >= min(plain, dual * -advantage) - slack
