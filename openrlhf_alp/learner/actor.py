"""The policy update: perturbed forward -> one ratio -> loss -> DeepSpeed step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import ray
import torch
from openrlhf.models import aggregate_loss
from openrlhf.trainer.ppo_utils.experience import Experience
from openrlhf.trainer.ray import ppo_actor

from openrlhf_alp.alp import LayerwisePerturbation, RatioTelemetry
from openrlhf_alp.clients.weights.push import WeightPusher
from openrlhf_alp.learner.experience import SAMPLE_ID
from openrlhf_alp.learner.flags.config import AlpConfig
from openrlhf_alp.learner.mismatch.calibrate import calibrate
from openrlhf_alp.learner.mismatch.recheck import recheck
from openrlhf_alp.learner.policy_loss import UnifiedPolicyLoss
from openrlhf_alp.learner.remote import undecorated
from openrlhf_alp.learner.strategy import perturbation_of, without_sigma
from openrlhf_alp.learner.weight_sync import push_weights

logger = logging.getLogger(__name__)

LOSS_FRACTIONS = (
    "clip_fraction",
    "clip_low_fraction",
    "clip_high_fraction",
    "dual_clip_fraction",
    "guard_fraction",
    "approx_kl",
)
"""Fields of LossOutput that are metrics, each a mean over action tokens."""

_NO_WEIGHT = 1e-6
"""In place of a token count of 0, which upstream divides by: no weight beside any real count."""


class AlpActorPPOTrainer(ppo_actor.ActorPPOTrainer):
    """Upstream: `openrlhf.trainer.ray.ppo_actor.ActorPPOTrainer`.

    With `--alp.enable` absent it adds nothing but the weight push to the rollout service.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.weight_pusher: WeightPusher | None = None  # set on rank 0, by upstream's constructor
        super().__init__(*args, **kwargs)
        self.perturbation = perturbation_of(self.actor)
        self.needs_calibration = self.alp.calibrates
        self.calibration_metrics: dict[str, float] = {}
        self.num_trainings = 0
        if self.alp.enable:
            self.actor_loss_fn = UnifiedPolicyLoss(
                self.alp.ratio_config(),
                aggregate=aggregate_loss,
                token_level_loss=self.args.actor.loss_agg_mode == "token-mean",
            )

    @property
    def alp(self) -> AlpConfig:
        return self.args.alp

    @property
    def update_number(self) -> int:
        """Optimizer steps so far; DeepSpeed checkpoints it, so the noise resumes with it."""
        return self.actor.model.global_steps

    def ppo_train(self, kl_ctl: float) -> dict[str, float]:
        if self.needs_calibration:
            self.calibration_metrics = calibrate(self)
            self.needs_calibration = False
        every = self.args.rollout_service.preflight_every
        preflight = recheck(self) if every and self.num_trainings % every == 0 else {}
        self.num_trainings += 1
        self.telemetry = RatioTelemetry()
        status = super().ppo_train(kl_ctl)
        status.update(preflight)
        if self.alp.enable:
            status.update(self._ratio_metrics())
        if self.perturbation is not None:
            status.update(self._sigma_metrics(self.perturbation))
        return status

    def training_step(
        self, experience: Experience, kl_ctl: float, step: int, loss_batch_info: dict | None = None
    ) -> dict[str, Any]:
        # The samples' numbers key the noise; they are no metric, so upstream must not average them.
        info = dict(experience.info)
        sample_ids = info.pop(SAMPLE_ID, None)
        experience.info = info
        loss_batch_info = self._countable(loss_batch_info, step)
        with self._perturbed(experience, sample_ids):
            result = super().training_step(experience, kl_ctl, step, loss_batch_info)
        if self.alp.enable:
            self._record_ratios(experience, result)
        if result["num_action_tokens"] == 0:
            _weigh_nothing(result)
        return result

    def _countable(self, loss_batch_info: dict | None, step: int) -> dict | None:
        """Normalisers above 0: an optimizer step of void episodes only has loss 0, not NaN.

        None stands for the dynamic batches, whose counts upstream keeps in its buffer.
        """
        if loss_batch_info is None:
            counts = self.replay_buffer.dynamic_batch_num_tokens
            counts[step] = counts[step] or 1.0
            return None
        return {name: count if count > 0 else 1.0 for name, count in loss_batch_info.items()}

    @contextmanager
    def _perturbed(self, experience: Experience, sample_ids: Any) -> Iterator[None]:
        """Noise for this micro-batch, through its forward, recomputation and backward."""
        if self.perturbation is None:
            yield
            return
        mask = experience.attention_mask
        ids = torch.as_tensor([int(i) for i in sample_ids], device=mask.device)
        with self.perturbation.enabled(
            update=self.update_number, sample_ids=ids, attention_mask=mask
        ):
            yield

    def _record_ratios(self, experience: Experience, result: dict[str, Any]) -> None:
        output = self.actor_loss_fn.last_output
        assert output is not None, "the update ran without our loss"
        self.telemetry.add(output.log_ratio, experience.action_mask)
        for name in LOSS_FRACTIONS:
            result["metrics"][f"alp/{name}"] = getattr(output, name)
            result["weights"][f"alp/{name}"] = "token"

    def _ratio_metrics(self) -> dict[str, float]:
        """Quantiles over all tokens of the step on all ranks; the same numbers on every rank."""
        ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(ranks, self.telemetry.arrays())
        step = RatioTelemetry()
        for arrays in ranks:
            step.merge(arrays)
        return step.summary()

    def _sigma_metrics(self, perturbation: LayerwisePerturbation) -> dict[str, float]:
        summary = perturbation.summary()
        return {
            "alp/sigma0": perturbation.sigma0,
            "alp/sigma_mean": summary.mean,
            "alp/sigma_min": summary.minimum,
            "alp/sigma_max": summary.maximum,
            "alp/sigma_bound_share": summary.share_at_bound,
            **self.calibration_metrics,
        }

    def _init_vllm_sync_group(self, backend: str) -> None:
        """Called on rank 0 only. A service needs no process group, but a pusher."""
        if not self.args.rollout_service.urls:
            super()._init_vllm_sync_group(backend)
            return
        api_key, admin_key = ray.get(self.vllm_engines[0].keys.remote())
        service = self.args.rollout_service
        self.weight_pusher = WeightPusher(
            service.urls,
            api_key=api_key,
            admin_key=admin_key,
            transport=service.weights.kind,
            meeting=service.weights.meeting,
        )

    def broadcast_to_vllm(self) -> None:
        with without_sigma(self.actor):
            if self.args.rollout_service.urls:
                model = self.actor.model.module
                pushed = push_weights(self.weight_pusher, model, self.args.ds.zero_stage)
                if pushed is not None:
                    engines = self.vllm_engines
                    ray.get([e.require_version.remote(pushed.version) for e in engines])
            else:
                super().broadcast_to_vllm()


def _weigh_nothing(result: dict[str, Any]) -> None:
    """For a micro-batch of void episodes only: upstream divides by its tokens."""
    result["num_action_tokens"] = _NO_WEIGHT
    for name, weight in result["weights"].items():
        if weight == "token":
            result["metrics"][name] = 0.0


class AlpPolicyModelActor(undecorated(ppo_actor.PolicyModelActor)):  # type: ignore[misc]
    """Upstream: `openrlhf.trainer.ray.ppo_actor.PolicyModelActor`, which names its trainer."""

    def init_model_from_pretrained(self, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(ppo_actor, "ActorPPOTrainer", AlpActorPPOTrainer):
            super().init_model_from_pretrained(*args, **kwargs)
        if self.checkpoint_states:
            # sigma0 came with the checkpoint; measuring it again would change the run.
            self.trainer.needs_calibration = False


# Another name than the class: Ray then ships the class by reference and workers import it from
# here.
RemoteAlpPolicyModelActor = ray.remote(num_gpus=1)(AlpPolicyModelActor)
