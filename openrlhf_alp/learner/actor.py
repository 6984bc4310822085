"""The policy update: perturbed forward -> one ratio -> loss -> DeepSpeed step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ray
import torch
from openrlhf.models import aggregate_loss
from openrlhf.trainer.ppo_utils.experience import Experience, make_experience_batch
from openrlhf.trainer.ray import ppo_actor
from torch import Tensor, nn

from openrlhf_alp.alp import LayerwisePerturbation
from openrlhf_alp.clients.weights.push import WeightPusher
from openrlhf_alp.learner.batches import BatchShape
from openrlhf_alp.learner.compat import undecorated
from openrlhf_alp.learner.experience import SAMPLE_ID
from openrlhf_alp.learner.flags.config import AlpConfig
from openrlhf_alp.learner.mismatch import training as mismatch
from openrlhf_alp.learner.mismatch.forwards import (
    MicroBatch,
    micro_batches,
    with_actions,
)
from openrlhf_alp.learner.mismatch.measure import (
    learner_log_probs,
    learner_log_probs_and_entropy,
    log_ratio,
    scorable,
)
from openrlhf_alp.learner.mismatch.start import NUM_SAMPLES, SigmaStart
from openrlhf_alp.learner.policy_forward import averaging, logits_of_actions
from openrlhf_alp.learner.strategy import (
    METHOD_STATE,
    method_of,
    perturbation_of,
    without_sigma,
)
from openrlhf_alp.learner.telemetry.clean import CleanProbe, num_sequences
from openrlhf_alp.learner.telemetry.step import Adviser, StepTelemetry
from openrlhf_alp.learner.weight_sync import push_weights
from openrlhf_alp.objective.config import ObjectiveConfig
from openrlhf_alp.objective.loss import LossOutput, policy_loss

LOSS_FRACTIONS = (
    "clip_fraction",
    "clip_low_fraction",
    "clip_high_fraction",
    "dual_clip_fraction",
    "mask_fraction",
    "guard_fraction",
    "approx_kl",
)
"""Fields of LossOutput that are metrics, each a mean over action tokens."""

_NO_WEIGHT = 1e-6
"""Replaces a token count of 0, by which upstream would divide; too small to affect a weighted
mean."""


class AlpPolicyLoss(nn.Module):
    """`--alp.method` in the shape of OpenRLHF 0.11.2's `PolicyLoss`: its call and its 5-tuple.

    Args:
        config: what the loss is made of; `old_log_probs` is read only if it needs an old policy.
        aggregate: OpenRLHF's `aggregate_loss`; it knows the global token and sample counts.
        token_level_loss: mean over all tokens of the optimizer step, or over samples.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        *,
        aggregate: Callable[..., Tensor],
        token_level_loss: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.aggregate = partial(aggregate, token_level_loss=token_level_loss)
        self.last_output: LossOutput | None = None

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor,
        rollout_log_probs: Tensor | None = None,
        **global_counts: float,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """All tensors (B, T-1); returns (loss, clip fraction, approx KL, None, None).

        Raises:
            ValueError: no rollout log-probs.
            FloatingPointError: a log-prob on an action token is not finite.
        """
        if rollout_log_probs is None:
            raise ValueError(
                "the batch has no rollout log-probs, by which --alp.method divides or corrects. "
                "Generate through --rollout.service_urls, or with OpenRLHF's engines and "
                "--alp.enable."
            )
        output = policy_loss(
            log_probs=log_probs,
            rollout_log_probs=rollout_log_probs,
            old_log_probs=old_log_probs,
            advantages=advantages,
            action_mask=action_mask,
            config=self.config,
            aggregate=partial(self.aggregate, **global_counts),
        )
        self.last_output = output
        # Upstream detaches what it logs, so numbers go back as tensors.
        clip_fraction, approx_kl = torch.tensor([output.clip_fraction, output.approx_kl])
        return output.loss, clip_fraction, approx_kl, None, None


