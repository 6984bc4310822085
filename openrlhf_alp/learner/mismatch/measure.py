"""How far the learner's log-probs are from the served ones at equal weights.

    d_t = log pi_learner(y_t | y_<t) - log mu(y_t | y_<t)      y sampled by the service from mu

This is the mismatch that ALP's noise is measured against; `judge.py` says what is normal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from openrlhf.models import Actor
from openrlhf.trainer.ppo_utils.experience import Experience, split_experience_batch
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

from openrlhf_alp.learner.mismatch.judge import LEVELS, Verdict
from openrlhf_alp.learner.policy_forward import logits_of_actions
from openrlhf_alp.objective.ratio import k3_kl

PERCENTS = (1, 5, 25, 50, 75, 95, 99)

METRICS = {
    "preflight/num_tokens": "action tokens measured",
    "preflight/mean": "mean log-ratio, clean learner over rollout, at equal weights",
    "preflight/std": "its standard deviation",
    **{f"preflight/p{p:02d}": f"its {p} % quantile" for p in PERCENTS},
    "preflight/max_abs": "largest absolute log-ratio of a token",
    "preflight/k3_kl": "k3 estimate of KL(rollout || learner), nats per token",
    "preflight/verdict": "0 ok, 1 suspicious, 2 broken",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """Figures of the log-ratio over all measured tokens; NaN when one of them is not finite."""

    num_tokens: int
    mean: float
    std: float
    quantiles: dict[str, float]
    """`p01` .. `p99`."""
    max_abs: float
    k3_kl: float
    """Nats per token."""

    @classmethod
    def of(cls, log_ratio: np.ndarray) -> Mismatch:
        """Figures of (N,) log-ratios.

        Raises:
            ValueError: no tokens.
        """
        if log_ratio.size == 0:
            raise ValueError("no token was sampled, so there is no log-ratio to look at")
        # float64, because the three terms of k3 cancel to half the square of a small difference.
        wide = torch.from_numpy(log_ratio.astype(np.float64))
        return cls(
            num_tokens=log_ratio.size,
            mean=float(log_ratio.mean()),
            std=float(log_ratio.std()),
            quantiles={f"p{p:02d}": float(np.quantile(log_ratio, p / 100)) for p in PERCENTS},
            max_abs=float(np.abs(log_ratio).max()),
            k3_kl=k3_kl(wide, torch.zeros_like(wide), torch.ones_like(wide)),
        )

    def figures(self) -> dict[str, float]:
        """All figures by name, in the order of METRICS."""
        return {
            "num_tokens": float(self.num_tokens),
            "mean": self.mean,
            "std": self.std,
            **self.quantiles,
            "max_abs": self.max_abs,
            "k3_kl": self.k3_kl,
        }


def metrics_of(mismatch: Mismatch, verdict: Verdict) -> dict[str, float]:
    """METRICS, as a training step logs them."""
    figures = {f"preflight/{name}": value for name, value in mismatch.figures().items()}
    return {**figures, "preflight/verdict": float(LEVELS.index(verdict.level))}


@torch.no_grad()
def learner_log_probs(actor: Actor, batch: Experience) -> torch.Tensor:
    """(B, T-1) float32 log-probs of the learner, in evaluation mode as for an "old" pass."""
    actor.eval()
    with logits_of_actions(actor, batch):
        log_probs = actor(batch.sequences, batch.action_mask, batch.attention_mask)
    actor.train()
    return log_probs


@torch.no_grad()
def learner_log_probs_and_entropy(
    actor: Actor, batch: Experience
) -> tuple[torch.Tensor, torch.Tensor]:
    """`learner_log_probs`, and the entropy in nats of the distributions they come from."""
    actor.eval()
    with logits_of_actions(actor, batch):
        log_probs, output = actor(
            batch.sequences,
            batch.action_mask,
            batch.attention_mask,
            return_output=True,
            return_entropy=True,
        )
    actor.train()
    return log_probs, output.entropy[:, -batch.action_mask.shape[1] :]


def scorable(responses: Sequence[dict[str, Any]]) -> list[Experience]:
    """Single samples, as in a replay buffer, of what an engine returned.

    Upstream's own conversion makes them, so that tokens are shifted to predictions as in training.
    """
    # The conversion is a method that uses nothing of its generator, so an empty one will do.
    generator = SamplesGenerator(SimpleNamespace(args=None), None, None, None, [])
    convert = generator._process_response_into_experience
    samples = [convert(r, max_len=len(r["observation_tokens"])) for r in responses]
    return [item for sample in samples for item in split_experience_batch(sample)]


def log_ratio(actor: Actor, batch: Experience) -> np.ndarray:
    """(num_actions,) float32 log-ratios of the action tokens of `batch`, sample by sample."""
    difference = learner_log_probs(actor, batch).float() - batch.rollout_log_probs.float()
    return difference[batch.action_mask.bool()].cpu().numpy()
