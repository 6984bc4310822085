"""What one training step reports about ratios, cuts, layers and gradients, and warns of."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from openrlhf.trainer.ppo_utils.experience import Experience
from torch import Tensor

from openrlhf_alp.alp import LayerwisePerturbation, repeat_rows
from openrlhf_alp.alp.observe import LayerFigures, layer_metrics, signal_to_noise
from openrlhf_alp.learner.telemetry.over_ranks import ratio_metrics, sum_on_rank_0
from openrlhf_alp.objective.advice import advice
from openrlhf_alp.objective.loss import LossOutput
from openrlhf_alp.objective.metric_names import CUTS, ENVELOPE_PREFIX, SIGNS
from openrlhf_alp.objective.telemetry import RatioTelemetry, cut_counts

logger = logging.getLogger(__name__)


OBSERVED_ROWS = 256
"""Tokens of a layer that a detailed step looks at: a quarter of what sets the unit of sigma."""


class Adviser:
    """Logs each warning of objective/advice.py once in a run, on rank 0.

    Args:
        perturbation: of the policy, if any.
    """

    def __init__(self, perturbation: LayerwisePerturbation | None) -> None:
        self._perturbed = perturbation is not None
        self._num_layers = 0 if perturbation is None else len(perturbation.layers)
        self._given: set[str] = set()

    def look(self, metrics: Mapping[str, float]) -> None:
        """Warn of what is new in the metrics of a step."""
        if torch.distributed.get_rank() != 0:
            return
        for one in advice(metrics, perturbed=self._perturbed, num_layers=self._num_layers):
            if one.name not in self._given:
                self._given.add(one.name)
                logger.warning("%s. This is said once.", one.text)


class StepTelemetry:
    """Collects over the micro-batches of a step on one rank.

    Args:
        perturbation: of the policy, if any.
        detailed: also look at the layers, and log them and the envelope.
    """

    def __init__(self, perturbation: LayerwisePerturbation | None, *, detailed: bool) -> None:
        self.perturbation = perturbation
        self.detailed = detailed
        self.ratios = RatioTelemetry()
        self.cuts = torch.zeros(len(SIGNS), 1 + len(CUTS), dtype=torch.float64)
        self.layers: dict[int, LayerFigures] = {}

    @contextmanager
    def observed(self, attention_mask: Tensor) -> Iterator[None]:
        """In a detailed step, look at the layers of its first micro-batch, forward and backward."""
        if self.perturbation is None or not self.detailed or self.layers:
            yield
            return
        # Without the unit of sigma there is no noise yet, and so a single pass.
        draws = 1 if self.perturbation.scales is None else self.perturbation.draws
        mask = repeat_rows(attention_mask, draws)
        with self.perturbation.observed(mask, max_rows=OBSERVED_ROWS) as observer:
            yield
        self.layers = observer.figures()

    def add(self, output: LossOutput, experience: Experience) -> None:
        """Add a micro-batch, without waiting for its device."""
        mask = experience.action_mask
        self.ratios.add(output.log_ratio, mask, experience.rollout_log_probs)
        cuts = {name: output.cuts[f"{name}_fraction"] for name in CUTS}
        self.cuts = self.cuts.to(mask.device) + cut_counts(cuts, experience.advantages, mask)

    def end_update(self) -> None:
        """The last micro-batch ended an optimizer step."""
        if self.perturbation is not None:
            self.perturbation.gradients.end_update()

    def metrics(self, *, grad_norm: float, loss_scale: float) -> dict[str, float]:
        """Collective. All on rank 0; the other ranks have no ratios and no gradients.

        Args:
            grad_norm: of weights and sigma, at the last optimizer step.
            loss_scale: by which float16 training multiplied the loss; 1 otherwise.
        """
        found = ratio_metrics(self.ratios, self.cuts)
        if not self.detailed:
            found = {k: v for k, v in found.items() if not k.startswith(ENVELOPE_PREFIX)}
        if self.perturbation is None:
            return {**found, "alp/weight_grad_norm": grad_norm}
        return {
            **found,
            **_sigma_metrics(self.perturbation, self.layers),
            **_gradient_metrics(self.perturbation, grad_norm=grad_norm, loss_scale=loss_scale),
            **(self.perturbation.start or {}),
        }


def _sigma_metrics(
    perturbation: LayerwisePerturbation, layers: dict[int, LayerFigures]
) -> dict[str, float]:
    """Sigma, and the layers as this rank saw them in its first micro-batch."""
    summary = perturbation.summary()
    sigmas = perturbation.sigmas() if perturbation.scales else {}
    return {
        "alp/sigma0": perturbation.sigma0,
        "alp/sigma_mean": summary.mean,
        "alp/sigma_min": summary.minimum,
        "alp/sigma_max": summary.maximum,
        "alp/sigma_bound_share": summary.share_at_bound,
        **layer_metrics(layers if sigmas else {}, sigmas),
    }


def _gradient_metrics(
    perturbation: LayerwisePerturbation, *, grad_norm: float, loss_scale: float
) -> dict[str, float]:
    """Collective; empty but on rank 0."""
    gradients = perturbation.gradients
    taken, last = gradients.take(), gradients.take_last_update()
    # As long on every rank. Without a learning rate there are none, and some backends refuse those.
    total = sum_on_rank_0(torch.cat([taken, last])) if taken.numel() else taken
    if total is None:
        return {}
    taken, last = total.cpu().split([taken.numel(), last.numel()])
    # DeepSpeed averages over ranks.
    sigma = last.norm().item() / (torch.distributed.get_world_size() * loss_scale)
    return {
        "alp/sigma_grad_snr": signal_to_noise(taken),
        "alp/sigma_grad_norm": sigma,
        "alp/weight_grad_norm": math.sqrt(max(0.0, grad_norm**2 - sigma**2)),
    }
