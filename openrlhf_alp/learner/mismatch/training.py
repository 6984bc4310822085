"""The mismatch in a training run: sigma0 from it before step 1, and a check at every N-th step.

Both run before a step's update, when learner and service hold the same weights as they do in
`openrlhf-alp preflight`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import numpy as np
import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from torch import Tensor

from openrlhf_alp.alp import LayerwisePerturbation, calibrate_sigma0
from openrlhf_alp.learner.mismatch.judge import Level, judge
from openrlhf_alp.learner.mismatch.measure import Mismatch, metrics_of
from openrlhf_alp.objective.ratio import k3_kl

logger = logging.getLogger(__name__)

NUM_SAMPLES = 16
"""Samples per rank for sigma0; 16 answers give a k3 estimate within some 10 %, enough to start."""

NUM_FORWARDS = 4
"""Clean forwards of one micro-batch each in a check. A few hundred tokens place the quantiles; the
cost is a fraction of a step."""

Value = TypeVar("Value")


@torch.no_grad()
def calibrate(
    perturbation: LayerwisePerturbation,
    batch: Experience,
    *,
    log_probs: Callable[[], Tensor],
    perturbed: Callable[[], AbstractContextManager[None]],
    factor: float,
) -> dict[str, float]:
    """Set sigma0 so that the noise moves the log-probs as far as learner and rollout differ.

    Theorem 1 asks for a sigma that covers the system bias zeta without drowning the policy. Its
    size is not observable, but its effect is: KL(mu || pi_theta) at equal weights, estimated by k3
    on the served tokens. The KL of noise against the clean policy grows with sigma^2, so a few
    perturbed forwards find the sigma with that KL. Collective: every rank calls it.

    Args:
        perturbation: its sigma0 is set.
        batch: the rank's samples, with `rollout_log_probs`.
        log_probs: forward of `batch`, (B, T-1), clean or within `perturbed()` noisy.
        perturbed: turns the noise on; the same noise at every call.
        factor: KL of the noise over KL of the mismatch.

    Returns:
        `alp/mismatch_k3_kl` and `alp/noise_k3_kl`, nats per token.
    """
    clean = log_probs()
    mismatch = _mean_over_ranks(k3_kl(clean, batch.rollout_log_probs, batch.action_mask))

    def noisy_kl(sigma0: float) -> float:
        perturbation.sigma0 = sigma0
        with perturbed():
            noisy = log_probs()
        # The mean over ranks, so that all ranks search along the same values and end together.
        return _mean_over_ranks(k3_kl(noisy, clean, batch.action_mask))

    # In bfloat16 even tiny noise changes roundings, and these alone move the log-probs about as far
    # as the mismatch, which consists of them too. What counts is what sigma adds to that floor.
    rounding = noisy_kl(perturbation.sigma_min)
    found = calibrate_sigma0(
        noisy_kl,
        rounding + mismatch * factor,
        sigma_min=perturbation.sigma_min,
        sigma_max=perturbation.sigma_max,
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


def log_ratios(
    samples: list[Experience],
    spare: list[Experience],
    *,
    micro_batch_size: int,
    measure: Callable[[list[Experience]], np.ndarray],
) -> np.ndarray:
    """(N,) float32 log-ratios of this rank's first samples, NUM_FORWARDS micro-batches at most.

    Args:
        samples: what is measured; a rank may have none.
        spare: samples for the forwards of a rank that has too few.
        measure: micro-batch -> (num_actions,) log-ratios.
    """
    parts: list[np.ndarray] = [np.zeros(0, dtype=np.float32)]
    for start in range(0, NUM_FORWARDS * micro_batch_size, micro_batch_size):
        rows = samples[start : start + micro_batch_size]
        # A forward is collective under ZeRO-3: a rank without samples left runs it all the same,
        # or the others would wait forever, and does not count the result.
        ratios = measure(rows or spare[:micro_batch_size])
        parts += [ratios] if rows else []
    return np.concatenate(parts)


def recheck(own_log_ratios: np.ndarray, *, stop: bool) -> dict[str, float]:
    """Judge the log-ratios of all ranks. Collective.

    Returns:
        `preflight/*`, the same numbers on every rank; empty when there was no sample.

    Raises:
        RuntimeError: the mismatch is broken and `stop` is set.
    """
    values = np.concatenate(of_all_ranks(own_log_ratios))
    if not values.size:
        logger.warning("preflight: nothing was measured, every group asked for was dropped")
        return {}
    mismatch = Mismatch.of(values)
    verdict = judge(mismatch.figures())
    summary = (
        f"preflight: {verdict.level}, k3 KL {mismatch.k3_kl:.2e} over {mismatch.num_tokens} tokens"
    )
    if verdict.level is Level.OK:
        logger.info(summary)
    else:
        summary = "; ".join((summary, *verdict.findings, "usual causes", *verdict.causes))
        logger.warning(summary)
    if verdict.level is Level.BROKEN and stop:
        raise RuntimeError(f"{summary} (--rollout.preflight_stop)")
    return metrics_of(mismatch, verdict)


def of_all_ranks(own: Value) -> list[Value]:
    """Every rank's value, in the order of ranks, on every rank."""
    ranks: list[Value | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, own)
    return ranks  # type: ignore[return-value]


def _mean_over_ranks(value: float) -> float:
    values = of_all_ranks(value)
    return sum(values) / len(values)
