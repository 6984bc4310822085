"""Before the first update: the unit of each layer's sigma, sigma0, and what its noise does.

All of it is measured on served tokens while learner and service hold the same weights. Letters:
B samples, T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from torch import Tensor

from openrlhf_alp.alp import LayerwisePerturbation, calibrate_sigma0
from openrlhf_alp.learner.mismatch.forwards import MicroBatch, of_all_ranks
from openrlhf_alp.objective.config import ObjectiveConfig, noise_budget
from openrlhf_alp.objective.ratio import k3_kl, per_token_log_ratio

logger = logging.getLogger(__name__)

NUM_SAMPLES = 16
"""Samples per rank; 16 answers give a k3 estimate within some 10 %, enough to start."""

MAX_ADDED_SHARE = 0.1
"""Share of action tokens that the noise may push out of the clip window without a warning."""

REFUSED_ADDED_SHARE = 0.5
"""Share above which the run ends: most of the batch would have no gradient, or a clipped one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Totals:
    """Sums over action tokens of this rank; they add up over ranks."""

    k3_sum: float = 0.0
    outside: float = 0.0
    """Tokens whose ratio is outside the clip window."""
    tokens: float = 0.0
    sequences: float = 0.0

    def __add__(self, other: _Totals) -> _Totals:
        return _Totals(
            k3_sum=self.k3_sum + other.k3_sum,
            outside=self.outside + other.outside,
            tokens=self.tokens + other.tokens,
            sequences=self.sequences + other.sequences,
        )

    def over_ranks(self) -> _Totals:
        return sum(of_all_ranks(self), start=_Totals())

    @property
    def kl(self) -> float:
        return self.k3_sum / self.tokens

    @property
    def outside_share(self) -> float:
        return self.outside / self.tokens


