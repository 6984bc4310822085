"""From rollouts to experience: numbered samples, "old" log-probs where read, no stale groups.

The staleness of a token is the number of weight pushes between the version that sampled it and the
version that is updated: 0 in a synchronous run; in an asynchronous one the queue lets it grow.
Optimizer steps within one training step do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
import torch
from openrlhf.trainer.ppo_utils import samples_generator
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
from tqdm import tqdm

from openrlhf_alp.rollouts.response import VOID

SAMPLE_ID = "alp/sample_id"
"""Key in `Experience.info`: the sample's number in this run, part of the key of its noise."""

TOKEN_VERSIONS = "rollout/token_versions"
"""Key in `Experience.info` of a sample as it comes from the engine: `[((version, num_tokens), ..)]`
in the order of its action tokens. `StalenessGate.admit` takes it out again."""

EPISODE = "alp/episode"
"""Key in `Experience.info` of a sample of a run with `--alp.record`: `[Episode]`.
`StepRecorder.begin` takes it out again."""

STALENESS = "rollout/staleness"
"""Key in `Experience.info` of an admitted sample: (1,) float, the staleness of its oldest token."""

STALENESS_METRICS = {
    "rollout/staleness": "mean over samples of the staleness of their oldest token, in pushes",
    "rollout/staleness_mean": "mean staleness of the action tokens trained on",
    "rollout/staleness_max": "largest staleness of an action token trained on",
    "rollout/stale_share": "action tokens older than --rollout.max_staleness, of those that came",
}

DROPPED_GROUPS = "rollout/dropped_groups"
"""Metric of a step: groups that were lost since the last one, and so were not trained on."""


_EPSILON = 1e-9
"""Upstream adds it to a standard deviation before it divides by it."""


class AlpExperienceMaker(RemoteExperienceMaker):
    """Upstream: `RemoteExperienceMaker`, built in `BasePPOTrainer.__init__`.

    With one denominator, pi_theta,sigma / mu, nothing reads pi_old: the rollout log-probs take its
    place and one of the four forwards of a step is saved. Methods that divide by pi_old keep
    upstream's forward pass for it, which is clean whatever `--alp.method` perturbs.
    """

    on_batch: Callable[[list[Experience]], None] | None = None
    """Called with each step's batch once it has its advantages; set by the trainer."""

    def make_experience_batch(self, rollout_samples: list[Experience]) -> list[Experience]:
        experiences = super().make_experience_batch(rollout_samples)
        if self.on_batch is not None:
            self.on_batch(experiences)
        return experiences

    def make_experience(self, samples_list: list[Experience]) -> list[Experience]:
        # For `_dispatch_forward`, to which upstream passes only tensors of the samples.
        self._samples_list = samples_list
        try:
            experiences = super().make_experience(samples_list)
        finally:
            del self._samples_list
        for experience in experiences:
            _zero_metrics_of_untrained(experience)
        return experiences

    def compute_advantages_and_returns(self, experiences: list[Experience]) -> list[Experience]:
        if self.args.tool_service.void_baseline != "drop":
            return super().compute_advantages_and_returns(experiences)
        samples_per_prompt = self.args.rollout.n_samples_per_prompt
        leave_void_out_of_baseline(experiences, samples_per_prompt)
        experiences = super().compute_advantages_and_returns(experiences)
        if self.args.algo.advantage.estimator == "group_norm":
            leave_void_out_of_spread(
                experiences, samples_per_prompt, clip=self.args.reward.clip_range
            )
        return experiences

    def _dispatch_forward(self, group: Any, sync_condition: bool, **kwargs: Any) -> Any:
        if group is not self.actor_model_group or self.args.alp.needs_old_policy:
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

    Their own advantage becomes 0. A group of void samples only keeps its rewards. `group_norm` also
    divides by a standard deviation, which they make too small: `leave_void_out_of_spread`.

    Args:
        experiences: all samples of the step; `index` gives their places in the order of prompts.
        samples_per_prompt: size of a group.
    """
    rewards, void, groups = _rewards_by_group(experiences, samples_per_prompt)
    for group in groups[void].unique():
        others = (groups == group) & ~void
        if others.any():
            rewards[(groups == group) & void] = rewards[others].mean()
    sizes = [len(e.index) for e in experiences]
    for experience, own in zip(experiences, rewards.split(sizes), strict=True):
        experience.rewards = own


def leave_void_out_of_spread(
    experiences: list[Experience],
    samples_per_prompt: int,
    *,
    clip: tuple[float, float] | None,
) -> None:
    """Normalise with the standard deviation of the samples that count, after `group_norm`.

    Upstream divided by that of the whole group. A reward is one number of the last token, which the
    returns carry to all others, so the difference of both quotients corrects every token at once.

    Args:
        experiences: all samples of the step, with rewards, advantages and returns.
        samples_per_prompt: size of a group.
        clip: bounds of a normalised reward, `--reward.clip_range`.
    """
    rewards, void, groups = _rewards_by_group(experiences, samples_per_prompt)
    low, high = clip or (-math.inf, math.inf)
    corrections = torch.zeros_like(rewards)
    spreads = torch.cat([e.info["group_reward_std"] for e in experiences]).float()
    for group in groups[void].unique():
        own = groups == group
        counting = rewards[own & ~void]
        if not counting.numel():
            continue  # nobody counts more than the others
        # The standard deviation of a single reward is 0 here, and NaN in torch.
        spread = counting.std() if counting.numel() > 1 else counting.new_zeros(())
        before = (rewards[own] - rewards[own].mean()) / (rewards[own].std() + _EPSILON)
        after = (rewards[own] - counting.mean()) / (spread + _EPSILON)
        after = torch.where(void[own], 0.0, after)
        corrections[own] = after.clamp(low, high) - before.clamp(low, high)
        spreads[own] = spread
    sizes = [len(e.index) for e in experiences]
    for experience, own, spread in zip(
        experiences, corrections.split(sizes), spreads.split(sizes), strict=True
    ):
        per_token = own[:, None] * experience.action_mask
        experience.advantages = experience.advantages + per_token
        experience.returns = experience.returns + per_token
        experience.info["return"] = experience.info["return"] + own
        experience.info["group_reward_std"] = spread


def _rewards_by_group(
    experiences: list[Experience], samples_per_prompt: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(N,) rewards, whether void, and group of all samples, in their order."""
    places = torch.tensor([place for e in experiences for place in e.index])
    rewards = torch.cat([e.rewards for e in experiences]).float()
    void = torch.cat([e.info[VOID] for e in experiences]).bool()
    return rewards, void, places // samples_per_prompt


