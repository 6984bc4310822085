"""Void episodes in OpenRLHF's own experience: masked, finite, and in or out of the baseline."""

from __future__ import annotations

import torch
from openrlhf.trainer.ppo_utils.experience import Experience

from openrlhf_alp.learner.experience import (
    _zero_metrics_of_untrained,
    leave_void_out_of_baseline,
)
from openrlhf_alp.rollouts.response import VOID


def samples(places: list[int], rewards: list[float], void: list[int]) -> Experience:
    return Experience(
        index=places,
        rewards=torch.tensor(rewards),
        info={VOID: torch.tensor([float(v) for v in void])},
    )


def test_void_samples_leave_the_mean_of_their_group_where_the_others_put_it() -> None:
    """Two groups of four, spread over two micro-batches in another order than the prompts'.

    Group 0 has rewards 1, 0, and two void ones: the mean of the others is 0.5. Group 1 has none.
    """
    first = samples([0, 5, 2], [1.0, 0.25, 0.0], [0, 0, 1])
    second = samples([3, 1, 4, 6, 7], [0.0, 0.0, 1.0, 1.0, 1.0], [1, 0, 0, 0, 0])
    leave_void_out_of_baseline([first, second], samples_per_prompt=4)
    assert first.rewards.tolist() == [1.0, 0.25, 0.5]
    assert second.rewards.tolist() == [0.5, 0.0, 1.0, 1.0, 1.0]


def test_a_group_of_void_samples_only_keeps_its_rewards() -> None:
    group = samples([0, 1], [0.0, 1.0], [1, 1])
    leave_void_out_of_baseline([group], samples_per_prompt=2)
    assert group.rewards.tolist() == [0.0, 1.0]


def test_the_metrics_of_a_sample_without_a_trained_token_are_zero_not_nan() -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    values = torch.tensor([[0.5, 1.5], [3.0, 3.0]])
    mean = (values * mask).sum(-1) / mask.sum(-1)
    assert mean.isnan().any()
    experience = Experience(action_mask=mask, info={"kl": mean, "logprobs_diff": -mean})
    _zero_metrics_of_untrained(experience)
    assert experience.info["kl"].tolist() == [1.0, 0.0]
    assert experience.info["logprobs_diff"].tolist() == [-1.0, 0.0]
