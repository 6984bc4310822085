"""Several draws of the noise in one forward pass."""

import math

import pytest
import torch

from openrlhf_alp.alp import attach, log_mean_exp_over_draws, mean_over_draws, repeat_rows
from openrlhf_alp.alp.noise import draw_keys, layer_keys, token_keys

TOKENS = torch.arange(14).reshape(2, 7) * 4
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]])
IDS = torch.tensor([5, 9])


def noisy(model, log_probs_of, *, update=0):
    perturbation = model.alp
    draws = perturbation.draws
    with perturbation.enabled(update=update, sample_ids=IDS, attention_mask=MASK):
        return log_probs_of(model, repeat_rows(TOKENS, draws), repeat_rows(MASK, draws))


def test_the_log_of_the_mean_probability_and_its_gradient_by_hand():
    """Probabilities 0.2 and 0.4: mean 0.3; the draws weigh 1/3 and 2/3."""
    log_probs = torch.tensor([[0.2], [0.4]], dtype=torch.float64).log().requires_grad_()
    mean = log_mean_exp_over_draws(log_probs, 2)
    assert mean.item() == pytest.approx(math.log(0.3))
    mean.sum().backward()
    assert log_probs.grad.flatten().tolist() == pytest.approx([1 / 3, 2 / 3])


def test_one_draw_is_the_tensor_itself():
    values = torch.randn(3, 4)
    for function in (repeat_rows, mean_over_draws, log_mean_exp_over_draws):
        assert function(values, 1) is values


def test_rows_are_ordered_by_draw_and_then_by_sample():
    rows = repeat_rows(torch.tensor([[1.0], [2.0]]), 3)
    assert rows.flatten().tolist() == [1, 2, 1, 2, 1, 2]
    assert mean_over_draws(rows + torch.tensor([[0.0]] * 4 + [[3.0]] * 2), 3).tolist() == [
        [2.0],
        [3.0],
    ]


def test_the_first_of_several_draws_is_the_only_one_of_a_run_with_one(
    build_model, settings, log_probs_of
):
    one, three = build_model(), build_model()
    attach(one, settings())
    attach(three, settings(draws=3))
    single = noisy(one, log_probs_of)
    draws = noisy(three, log_probs_of).unflatten(0, (3, 2))
    # Another batch size may sum in another order, so equality is up to rounding.
    valid = (MASK[:, 1:] & MASK[:, :-1]).bool()  # padding has no noise
    torch.testing.assert_close(draws[0][valid], single[valid], rtol=1e-4, atol=1e-5)
    for other in (1, 2):
        assert (draws[other][valid] - draws[0][valid]).abs().min() > 0


def test_more_draws_have_a_smaller_spread_over_updates(build_model, settings, log_probs_of):
    """The variance of a mean of 16 is a sixteenth; tokens are correlated, so within a factor 3."""
    spread = {}
    for draws in (1, 16):
        model = build_model()
        attach(model, settings(sigma0=0.02, draws=draws))
        with torch.no_grad():
            updates = [
                log_mean_exp_over_draws(noisy(model, log_probs_of, update=u), draws)[0]
                for u in range(12)
            ]
        spread[draws] = torch.stack(updates).var(dim=0).mean().item()
    assert 16 / 3 < spread[1] / spread[16] < 16 * 3


def test_no_draw_shares_a_key_with_another_draw_or_layer():
    keys = token_keys(seed=0, update=0, sample_ids=torch.arange(50), positions=torch.arange(50))
    rows = [layer_keys(draw_keys(keys, draw), layer) for draw in range(5) for layer in range(7)]
    everything = torch.cat([keys, *rows, *(draw_keys(keys, draw) for draw in range(1, 5))])
    assert everything.unique().numel() == everything.numel()


@pytest.mark.parametrize("draws", [0, -1, 1.5, True])
def test_draws_are_a_count(settings, draws):
    with pytest.raises(ValueError, match=r"--alp\.draws is "):
        settings(draws=draws)


def test_sigma_learns_from_every_draw(build_model, settings, log_probs_of):
    model = build_model()
    attach(model, settings(draws=2))
    log_mean_exp_over_draws(noisy(model, log_probs_of), 2).sum().backward()
    assert all(delta.grad.abs().sum() > 0 for delta in model.alp.delta.values())
