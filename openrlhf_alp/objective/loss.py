"""The policy loss of every method: ratio, clip, correction, trust region, aggregation.

Letters: B samples, A positions of the action axis.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from openrlhf_alp.objective.config import ObjectiveConfig
from openrlhf_alp.objective.factors import correction_factor, inside_trust_region
from openrlhf_alp.objective.ratio import (
    MAX_LOG_RATIO,
    guarded_exp,
    per_token_log_ratio,
    token_log_ratio,
)

Aggregate = Callable[[Tensor, Tensor], Tensor]
"""(per-token loss (B, A), action mask (B, A)) -> scalar."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """Loss of one micro-batch and its metrics. Fractions are of action tokens."""

    loss: Tensor
    """() float, with gradient."""
    log_ratio: Tensor
    """(B, A) float, detached l_t - log mu_t of each token, learner over rollout engine whatever the
    level and the denominator, before the guard; 0.0 off the action mask. Its sum over A is the
    sequence's log-ratio."""
    cuts: Mapping[str, Tensor]
    """(B, A) bool of each field below that ends in `_fraction`, by its name; false off the mask."""
    clip_fraction: float
    """Tokens cut by the clip window (either side): without gradient, or with cispo with a bounded
    weight."""
    clip_low_fraction: float
    """Tokens cut at 1 - clip_low: negative advantage, ratio already low; cispo: any advantage."""
    clip_high_fraction: float
    """Tokens cut at 1 + clip_high: positive advantage, ratio already high; cispo: any advantage."""
    dual_clip_fraction: float
    """Tokens cut by the dual clip: negative advantage, ratio above c."""
    mask_fraction: float
    """Tokens without gradient because of the correction's mask or the trust region."""
    guard_fraction: float
    """Tokens whose |log r| exceeded MAX_LOG_RATIO."""
    approx_kl: float
    """Mean of log mu_t - l_t: the k1 estimate of KL(rollout || learner)."""


class NonFiniteLogProbError(FloatingPointError):
    """A log-probability or advantage of an action token is nan or infinite."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B, A) where mask (B, A); 0 when the mask is empty."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over sequences of their means of values (B, A) where mask (B, A); without the empty."""
    counts = mask.sum(dim=-1)
    means = (values * mask).sum(dim=-1) / counts.clamp(min=1)
    return means.sum() / (counts > 0).sum().clamp(min=1)


AGGREGATIONS: dict[str, Aggregate] = {
    "token-mean": masked_mean,
    "seq-mean-token-mean": sequence_mean,
}
"""`ObjectiveConfig.aggregation` over one micro-batch."""


def policy_loss(
    *,
    log_probs: Tensor,
    rollout_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    config: ObjectiveConfig,
    old_log_probs: Tensor | None = None,
    aggregate: Aggregate | None = None,
) -> LossOutput:
    """The loss of any method of `methods.METHODS`; eq. 1 to 3 of arXiv 2603.19470 among them.

        r_t  = pi(y_t) / d(y_t)                    (per token, or of the whole sequence)
        L_t  = max(-A_t r_t, -A_t clip(r_t, 1 - low, 1 + high))                          ppo
        L_t  = min(L_t, -A_t c)                    where A_t < 0, the dual clip
        L_t  = -A_t sg(clip(r_t, 1 - low, 1 + high)) log pi(y_t)                         cispo
        L_t  = -A_t r_t                                                                  none
        loss = aggregate(L_t * correction_t * inside_t, action_mask)

    pi is the learner, perturbed or clean; d is the rollout engine or the old policy. Masked tokens
    still count in the aggregation, as in OpenRLHF. KL and entropy terms are the caller's.

    Args:
        log_probs: (B, A) float, of the learner, with gradient.
        rollout_log_probs: (B, A) float, as the rollout engine reported them.
        advantages: (B, A) float.
        action_mask: (B, A) bool or 0/1; other positions contribute nothing.
        config: what the loss is made of.
        old_log_probs: (B, A) float, of the clean learner at the start of the step, if needed.
        aggregate: brings the global normaliser; the default averages this micro-batch only.

    Raises:
        NonFiniteLogProbError: nan or infinity on an action token.
        ValueError: `old_log_probs` is needed, and None.
    """
    mask = action_mask.bool()
    reference = _denominator(config, rollout_log_probs, old_log_probs)
    given = {"log_probs": log_probs, "rollout_log_probs": rollout_log_probs}
    if config.needs_old_policy:
        given["old_log_probs"] = reference
    _require_finite({**given, "advantages": advantages}, mask)
    # A nan off the mask would survive the multiplication by 0 in the mean.
    advantages = torch.where(mask, advantages, 0.0)

    log_ratio = per_token_log_ratio(log_probs, reference, mask, config.level)
    ratio = guarded_exp(log_ratio)
    per_token = _surrogate(ratio, torch.where(mask, log_probs, 0.0), advantages, config)
    factor, kept = _factor(log_probs, rollout_log_probs, reference, advantages, mask, config)
    per_token = per_token if factor is None else per_token * factor

    token = token_log_ratio(log_probs, rollout_log_probs, mask).detach()
    cuts = _cuts(log_ratio.detach(), ratio.detach(), advantages, config) | {"mask_fraction": ~kept}
    cuts = {name: cut & mask for name, cut in cuts.items()}
    return LossOutput(
        loss=(aggregate or AGGREGATIONS[config.aggregation])(per_token, mask),
        log_ratio=token,
        cuts=cuts,
        **_means({**cuts, "approx_kl": -token}, mask),
    )


