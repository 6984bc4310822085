"""From rollouts to experience without a pass for "old" log-probs."""

from __future__ import annotations

from typing import Any

import ray
import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

from openrlhf_alp.learner.staleness import TOKEN_VERSIONS
from openrlhf_alp.rollouts.response import VOID

SAMPLE_ID = "alp/sample_id"
"""Key in `Experience.info`: the sample's number in this run, part of the key of its noise."""


class AlpExperienceMaker(RemoteExperienceMaker):
    """Upstream: `RemoteExperienceMaker`, built in `BasePPOTrainer.__init__`.

    With one denominator, pi_theta,sigma / mu, nothing reads pi_old: the rollout log-probs take its
    place and one of the four forwards of a step is saved.
    """

    def make_experience(self, samples_list: list[Experience]) -> list[Experience]:
        self._samples_list = samples_list
        try:
            experiences = super().make_experience(samples_list)
        finally:
            del self._samples_list
        for experience in experiences:
            _zero_metrics_of_untrained(experience)
        return experiences

    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        if self.args.tool_service.void_baseline == "drop":
            leave_void_out_of_baseline(experiences, self.args.rollout.n_samples_per_prompt)
        return super().compute_advantages_and_returns(experiences)

    def _dispatch_forward(self, group: Any, sync_condition: bool, **kwargs: Any) -> Any:
        if group is not self.actor_model_group or not self.args.alp.enable:
            return super()._dispatch_forward(group, sync_condition, **kwargs)
        # Upstream keeps every duplicate-th entry: one per ring-attention / tensor-parallel copy.
        copies = self.args.ds.ring_attn_size * self.args.ds.tensor_parallel_size
        rows = [_masked_rollout_log_probs(sample) for sample in self._samples_list]
        return ray.put([[row] for row in rows for _ in range(copies)])


def _masked_rollout_log_probs(sample: Experience) -> torch.Tensor:
    """(B, T-1) float32 log mu, 0.0 off the action mask."""
    if sample.rollout_log_probs is None:
        raise ValueError(
            "a rollout came without log-probs, the denominator of the single ratio. The rollout "
            "service always sends them; a custom agent must fill `rollout_log_probs`."
        )
    return sample.rollout_log_probs * sample.action_mask


def _zero_metrics_of_untrained(experience: Experience) -> None:
    """Upstream's means over a sample's trained tokens are 0 / 0 where a void turn left none."""
    untrained = experience.action_mask.sum(-1) == 0
    for name in ("kl", "logprobs_diff"):
        experience.info[name] = experience.info[name].masked_fill(untrained, 0.0)


def leave_void_out_of_baseline(experiences: list[Experience], samples_per_prompt: int) -> None:
    """Give void samples the mean reward of their group's others, so that they do not move it.

    Their own advantage becomes 0. With `group_norm` the standard deviation is that of the whole
    group, in which they now sit at the mean. A group of void samples only keeps its rewards.

    Args:
        experiences: all samples of the step; `index` holds their places in the order of prompts.
        samples_per_prompt: size of a group.
    """
    places = torch.tensor([place for e in experiences for place in e.index])
    rewards = torch.cat([e.rewards for e in experiences]).float()
    void = torch.cat([e.info[VOID] for e in experiences]).bool()
    groups = places // samples_per_prompt
    for group in groups[void].unique():
        others = (groups == group) & ~void
        if others.any():
            rewards[(groups == group) & void] = rewards[others].mean()
    sizes = [len(e.index) for e in experiences]
    for experience, own in zip(experiences, rewards.split(sizes), strict=True):
        experience.rewards = own


class AlpSamplesGenerator(SamplesGenerator):
    """Upstream: `SamplesGenerator`, built in `PPOTrainer.__init__` and `GenerateSamplesActor`.

    Numbers the samples and replaces prompts whose group was dropped, so that a step keeps its size.
    """

    _num_samples = 0

    def _process_response_into_experience(self, response: dict, **kwargs: Any) -> Experience:
        experience = super()._process_response_into_experience(response, **kwargs)
        if self.args.rollout_service.urls:  # upstream's own engines have no versions
            experience.info[TOKEN_VERSIONS] = [response["token_versions"]]
        experience.info[SAMPLE_ID] = torch.tensor([self._num_samples])
        self._num_samples += 1
        return experience

    def _generate_vllm(
        self, dataloader_iter: Any, num_prompts: int, dynamic_filtering: bool, **kwargs: Any
    ) -> tuple[list[Experience], int, bool]:
        samples_per_prompt = kwargs.get(
            "n_samples_per_prompt", self.args.rollout.n_samples_per_prompt
        )
        experiences: list[Experience] = []
        consumed = 0
        exhausted = False
        while not exhausted and len(experiences) < num_prompts * samples_per_prompt:
            missing = num_prompts - len(experiences) // samples_per_prompt
            new, new_consumed, exhausted = super()._generate_vllm(
                dataloader_iter, missing, dynamic_filtering, **kwargs
            )
            experiences += new
            consumed += new_consumed
        return experiences, consumed, exhausted
