"""Our loss in OpenRLHF's place: the same call, the same tuple, the same normalisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from openrlhf.models import PolicyLoss, aggregate_loss

from openrlhf_alp.learner.actor import AlpPolicyLoss
from openrlhf_alp.objective.config import ObjectiveConfig
from openrlhf_alp.objective.methods import METHODS


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 9)
    mask = (torch.rand(shape, generator=generator) > 0.3).long()
    mask[:, 0] = 1
    rollout = -torch.rand(shape, generator=generator) * 3
    return {
        "log_probs": rollout + 0.3 * torch.randn(shape, generator=generator),
        "rollout": rollout,
        "advantages": torch.randn(shape, generator=generator),
        "mask": mask,
    }


@pytest.mark.parametrize("token_level", [True, False])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_token_bypass_is_upstreams_ppo_with_the_rollout_as_old_policy(
    token_level: bool, dual_clip: float | None
) -> None:
    data = batch()
    upstream = PolicyLoss(0.2, 0.28, dual_clip, token_level_loss=token_level)
    config = ObjectiveConfig(level="token", clip_low=0.2, clip_high=0.28, dual_clip=dual_clip)
    ours = AlpPolicyLoss(config, aggregate=aggregate_loss, token_level_loss=token_level)
    counts = {"dp_size": 2, "batch_num_tokens": 50.0, "global_batch_size": 7.0}
    losses, gradients = [], []
    for loss_fn, old in ((upstream, data["rollout"]), (ours, torch.zeros_like(data["rollout"]))):
        log_probs = data["log_probs"].clone().requires_grad_()
        loss, _, kl, *_ = loss_fn(
            log_probs, old, data["advantages"],
            action_mask=data["mask"], rollout_log_probs=data["rollout"], **counts,
        )  # fmt: skip
        loss.backward()
        losses.append((loss.item(), kl.item()))
        gradients.append(log_probs.grad)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0] is not None and gradients[1] is not None
    torch.testing.assert_close(gradients[0], gradients[1])


UPSTREAM_CORRECTIONS = {
    "tis": ("token", "clip", "ratio", [0.0, 2.0]),
    "icepop": ("token", "mask", "ratio", [0.5, 5.0]),
    "geo-mis": ("seq", "mask", "ratio", [0.999, 1.001]),
}


@pytest.mark.parametrize("method", ["grpo", *UPSTREAM_CORRECTIONS])
@pytest.mark.parametrize("token_level", [True, False])
def test_methods_that_upstream_has_are_upstreams(method: str, token_level: bool) -> None:
    """Loss and gradient, with an old policy between learner and rollout engine."""
    data = batch()
    old = data["rollout"] + 0.3 * torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    old[0] = data["rollout"][0]  # within the narrow band of geo-mis
    correction = UPSTREAM_CORRECTIONS.get(method, ("off", "mask", "ratio", [0.5, 5.0]))
    upstream = PolicyLoss(0.2, 0.28, 10.0, token_level, "ppo", *correction)
    ours = AlpPolicyLoss(
        METHODS[method].objective, aggregate=aggregate_loss, token_level_loss=token_level
    )
    found = []
    for loss_fn in (upstream, ours):
        log_probs = data["log_probs"].clone().requires_grad_()
        loss, *_ = loss_fn(log_probs, old, data["advantages"], data["mask"], data["rollout"])
        loss.backward()
        found.append((loss.detach(), log_probs.grad))
    assert found[0][1].abs().sum() > 0
    torch.testing.assert_close(found[0], found[1])


def test_gspo_is_upstreams() -> None:
    """Its gradient through the whole ratio is ours token by token, as advantages are shared."""
    data = batch()
    old = data["rollout"] + 0.01 * torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    advantages = torch.tensor([[1.0], [-0.5], [2.0], [-1.0]]).expand(4, 9)
    upstream = PolicyLoss(0.3, 0.4, 10.0, policy_loss_type="gspo")
    objective = dataclasses.replace(METHODS["gspo"].objective, clip_low=0.3, clip_high=0.4)
    ours = AlpPolicyLoss(objective, aggregate=aggregate_loss, token_level_loss=False)
    found = []
    for loss_fn in (upstream, ours):
        log_probs = data["log_probs"].clone().requires_grad_()
        loss, *_ = loss_fn(log_probs, old, advantages, data["mask"], data["rollout"])
        loss.backward()
        found.append((loss.detach(), log_probs.grad))
    assert (found[0][1].abs().sum(-1) > 0).sum() >= 2
    torch.testing.assert_close(found[0], found[1])


def test_the_old_log_probs_are_not_read() -> None:
    data = batch()
    loss_fn = AlpPolicyLoss(
        METHODS["seq-alp"].objective, aggregate=aggregate_loss, token_level_loss=True
    )
    values = [
        loss_fn(data["log_probs"], old, data["advantages"], data["mask"], data["rollout"])[0]
        for old in (data["rollout"], torch.full_like(data["rollout"], float("nan")))
    ]
    assert torch.equal(values[0], values[1])


def test_two_ranks_give_the_loss_of_one() -> None:
    """DeepSpeed averages gradients over ranks; dp_size and the global count undo that."""
    data = batch()
    loss_fn = AlpPolicyLoss(
        METHODS["token-alp"].objective, aggregate=aggregate_loss, token_level_loss=True
    )

    def loss(rows: slice, **counts: float) -> torch.Tensor:
        part = {name: tensor[rows] for name, tensor in data.items()}
        return loss_fn(
            part["log_probs"], part["rollout"], part["advantages"], part["mask"], part["rollout"],
            **counts,
        )[0]  # fmt: skip

    total = float(data["mask"].sum())
    ranks = [
        loss(rows, dp_size=2, batch_num_tokens=total) for rows in (slice(0, 1), slice(1, None))
    ]
    whole = loss(slice(None), dp_size=1, batch_num_tokens=total)
    torch.testing.assert_close(sum(ranks) / 2, whole)


def test_missing_rollout_log_probs_are_an_error_that_says_what_to_do() -> None:
    data = batch()
    loss_fn = AlpPolicyLoss(
        METHODS["token-alp"].objective, aggregate=aggregate_loss, token_level_loss=True
    )
    with pytest.raises(ValueError, match=r"--rollout\.service_urls"):
        loss_fn(data["log_probs"], data["rollout"], data["advantages"], data["mask"])


def test_the_aggregation_mode_is_upstreams_flag(parse: Callable[..., SimpleNamespace]) -> None:
    args = parse("--alp.enable", "--actor.loss_agg_mode", "seq-mean-token-mean")
    assert args.actor.loss_agg_mode == "seq-mean-token-mean"
