"""`--alp.sigma0 auto`: measure the mismatch on served tokens, then match its KL with noise."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from openrlhf.trainer.ppo_utils.experience import Experience, make_experience_batch

from openrlhf_alp.alp import calibrate_sigma0, k3_kl
from openrlhf_alp.learner.experience import SAMPLE_ID
from openrlhf_alp.learner.mismatch.measure import learner_log_probs

if TYPE_CHECKING:
    from openrlhf_alp.learner.actor import AlpActorPPOTrainer

logger = logging.getLogger(__name__)

NUM_SAMPLES = 16
"""Samples per rank; 16 answers give a k3 estimate within some 10 %, enough for a starting point."""


@torch.no_grad()
def calibrate(trainer: AlpActorPPOTrainer) -> dict[str, float]:
    """Set sigma0 so that the noise moves the log-probs as far as learner and rollout already
    differ.

    Theorem 1 asks for a sigma that covers the system bias zeta without drowning the policy. Its
    size is not observable, but its effect is: KL(mu || pi_theta) at equal weights, estimated by k3
    on the tokens the service sent. The KL of noise against the clean policy grows with sigma^2, so
    a few perturbed forwards find the sigma with that KL (times `--alp.calibration_factor`).

    Returns:
        `alp/mismatch_k3_kl` and `alp/noise_k3_kl`, nats per token.
    """
    perturbation, alp = trainer.perturbation, trainer.alp
    assert perturbation is not None, "calibration without a perturbation"
    batch = _first_samples(trainer)
    clean = learner_log_probs(trainer.actor, batch)
    mismatch = _mean_over_ranks(k3_kl(clean, batch.rollout_log_probs, batch.action_mask))
    sample_ids = torch.as_tensor([int(i) for i in batch.info[SAMPLE_ID]])

    def noisy_kl(sigma0: float) -> float:
        perturbation.sigma0 = sigma0
        with perturbation.enabled(
            update=trainer.update_number,
            sample_ids=sample_ids.to(batch.sequences.device),
            attention_mask=batch.attention_mask,
        ):
            noisy = learner_log_probs(trainer.actor, batch)
        return _mean_over_ranks(k3_kl(noisy, clean, batch.action_mask))

    # In bfloat16 the faintest noise flips roundings and these flips alone move the log-probs about
    # as far as the mismatch, which is made of them too. What counts is what sigma adds to that.
    rounding = noisy_kl(alp.sigma_min)
    found = calibrate_sigma0(
        noisy_kl,
        rounding + mismatch * alp.calibration_factor,
        sigma_min=alp.sigma_min,
        sigma_max=alp.sigma_max,
    )
    perturbation.sigma0 = found.sigma0
    noise = found.reached_kl - rounding
    logger.info(
        "sigma0 auto: learner-to-rollout mismatch k3 KL %.2e -> sigma0 %.2e (noise k3 KL %.2e on "
        "top of %.2e by rounding alone)",
        mismatch, found.sigma0, noise, rounding,
    )  # fmt: skip
    if found.at_bound:
        logger.warning(
            "sigma0 auto stopped at --alp.%s; move that bound to let the noise reach the mismatch",
            found.at_bound,
        )
    return {"alp/mismatch_k3_kl": mismatch, "alp/noise_k3_kl": noise}


def _first_samples(trainer: AlpActorPPOTrainer) -> Experience:
    items = trainer.replay_buffer.items[:NUM_SAMPLES]
    batch = make_experience_batch(items, trainer.args.ds.packing_samples)
    return batch.to_device(torch.cuda.current_device())


def _mean_over_ranks(value: float) -> float:
    total = torch.tensor(value, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(total)
    return total.item() / torch.distributed.get_world_size()