class AlpActorPPOTrainer(ppo_actor.ActorPPOTrainer):
    """Upstream: `openrlhf.trainer.ray.ppo_actor.ActorPPOTrainer`.

    With `--alp.enable` absent it adds nothing but the weight push to the rollout service.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.weight_pusher: WeightPusher | None = None  # set on rank 0, by upstream's constructor
        super().__init__(*args, **kwargs)
        self.perturbation = perturbation_of(self.actor)
        self.adviser = Adviser(self.perturbation)
        self.num_trainings = 0
        if self.alp.enable:
            self.actor_loss_fn = AlpPolicyLoss(
                self.alp.objective(),
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
        # Both measurements need equal weights on both sides, so they come before the first update.
        if self.perturbation is not None and self.perturbation.start is None:
            self.perturbation.start = self._start_sigma(self.perturbation)
        every = self.args.rollout_service.preflight_every
        preflight = self._recheck() if every and self.num_trainings % every == 0 else {}
        telemetry_every = self.alp.telemetry_every if self.alp.enable else 0
        detailed = bool(telemetry_every) and self.num_trainings % telemetry_every == 0
        self.num_trainings += 1
        self.telemetry = StepTelemetry(self.perturbation, detailed=detailed)
        probe = self._clean_probe() if detailed else None
        with self._batch_of_equal_steps():
            status = super().ppo_train(kl_ctl)
        status.update(preflight)
        if self.alp.enable:
            status.update(
                self.telemetry.metrics(
                    grad_norm=float(status.get("actor_grad_norm") or 0.0),
                    loss_scale=float(getattr(self.actor.model.optimizer, "loss_scale", 1.0)),
                )
            )
        if probe is not None:
            status.update(probe.metrics())
        if self.alp.enable:
            self.adviser.look(status)
        return status

    def training_step(
        self, experience: Experience, kl_ctl: float, step: int, loss_batch_info: dict | None = None
    ) -> dict[str, Any]:
        # The samples' numbers key the noise; they are no metric, so upstream must not average them.
        sample_ids = experience.info.pop(SAMPLE_ID, None)
        loss_batch_info = self._countable(loss_batch_info, step)
        ends = self._mark_optimizer_step(step)
        # Around the backward pass too: gradient checkpointing runs the layers again there.
        observed = self.telemetry.observed(experience.attention_mask)
        logits = logits_of_actions(self.actor, experience) if self.alp.enable else nullcontext()
        with self._perturbed(experience, sample_ids), observed, logits:
            result = super().training_step(experience, kl_ctl, step, loss_batch_info)
        if self.alp.enable:
            self._record_ratios(experience, result)
        if ends:
            self.telemetry.end_update()
        if result["num_action_tokens"] == 0:
            _weigh_nothing(result)
        return result

    def _batch_of_equal_steps(self) -> AbstractContextManager[Any]:
        """Under dynamic batching, optimizer steps of a size that uses every sample of the batch.

        Upstream makes whole steps of `--train.batch_size` only, and no step of a shorter batch.
        """
        train = self.args.train
        if not train.dynamic_batch_enable:
            return nullcontext()
        num_samples = len(self.replay_buffer.items)
        size = BatchShape.of(self.args).dynamic_batch_size(num_samples)
        return mock.patch.object(train, "batch_size", size)

    def _mark_optimizer_step(self, step: int) -> bool:
        """Let the last micro-batch of a shorter batch end its optimizer step; whether one ends.

        DeepSpeed counts micro-batches, and would go on accumulating into the next batch; upstream's
        normalisers are those of a step that ends here.
        """
        if self.args.train.dynamic_batch_enable:
            # Upstream says there itself where a step ends.
            return bool(self.replay_buffer.dynamic_optimizer_step[step])
        num_micro_batches = len(self.replay_buffer) // self.micro_train_batch_size
        window = max(1, self.strategy.accumulated_gradient)
        ends = (step + 1) % window == 0 or step + 1 == num_micro_batches
        self.actor.model.set_gradient_accumulation_boundary(ends)
        return ends

    def _countable(self, loss_batch_info: dict | None, step: int) -> dict | None:
        """Normalisers above 0: an optimizer step of void episodes only has loss 0, not NaN.

        None stands for the dynamic batches, whose counts upstream keeps in its buffer.
        """
        if loss_batch_info is None:
            buffer = self.replay_buffer
            for counts in (buffer.dynamic_batch_num_tokens, buffer.dynamic_global_batch_size):
                counts[step] = counts[step] or 1.0
            return None
        return {name: count if count > 0 else 1.0 for name, count in loss_batch_info.items()}

    @contextmanager
    def _perturbed(self, experience: Experience, sample_ids: Any) -> Iterator[None]:
        """Noise for this batch, averaged over its draws; without a perturbation the clean model.

        Without the unit of sigma, too: until it is measured no rank has had an action token, so
        that there is nothing to train on.
        """
        if self.perturbation is None or self.perturbation.scales is None:
            yield
            return
        mask = experience.attention_mask
        # Upstream's batching makes a list of 0-dimensional tensors of what was one tensor.
        ids = torch.as_tensor([int(i) for i in sample_ids], device=mask.device)
        noise = self.perturbation.enabled(
            update=self.update_number, sample_ids=ids, attention_mask=mask
        )
        with noise, averaging(self.actor, self.perturbation.draws):
            yield

    def _record_ratios(self, experience: Experience, result: dict[str, Any]) -> None:
        output = self.actor_loss_fn.last_output
        assert output is not None, "the update ran without our loss"
        self.telemetry.add(output, experience)
        for name in LOSS_FRACTIONS:
            result["metrics"][f"alp/{name}"] = getattr(output, name)
            result["weights"][f"alp/{name}"] = "token"

    def _start_sigma(self, perturbation: LayerwisePerturbation) -> dict[str, float] | None:
        """Set the unit of sigma and, with `auto`, sigma0, from samples of this step."""
        start = SigmaStart(
            perturbation,
            self._micro_batches(with_actions(self.replay_buffer.items, count=NUM_SAMPLES)),
            batch=self._batch,
            log_probs=partial(learner_log_probs, self.actor),
            perturbed=lambda batch: self._perturbed(batch, batch.info[SAMPLE_ID]),
            objective=self.alp.objective(),
        )
        return start.measure(auto=self.alp.calibrates, factor=self.alp.calibration_factor)

    def _clean_probe(self) -> CleanProbe:
        """Measure a few sequences before the first update. Collective."""
        items = self.replay_buffer.items
        samples = with_actions(items, count=num_sequences(len(items)))

        @torch.no_grad()
        def noisy(batch: Experience) -> Tensor:
            with self._perturbed(batch, batch.info[SAMPLE_ID]):
                return learner_log_probs(self.actor, batch)

        return CleanProbe(
            self._micro_batches(samples),
            batch=self._batch,
            clean=partial(learner_log_probs_and_entropy, self.actor),
            noisy=noisy if self.perturbation is not None else None,
        )

    def _micro_batches(
        self, samples: list[Experience], limit: int | None = None
    ) -> list[MicroBatch]:
        dynamic = self.args.train.dynamic_batch_enable
        return micro_batches(
            samples,
            spare=self.replay_buffer.items[0],
            size=self.micro_train_batch_size,
            max_tokens=self.args.train.max_tokens_per_gpu if dynamic else None,
            limit=limit,
        )

    def _recheck(self) -> dict[str, float]:
        """`preflight/*` of this step: the learner's clean log-probs against the rollouts'."""
        own = self.replay_buffer.items
        # An asynchronous step's own samples are older than the weights that are compared.
        samples = self._new_samples(own) if self.args.train.async_enable else own
        ratios = mismatch.log_ratios(
            self._micro_batches(samples, limit=mismatch.NUM_FORWARDS),
            lambda rows: log_ratio(self.actor, self._batch(rows)),
        )
        return mismatch.recheck(ratios, stop=self.args.rollout_service.preflight_stop)

    def _batch(self, items: list[Experience]) -> Experience:
        batch = make_experience_batch(items, self.args.ds.packing_samples)
        return batch.to_device(torch.cuda.current_device())

    def _new_samples(self, own: list[Experience]) -> list[Experience]:
        """On rank 0, answers of the serving weights to prompts of this step; none on the others."""
        if torch.distributed.get_rank() != 0:
            return []
        args = self.args
        prompts = list({item.prompts[0]: item.labels[0] for item in own}.items())
        group = args.rollout.n_samples_per_prompt
        num_groups = max(1, mismatch.NUM_FORWARDS * self.micro_train_batch_size // group)
        sampling = SimpleNamespace(
            temperature=args.rollout.temperature,
            top_p=args.rollout.top_p,
            top_k=-1,
            max_tokens=args.rollout.max_new_tokens,
        )
        groups = [
            self.vllm_engines[0].generate_responses.remote(
                prompt=prompt,
                label=label,
                sampling_params=sampling,
                max_length=args.data.max_len,
                hf_tokenizer=self.tokenizer,
                num_samples=group,
            )
            for prompt, label in prompts[:num_groups]
        ]
        return scorable([response for answered in ray.get(groups) for response in answered])

    def _init_vllm_sync_group(self, backend: str) -> None:
        """Called on rank 0 only. A service needs no process group, but a pusher."""
        service = self.args.rollout_service
        if not service.urls:
            super()._init_vllm_sync_group(backend)
            return
        # From an engine actor, because the driver's environment may not reach this worker.
        api_key, admin_key = ray.get(self.vllm_engines[0].keys.remote())
        self.weight_pusher = WeightPusher(
            service.urls,
            api_key=api_key,
            admin_key=admin_key,
            transport=service.weight_transport,
            meeting=service.meeting,
            patience_s=service.request_timeout_s,
        )

    def broadcast_to_vllm(self) -> None:
        with without_sigma(self.actor):
            if not self.args.rollout_service.urls:
                super().broadcast_to_vllm()
                return
            model = self.actor.model.module
            pushed = push_weights(self.weight_pusher, model, self.args.ds.zero_stage)
        if pushed is not None:
            # Only now: a server that missed the push must not be asked for the next step's tokens.
            ray.get([e.require_version.remote(pushed.version) for e in self.vllm_engines])


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

    def save_checkpoint(self, tag: str, client_states: dict | None = None, **metric: Any) -> None:
        method = {METHOD_STATE: method_of(self.strategy.args.alp)}
        super().save_checkpoint(tag, {**(client_states or {}), **method}, **metric)


# A name that differs from the class's, because Ray then pickles the class by reference and workers
# import it from here.
RemoteAlpPolicyModelActor = ray.remote(num_gpus=1)(AlpPolicyModelActor)
