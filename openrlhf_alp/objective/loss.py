"""The policy loss with one ratio, perturbed learner over rollout engine.

Letters: B samples, A positions of the action axis.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openrlhf_alp.objective.methods import UnifiedRatioConfig
from openrlhf_alp.objective.ratio import per_token_log_ratio, token_log_ratio

MAX_LOG_RATIO = 20.0
"""|log r| above this is cut before exp: e**20 = 5e8 is far outside every clip window, and the
gradient there is meant to vanish, while exp of a sequence's summed log-ratio could overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """Loss of one micro-batch and its metrics. Fractions are of action tokens."""

    loss: Tensor
    """() float, with gradient."""
    log_ratio: Tensor
    """(B, A) float, detached l_t - rho_t of each token whatever the level, before the guard; 0.0
    off the action mask. Its sum over A is the sequence's log-ratio."""
    clip_fraction: float
    """Tokens whose gradient the clip window cut (either side)."""
    clip_low_fraction: float
    """Tokens cut at 1 - clip_low: negative advantage, ratio already low."""
    clip_high_fraction: float
    """Tokens cut at 1 + clip_high: positive advantage, ratio already high."""
    dual_clip_fraction: float
    """Tokens cut by the dual clip: negative advantage, ratio above c."""
    guard_fraction: float
    """Tokens whose |log r| exceeded MAX_LOG_RATIO."""
    approx_kl: float
    """Mean of rho_t - l_t: the k1 estimate of KL(rollout || perturbed learner)."""


class NonFiniteLogProbError(FloatingPointError):
    """A log-probability or advantage of an action token is nan or infinite."""


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of values (B, A) where mask (B, A); 0 when the mask is empty."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def unified_ratio_loss(
    *,
    log_probs: Tensor,
    rollout_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    config: UnifiedRatioConfig,
    aggregate: Callable[[Tensor, Tensor], Tensor] = masked_mean,
) -> LossOutput:
    """Clipped policy loss on the single ratio of ALP (arXiv 2603.19470, eq. 2 and 3).

        r_t  = pi_theta,sigma(y_t) / mu(y_t)              (per token, or of the whole sequence)
        L_t  = max(-A_t r_t, -A_t clip(r_t, 1 - low, 1 + high))
        L_t  = min(L_t, -A_t c)                           where A_t < 0, the dual clip
        loss = aggregate(L, action_mask)

    mu is the engine that sampled the tokens, so r corrects staleness and training-inference
    mismatch at once; there is no proxy policy and no second weight. The expectation over the noise
    is taken with one draw, as in the paper's algorithm. Without noise the same function is the
    Bypass baseline. KL and entropy terms are the caller's.

    Args:
        log_probs: (B, A) float, of the perturbed learner, with gradient.
        rollout_log_probs: (B, A) float, as the rollout engine reported them.
        advantages: (B, A) float.
        action_mask: (B, A) bool or 0/1; other positions contribute nothing.
        config: level and clip window.
        aggregate: (per-token loss (B, A), action mask (B, A)) -> scalar. Pass the global normaliser
            in through it: the default is the mean over this micro-batch only.

    Raises:
        NonFiniteLogProbError: nan or infinity on an action token.
    """
    mask = action_mask.bool()
    _require_finite("log_probs", log_probs, mask)
    _require_finite("rollout_log_probs", rollout_log_probs, mask)
    _require_finite("advantages", advantages, mask)
    # A nan off the mask would survive the multiplication by 0 in the mean.
    advantages = torch.where(mask, advantages, 0.0)

    log_ratio = per_token_log_ratio(log_probs, rollout_log_probs, mask, config.level)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    window = (1 - config.clip_low, 1 + config.clip_high)
    per_token = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(*window))
    if config.dual_clip is not None:
        ceiling = torch.where(advantages < 0, -advantages * config.dual_clip, math.inf)
        per_token = torch.minimum(per_token, ceiling)

    token = token_log_ratio(log_probs, rollout_log_probs, mask).detach()
    return LossOutput(
        loss=aggregate(per_token, mask),
        log_ratio=token,
        **_cut_fractions(log_ratio.detach(), ratio.detach(), advantages, mask, config),
        # In float64: the mean of many small differences would lose digits in bfloat16.
        approx_kl=-masked_mean(token.double(), mask).item(),
    )


def _cut_fractions(
    log_ratio: Tensor, ratio: Tensor, advantages: Tensor, mask: Tensor, config: UnifiedRatioConfig
) -> dict[str, float]:
    """The fields of LossOutput that say how many tokens a clip or the guard cut."""
    # A clip cuts the gradient only on the side to which the advantage pushes the ratio.
    low = (advantages < 0) & (ratio < 1 - config.clip_low)
    high = (advantages > 0) & (ratio > 1 + config.clip_high)
    dual = (advantages < 0) & (ratio > (config.dual_clip or math.inf))
    cuts = {
        "clip_fraction": low | high,
        "clip_low_fraction": low,
        "clip_high_fraction": high,
        "dual_clip_fraction": dual,
        "guard_fraction": log_ratio.abs() > MAX_LOG_RATIO,
    }
    # One transfer from the device for all of them instead of one each.
    fractions = torch.stack([masked_mean(cut.double(), mask) for cut in cuts.values()])
    return dict(zip(cuts, fractions.tolist(), strict=True))


def _require_finite(name: str, values: Tensor, mask: Tensor) -> None:
    bad = mask & ~values.isfinite()
    if bad.any():
        places = [tuple(place) for place in bad.nonzero()[:5].tolist()]
        raise NonFiniteLogProbError(
            f"{int(bad.sum())} of {int(mask.sum())} action tokens have a nan or infinite value in "
            f"{name}; (sample, position) of the first: {places}. The update would destroy the "
            "weights. Look for an overflow in the learner (lower its learning rate or "
            "--alp.sigma_max) or, for rollout_log_probs, in the rollout service"
        )