class SigmaStart:
    """Measures on this rank's micro-batches. Collective: every rank makes the same calls.

    Args:
        perturbation: its scales and sigma0 are set.
        forwards: what to measure on, the same number on each rank.
        batch: makes one batch of a micro-batch's samples, with `rollout_log_probs`.
        log_probs: forward of a batch, (B, T-1), clean or within `perturbed` noisy.
        perturbed: turns the noise on for a batch; the same noise at every call.
        objective: level and clip window of the loss.
    """

    def __init__(
        self,
        perturbation: LayerwisePerturbation,
        forwards: Sequence[MicroBatch],
        *,
        batch: Callable[[list[Experience]], Experience],
        log_probs: Callable[[Experience], Tensor],
        perturbed: Callable[[Experience], AbstractContextManager[None]],
        objective: ObjectiveConfig,
    ) -> None:
        self.perturbation = perturbation
        self.forwards = forwards
        self.batch = batch
        self.log_probs = log_probs
        self.perturbed = perturbed
        self.objective = objective
        self.clean: list[Tensor] = []
        self.layer_scales: dict[int, float] = {}

    @torch.no_grad()
    def measure(self, *, auto: bool, factor: float) -> dict[str, float] | None:
        """Set the scales and, with `auto`, sigma0 so that noise and mismatch have the same KL.

        Args:
            auto: search sigma0; otherwise the configured one is checked.
            factor: KL of the noise over KL of the mismatch.

        Returns:
            The metrics of the start, the same on every rank; None when no rank has an action token,
            and then nothing is set.

        Raises:
            RuntimeError: the noise pushes most tokens out of the clip window.
            ValueError: a KL or a scale that is not a positive number.
        """
        mismatch = self._run_clean()
        if mismatch is None:
            return None
        if self.perturbation.sigma_scale == "relative":
            self.perturbation.set_scales(self.layer_scales)
        target = self._target(mismatch, factor)
        noisy = cache(self._run_noisy)
        floor = self._calibrate(target, noisy) if auto else 0.0
        sigma0 = self.perturbation.sigma0
        against_clean, against_rollout = noisy(sigma0)
        metrics = {
            "alp/mismatch_k3_kl": mismatch.kl,
            "alp/noise_k3_kl": against_clean.kl - floor,
            "alp/rounding_k3_kl": floor,
            "alp/clean_outside_share": mismatch.outside_share,
            "alp/noisy_outside_share": against_rollout.outside_share,
        }
        if auto and not 0.5 < metrics["alp/noise_k3_kl"] / target < 2:
            logger.warning(
                "sigma0 auto aimed at a noise k3 KL of %.2e, but sigma0 %.2e has %.2e; set "
                "--alp.sigma0 to a number if the ratios of the first steps do not look right",
                target, sigma0, metrics["alp/noise_k3_kl"],
            )  # fmt: skip
        self._judge(metrics)
        return metrics

    def _run_clean(self) -> _Totals | None:
        """Clean log-probs against the rollouts', and the layers' scales. Keeps both."""
        totals, scales = _Totals(), []
        for samples, counts in self.forwards:
            batch = self.batch(samples)
            with self.perturbation.observed(batch.attention_mask) as observer:
                self.clean.append(self.log_probs(batch))
            if counts:
                totals += self._totals(self.clean[-1], batch.rollout_log_probs, batch)
                weight = float(batch.attention_mask.sum())
                scales.append((weight, observer.figures()))
        measured = [entry for rank in of_all_ranks(scales) for entry in rank]
        totals = totals.over_ranks()
        if not totals.tokens:
            return None
        # A weighted mean of medians: exact ones would need all hidden states in one place.
        total_weight = sum(weight for weight, _ in measured)
        for layer in self.perturbation.layers:
            weighted = sum(weight * figures[layer].scale for weight, figures in measured)
            self.layer_scales[layer] = weighted / total_weight
        return totals

    def _target(self, mismatch: _Totals, factor: float) -> float:
        wanted = mismatch.kl * factor
        length = mismatch.tokens / mismatch.sequences
        budget = noise_budget(self.objective, length)
        if wanted > budget:
            logger.info(
                "sigma0 auto: the mismatch has a k3 KL of %.2e nats per token, of which noise may "
                "take %.2e: more would not fit into the %s window over %.0f tokens",
                wanted, budget, self.objective.level, length,
            )  # fmt: skip
        return min(wanted, budget)

    def _calibrate(self, target: float, noisy: Callable[[float], tuple[_Totals, _Totals]]) -> float:
        """Set sigma0; the KL of rounding alone."""
        # Absolute noise is felt most where the hidden states are smallest.
        absolute = self.perturbation.sigma_scale == "absolute"
        found = calibrate_sigma0(
            lambda sigma: noisy(sigma)[0].kl,
            target,
            sigma_min=self.perturbation.sigma_min,
            sigma_max=self.perturbation.sigma_max,
            unit=min(self.layer_scales.values()) if absolute else 1.0,
        )
        self.perturbation.sigma0 = found.sigma0
        if found.at_bound:
            logger.warning(
                "sigma0 auto needs %.2e and stopped at --alp.%s %.2e; move that bound to let the "
                "noise reach its target",
                found.needed, found.at_bound, found.sigma0,
            )  # fmt: skip
        return found.floor_kl

    def _run_noisy(self, sigma0: float) -> tuple[_Totals, _Totals]:
        """Noisy log-probs against the clean ones, and against the rollouts'. Over all ranks."""
        against_clean, against_rollout = _Totals(), _Totals()
        for (samples, counts), clean in zip(self.forwards, self.clean, strict=True):
            batch = self.batch(samples)
            with self.perturbation.probed(sigma0), self.perturbed(batch):
                noisy = self.log_probs(batch)
            if counts:
                against_clean += self._totals(noisy, clean, batch)
                against_rollout += self._totals(noisy, batch.rollout_log_probs, batch)
        return against_clean.over_ranks(), against_rollout.over_ranks()

    def _totals(self, log_probs: Tensor, reference: Tensor, batch: Experience) -> _Totals:
        mask = batch.action_mask.bool()
        tokens = int(mask.sum())
        ratio = per_token_log_ratio(log_probs, reference, mask, self.objective.level)[mask].exp()
        outside = (ratio < 1 - self.objective.clip_low) | (ratio > 1 + self.objective.clip_high)
        return _Totals(
            k3_sum=k3_kl(log_probs, reference, mask) * tokens,
            outside=float(outside.sum()),
            tokens=float(tokens),
            sequences=float(mask.any(dim=-1).sum()),
        )

    def _judge(self, metrics: dict[str, float]) -> None:
        clean, noisy = metrics["alp/clean_outside_share"], metrics["alp/noisy_outside_share"]
        summary = (
            f"sigma0 {self.perturbation.sigma0:.2e} ({self.perturbation.sigma_scale}): k3 KL of "
            f"the learner-to-rollout mismatch {metrics['alp/mismatch_k3_kl']:.2e}, of the noise "
            f"{metrics['alp/noise_k3_kl']:.2e} on top of {metrics['alp/rounding_k3_kl']:.2e} by "
            f"rounding; action tokens outside the clip window {clean:.1%} without noise, "
            f"{noisy:.1%} with it"
        )
        fix = "Set --alp.sigma0 auto or a smaller number, or widen --alp.clip_low_high"
        if noisy - clean > REFUSED_ADDED_SHARE:
            raise RuntimeError(f"{summary}. Most of the batch would not be learned from. {fix}.")
        if noisy - clean > MAX_ADDED_SHARE:
            logger.warning("%s. %s.", summary, fix)
        else:
            logger.info(summary)
