"""d loss / d delta against central differences in float64."""

import pytest
import torch
from torch import nn

from openrlhf_alp.alp import attach
from openrlhf_alp.objective.config import ObjectiveConfig
from openrlhf_alp.objective.loss import policy_loss

TOKENS = torch.arange(14).reshape(2, 7) * 4
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]])
ACTIONS = (MASK[:, :-1] * MASK[:, 1:]).bool()
STEP = 1e-5


@pytest.fixture
def build_exact(build_model, settings):
    """(family, kind) -> a float64 model with random deltas.

    Hugging Face's RMSNorm computes in float32 whatever its input, which would drown a difference
    quotient; torch's own norm with the same weights keeps float64.
    """

    def build(family, kind):
        model = build_model(family).double()
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child).__name__.endswith("RMSNorm"):
                    norm = nn.RMSNorm(child.weight.numel(), eps=child.variance_epsilon)
                    norm.weight = child.weight
                    setattr(module, name, norm)
        perturbation = attach(model, settings(sigma0=0.1, kind=kind)).double()
        for layer, delta in perturbation.delta.items():
            delta.data.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(int(layer)))
        return model

    return build


def perturbed_log_probs(model):
    """(2, 6) float64 log-probs of the next tokens."""
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    with model.alp.enabled(update=2, sample_ids=torch.arange(2), attention_mask=MASK):
        logits = model(TOKENS, attention_mask=MASK, position_ids=positions).logits
    return logits[:, :-1].log_softmax(-1).gather(-1, TOKENS[:, 1:, None]).squeeze(-1)


def central_difference(loss, delta, entry):
    with torch.no_grad():
        start = delta[entry].item()
        delta[entry] = start + STEP
        above = loss().item()
        delta[entry] = start - STEP
        below = loss().item()
        delta[entry] = start
    return (above - below) / (2 * STEP)


def assert_gradient_is_the_difference_quotient(model, loss):
    for delta in model.alp.delta.values():
        assert delta.grad.abs().max() > 1e-4
        for entry in range(0, delta.numel(), 5):
            difference = central_difference(loss, delta, entry)
            assert delta.grad[entry].item() == pytest.approx(difference, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("kind", ["vector", "scalar"])
def test_delta_gradient_of_a_likelihood(family, build_exact, kind):
    model = build_exact(family, kind)
    weights = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6) * ACTIONS

    def loss():
        return (perturbed_log_probs(model) * weights).sum()

    loss().backward()
    assert_gradient_is_the_difference_quotient(model, loss)


@pytest.mark.parametrize("kind", ["vector", "scalar"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_delta_gradient_of_the_policy_loss(build_exact, kind, level):
    """The ratios stay inside the window, so the loss is smooth.

    Sequence levels hold the ratio's value constant by design (stop-gradient). Their gradient is
    that of sum_t -A_t exp(s) l_t / n with s fixed, and this is what the differences are taken of.
    """
    model = build_exact("llama", kind)
    config = ObjectiveConfig(level=level, clip_low=1.0, clip_high=1e6, dual_clip=None)
    advantages = torch.tensor([[1.5], [-0.5]], dtype=torch.float64).expand(2, 6)
    log_probs = perturbed_log_probs(model)
    rollout = log_probs.detach() - torch.linspace(-0.1, 0.2, 6, dtype=torch.float64)

    def loss_of(log_probs):
        return policy_loss(
            log_probs=log_probs,
            rollout_log_probs=rollout,
            advantages=advantages,
            action_mask=ACTIONS,
            config=config,
        ).loss

    loss_of(log_probs).backward()
    gaps = (log_probs.detach() - rollout) * ACTIONS
    sequence = gaps.sum(dim=1, keepdim=True)
    ratio = {"sequence": sequence, "geometric": sequence / ACTIONS.sum(dim=1, keepdim=True)}

    def loss():
        if level == "token":
            return loss_of(perturbed_log_probs(model))
        weights = -advantages * ratio[level].exp() * ACTIONS / ACTIONS.sum()
        return (weights * perturbed_log_probs(model)).sum()

    assert_gradient_is_the_difference_quotient(model, loss)
