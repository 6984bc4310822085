"""How far the learner's log-probs are from the served ones at equal weights, and what it means.

    d_t = log pi_learner(y_t | y_<t) - log mu(y_t | y_<t)      y drawn by the service from mu

Both sides hold the same weights, so d is what their numerics differ by, if all is well. It is the
mismatch that ALP's noise is measured against; when the sides disagree on weights, tokenizer,
temperature or log-prob mode, it is an order of magnitude larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from openrlhf.models import Actor
from openrlhf.trainer.ppo_utils.experience import Experience

from openrlhf_alp.alp import k3_kl

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


class Level(StrEnum):
    """What a mismatch means for a run."""

    OK = "ok"
    SUSPICIOUS = "suspicious"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """From where on a figure is suspicious or broken."""

    figure: str
    suspicious: float
    broken: float


# SmolLM2 in bfloat16 against vLLM on a CPU: k3 KL 1.3e-3 to 2.0e-3, quantiles within 0.15. Another
# model folder or another temperature gives a k3 KL of 0.1 and up on any language model.
LIMITS = (
    Limit(figure="k3_kl", suspicious=0.01, broken=0.1),
    Limit(figure="mean", suspicious=0.02, broken=0.2),
    Limit(figure="p01", suspicious=0.5, broken=2.0),
    Limit(figure="p99", suspicious=0.5, broken=2.0),
)

CAUSES = {
    Level.OK: (),
    Level.SUSPICIOUS: (
        "one side computes in lower precision: --quantization, an fp8 KV cache, float16",
        "a mixture of experts routes tokens differently on the two sides",
        "other attention kernels, long answers in bfloat16; compare --ds.attn_implementation",
        "a temperature or penalty that only one side applies",
    ),
    Level.BROKEN: (
        "the service holds other weights: another folder, or a push of another run",
        "log-probs of another distribution: temperature, top-p, penalties, or not processed",
        "another tokenizer or position encoding (rope scaling) on one side",
        "NaN or overflow in half precision: look at the last update's gradient norm",
    ),
}
"""What usually is behind it, likeliest first."""


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
        """All of them by name, in the order of METRICS."""
        return {
            "num_tokens": float(self.num_tokens),
            "mean": self.mean,
            "std": self.std,
            **self.quantiles,
            "max_abs": self.max_abs,
            "k3_kl": self.k3_kl,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the limits say."""

    level: Level
    findings: tuple[str, ...]
    """One sentence for each figure beyond a limit, the worst first."""

    @property
    def causes(self) -> tuple[str, ...]:
        return CAUSES[self.level]


def judge(mismatch: Mismatch) -> Verdict:
    """Compare every figure with its limits; the worst one decides."""
    figures = mismatch.figures()
    found: dict[Level, list[str]] = {Level.BROKEN: [], Level.SUSPICIOUS: []}
    for limit in LIMITS:
        value = figures[limit.figure]
        for level, bound in ((Level.BROKEN, limit.broken), (Level.SUSPICIOUS, limit.suspicious)):
            if not abs(value) < bound:  # so that NaN is broken
                found[level].append(f"|{limit.figure}| is {abs(value):.2g}, the limit {bound:g}")
                break
    level = next((level for level, findings in found.items() if findings), Level.OK)
    return Verdict(level=level, findings=(*found[Level.BROKEN], *found[Level.SUSPICIOUS]))


def metrics_of(mismatch: Mismatch, verdict: Verdict) -> dict[str, float]:
    """METRICS, as a training step logs them."""
    figures = {f"preflight/{name}": value for name, value in mismatch.figures().items()}
    return {**figures, "preflight/verdict": float(list(Level).index(verdict.level))}


@torch.no_grad()
def learner_log_probs(actor: Actor, batch: Experience) -> torch.Tensor:
    """(B, T-1) float32 log-probs of the learner, in evaluation mode as for an "old" pass."""
    actor.eval()
    log_probs = actor(batch.sequences, batch.action_mask, batch.attention_mask)
    actor.train()
    return log_probs


def log_ratio(actor: Actor, batch: Experience) -> np.ndarray:
    """(num_actions,) float32 log-ratios of the action tokens of `batch`, sample by sample."""
    difference = learner_log_probs(actor, batch).float() - batch.rollout_log_probs.float()
    return difference[batch.action_mask.bool()].cpu().numpy()