def _denominator(config: ObjectiveConfig, rollout: Tensor, old: Tensor | None) -> Tensor:
    if not config.needs_old_policy:
        return rollout
    if old is None:
        raise ValueError(
            "the objective divides by the old policy, and old_log_probs is None. Compute the clean "
            "learner's log-probs before the step's first update"
        )
    return old.detach()


def _surrogate(
    ratio: Tensor, log_probs: Tensor, advantages: Tensor, config: ObjectiveConfig
) -> Tensor:
    """L_t of `policy_loss` before its factors, (B, A)."""
    if config.clip == "none":
        return -advantages * ratio
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    if config.clip == "cispo":
        return -advantages * clipped.detach() * log_probs
    per_token = torch.maximum(-advantages * ratio, -advantages * clipped)
    if config.dual_clip is None:
        return per_token
    ceiling = torch.where(advantages < 0, -advantages * config.dual_clip, math.inf)
    return torch.minimum(per_token, ceiling)


def _factor(
    log_probs: Tensor,
    rollout_log_probs: Tensor,
    reference: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: ObjectiveConfig,
) -> tuple[Tensor | None, Tensor]:
    """Product of correction and trust region (None for none), and the tokens both keep, (B, A)."""
    factor, kept = None, torch.ones_like(mask)
    if config.correction is not None:
        corrected = reference if config.needs_old_policy else log_probs
        log_ratio = token_log_ratio(corrected, rollout_log_probs, mask)
        factor, kept = correction_factor(log_ratio, mask, config.correction)
    if config.trust_region is not None:
        # Off the mask anything may stand; 0 keeps it finite.
        now, before = (torch.where(mask, values, 0.0) for values in (log_probs, reference))
        inside = inside_trust_region(now, before, advantages, config.trust_region)
        factor = inside.to(log_probs.dtype) if factor is None else factor * inside
        kept = kept & inside
    return factor, kept


def _cuts(
    log_ratio: Tensor, ratio: Tensor, advantages: Tensor, config: ObjectiveConfig
) -> dict[str, Tensor]:
    """Which tokens a clip or the guard cut, by the field of LossOutput that counts them."""
    below, above = ratio < 1 - config.clip_low, ratio > 1 + config.clip_high
    if config.clip == "ppo":
        # A clip cuts the gradient only on the side to which the advantage pushes the ratio.
        below, above = below & (advantages < 0), above & (advantages > 0)
    elif config.clip == "none":
        below, above = torch.zeros_like(below), torch.zeros_like(above)
    dual_clip = config.dual_clip if config.clip == "ppo" else None
    return {
        "clip_fraction": below | above,
        "clip_low_fraction": below,
        "clip_high_fraction": above,
        "dual_clip_fraction": (advantages < 0) & (ratio > (dual_clip or math.inf)),
        "guard_fraction": log_ratio.abs() > MAX_LOG_RATIO,
    }


def _means(values: Mapping[str, Tensor], mask: Tensor) -> dict[str, float]:
    # In float64: the mean of many small differences would lose digits in bfloat16. And one transfer
    # from the device for all of them instead of one each.
    means = torch.stack([masked_mean(value.double(), mask) for value in values.values()])
    return dict(zip(values, means.tolist(), strict=True))


def _require_finite(values: Mapping[str, Tensor], mask: Tensor) -> None:
    bad = {name: mask & ~value.isfinite() for name, value in values.items()}
    # One transfer from the device in place of one for each name.
    if not torch.stack([where.any() for where in bad.values()]).any():
        return
    name, where = next((name, where) for name, where in bad.items() if where.any())
    places = [tuple(place) for place in where.nonzero()[:5].tolist()]
    raise NonFiniteLogProbError(
        f"{int(where.sum())} of {int(mask.sum())} action tokens have a nan or infinite value in "
        f"{name}; (sample, position) of the first: {places}. The update would destroy the "
        "weights. Look for an overflow in the learner (lower its learning rate or "
        "--alp.sigma_max) or, for rollout_log_probs, in the rollout service"
    )
