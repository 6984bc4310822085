"""Void episodes in OpenRLHF's own experience: masked, finite, and in or out of the baseline."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from openrlhf.trainer.ppo_utils.experience import Experience

from openrlhf_alp.learner.experience import (
    AlpExperienceMaker,
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


def maker(n_samples: int) -> AlpExperienceMaker:
    """Upstream's own advantages with `group_norm`; its constructor would ask for Ray actors."""
    made = AlpExperienceMaker.__new__(AlpExperienceMaker)
    advantage = SimpleNamespace(estimator="group_norm", gamma=1.0, no_std_norm=False)
    made.args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        reward=SimpleNamespace(
            clip_range=(-10.0, 10.0), overlong_buffer_len=None, stop_properly_penalty_coef=None
        ),
        rollout=SimpleNamespace(n_samples_per_prompt=n_samples),
        tool_service=SimpleNamespace(void_baseline="drop"),
    )
    made.strategy = SimpleNamespace(args=made.args)
    made.advantage_estimator = "group_norm"
    made.kl_ctl = SimpleNamespace(value=0.0)
    return made


def test_the_advantages_are_those_of_a_group_without_its_void_samples() -> None:
    """Rewards 1, 0, 0 count: mean 1/3, standard deviation sqrt(1/3); the void one's reward is 9.

    A second group without a void sample stays as upstream made it: 0.5 / sqrt(1/3).
    """
    experience = samples(
        [0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 0, 9, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0, 0]
    )
    experience.rewards = experience.rewards.float()
    experience.action_mask = torch.tensor([[1, 0, 1]] * 8)
    experience.kl = torch.zeros(8, 3)
    [made] = maker(4).compute_advantages_and_returns([experience])
    third = 1 / 3
    wanted = [(1 - third) / third**0.5, -third / third**0.5, -third / third**0.5, 0.0]
    half = 0.5 / third**0.5
    wanted += [half, half, -half, -half]
    for column in (0, 2):
        torch.testing.assert_close(made.advantages[:, column], torch.tensor(wanted))
        torch.testing.assert_close(made.returns[:, column], torch.tensor(wanted))
    torch.testing.assert_close(made.info["return"], torch.tensor(wanted))
    torch.testing.assert_close(made.info["group_reward_std"], torch.full((8,), third**0.5))