class AlpSamplesGenerator(SamplesGenerator):
    """Upstream: `SamplesGenerator`, built in `PPOTrainer.__init__` and `GenerateSamplesActor`.

    Numbers the samples and replaces prompts whose group was dropped, so that a step keeps its size.
    """

    _num_samples = 0

    def _process_response_into_experience(self, response: dict, **kwargs: Any) -> Experience:
        experience = super()._process_response_into_experience(response, **kwargs)
        if self.args.rollout_service.urls:  # upstream's own engines have no versions
            experience.info[TOKEN_VERSIONS] = [response["token_versions"]]
        if "episode" in response:
            experience.info[EPISODE] = [response["episode"]]
        experience.info[SAMPLE_ID] = torch.tensor([self._num_samples])
        self._num_samples += 1
        return experience

    def _generate_vllm(
        self, dataloader_iter: Any, num_prompts: int, dynamic_filtering: bool, **kwargs: Any
    ) -> tuple[list[Experience], int, bool]:
        """Samples of `num_prompts` groups, prompts taken, and whether the data ran out.

        Raises:
            RuntimeError: too many groups were lost to failed requests.
        """
        if dynamic_filtering:
            return super()._generate_vllm(dataloader_iter, num_prompts, True, **kwargs)
        # Not upstream's loop, which replaces groups under dynamic filtering only and there divides
        # by the size of a dropped one.
        experiences: list[Experience] = []
        pending: list[Any] = []
        missing, consumed, exhausted = num_prompts, 0, False
        lost_before = self._num_lost_groups()
        with tqdm(total=num_prompts, desc="Generate samples") as progress:
            while True:
                if missing and not exhausted:
                    prompts, labels, images, exhausted = samples_generator._collect_prompt_batch(
                        dataloader_iter, missing
                    )
                    consumed += len(prompts)
                    if prompts:
                        pending += self._dispatch_prompts_to_vllm(
                            prompts, labels, images=images, **kwargs
                        )
                if not pending:
                    return experiences, consumed, exhausted
                [done], pending = ray.wait(pending)
                responses = ray.get(done)
                experiences += [
                    self._process_response_into_experience(r, **kwargs) for r in responses
                ]
                # A dropped group's replacement starts now, while the others are still running.
                missing = 0 if responses else 1
                progress.update(1 - missing)
                if missing:
                    self._check_losses(self._num_lost_groups() - lost_before, num_prompts)

    def _num_lost_groups(self) -> int:
        """Groups lost to failed requests so far; upstream's own engines lose none."""
        if not self.args.rollout_service.urls:
            return 0
        return sum(ray.get([e.get_num_lost_groups.remote() for e in self.vllm_engines]))

    def _check_losses(self, num_lost: int, num_prompts: int) -> None:
        share = self.args.rollout_service.max_lost_share
        if num_lost > max(1.0, share * num_prompts):
            raise RuntimeError(
                f"{num_lost} groups of a batch of {num_prompts} prompts were lost to slow, failed "
                f"or invalid requests, more than --rollout.max_lost_share {share}. The lines above "
                "give each reason: raise --rollout.request_timeout_s when answers take longer, or "
                "look at the logs of the services."
            )


class StalenessGate:
    """Drops groups whose oldest token is too old, and keeps the size of a step.

    A group is dropped whole, because a baseline over the rest would be biased. When groups are
    dropped, the others wait for the next batch; nothing is updated meanwhile, so nothing ages. Then
    as many as a step takes are trained on, and the rest waits again.

    Args:
        samples_per_prompt: size of a group; the samples of a group follow each other.
        samples_per_step: how many samples a step trains on.
        max_staleness: largest staleness of a token, in weight pushes; None keeps every group.
    """

    def __init__(
        self, *, samples_per_prompt: int, samples_per_step: int, max_staleness: int | None
    ) -> None:
        self.samples_per_prompt = samples_per_prompt
        self.samples_per_step = samples_per_step
        self.max_staleness = max_staleness
        self.waiting: list[Experience] = []
        self._num_dropped_groups = 0
        self._arrived: list[np.ndarray] = []
        self._trained = np.zeros(0)

    def admit(self, samples: Sequence[Experience], version: int) -> list[Experience]:
        """The samples to update `version` with; none while fresh ones are still missing.

        Raises:
            ValueError: a token is newer than `version`, so this is not the version being updated.
        """
        self._arrived += [_staleness(sample, version) for sample in samples]
        groups = _groups([*self.waiting, *samples], self.samples_per_prompt)
        fresh = [group for group in groups if self._is_fresh(group, version)]
        self._num_dropped_groups += len(groups) - len(fresh)
        kept = [sample for group in fresh for sample in group]
        # The last batch of the data may be short; it is trained on if nothing of it was dropped.
        untouched = len(kept) == len(samples) and not self.waiting
        is_step = untouched or len(kept) >= self.samples_per_step
        size = self.samples_per_step if is_step else 0
        admitted, self.waiting = kept[:size], kept[size:]
        if admitted:
            self._trained = np.concatenate([_settle(sample, version) for sample in admitted])
        return admitted

    def take_dropped_groups(self) -> int:
        """Groups dropped since the last call."""
        dropped, self._num_dropped_groups = self._num_dropped_groups, 0
        return dropped

    def take_metrics(self) -> dict[str, float]:
        """Metrics of the step just admitted: all of STALENESS_METRICS but the first."""
        # Of everything that came, also what was dropped or waits: else the share would always be 0.
        arrived, self._arrived = np.concatenate(self._arrived), []
        bound = np.inf if self.max_staleness is None else self.max_staleness
        return {
            "rollout/staleness_mean": float(self._trained.mean()),
            "rollout/staleness_max": float(self._trained.max()),
            "rollout/stale_share": float((arrived > bound).mean()),
        }

    def _is_fresh(self, group: Sequence[Experience], version: int) -> bool:
        if self.max_staleness is None:
            return True
        return max(_staleness(s, version).max() for s in group) <= self.max_staleness


def _groups(samples: Sequence[Experience], size: int) -> list[Sequence[Experience]]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _staleness(sample: Experience, version: int) -> np.ndarray:
    """(num_actions,) weight pushes since each action token was sampled."""
    [spans] = sample.info[TOKEN_VERSIONS]
    versions, counts = np.array(spans).T
    if versions.max() > version:
        raise ValueError(
            f"a token was sampled by version {versions.max()}, but the version updated is "
            f"{version}. Another learner pushes to the same service; give each learner its own."
        )
    return np.repeat(version - versions, counts).astype(np.float64)


def _settle(sample: Experience, version: int) -> np.ndarray:
    """Replace the sample's versions by its staleness, and return that of each token."""
    staleness = _staleness(sample, version)
    # Upstream merges the tensors of `info`; a list of spans would stop it.
    del sample.info[TOKEN_VERSIONS]
    sample.info[STALENESS] = torch.tensor([staleness.max()])
    return staleness
