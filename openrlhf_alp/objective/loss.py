"""The policy loss with one ratio, perturbed learner over rollout engine, and its presets.

Letters: B samples, A positions of the action axis.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from openrlhf_alp.objective.ratio import RatioLevel, per_token_log_ratio, token_log_ratio

MAX_LOG_RATIO = 20.0
"""|log r| above this is cut before exp: e**20 = 5e8 is far outside every clip window, and the
gradient there is meant to vanish, while exp of a sequence's summed log-ratio could overflow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnifiedRatioConfig:
    """Level and clip window of the unified ratio.

    Raises:
        ValueError: a value is out of range; the message names the flag that sets it.
    """

    level: RatioLevel
    """`token` (paper, eq. 2), `sequence` (product over the response, eq. 3), or `geometric` (the
    product's per-token mean, GSPO); follows from `--alp.method`."""
    clip_low: float
    """r is clipped from below at 1 - clip_low, in (0, 1]; `--alp.clip_low_high`."""
    clip_high: float
    """r is clipped from above at 1 + clip_high, > 0; `--alp.clip_low_high`."""
    dual_clip: float | None
    """c > 1: with a negative advantage the loss of a token is at most c * |A| (arXiv 1912.09729).
    None switches it off. `--alp.dual_clip`; the paper uses 10."""

    def __post_init__(self) -> None:
        if self.level not in ("token", "sequence", "geometric"):
            raise ValueError(f"ratio level is {self.level!r}; see --alp.method")
        if not (0 < self.clip_low <= 1 and 0 < self.clip_high < math.inf):
            raise ValueError(
                f"--alp.clip_low_high is {self.clip_low} {self.clip_high}; it must hold "
                "0 < low <= 1 and a finite high > 0"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"--alp.dual_clip is {self.dual_clip}; it must be above 1")


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
    advantages = torch.where(mask, advantages, 0.0)

    log_ratio = per_token_log_ratio(log_probs, rollout_log_probs, mask, config.level)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    low, high = 1 - config.clip_low, 1 + config.clip_high
    per_token = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
    dual_clip = math.inf if config.dual_clip is None else config.dual_clip
    if config.dual_clip is not None:
        ceiling = torch.where(advantages < 0, -advantages * dual_clip, math.inf)
        per_token = torch.minimum(per_token, ceiling)

    with torch.no_grad():
        cut_low = (advantages < 0) & (ratio < low)
        cut_high = (advantages > 0) & (ratio > high)
        cut_dual = (advantages < 0) & (ratio > dual_clip)
        guarded = log_ratio.abs() > MAX_LOG_RATIO
        token = token_log_ratio(log_probs, rollout_log_probs, mask).detach()
        columns = torch.stack([cut_low | cut_high, cut_low, cut_high, cut_dual, guarded]).double()
        fractions = torch.stack([masked_mean(column, mask) for column in columns])
        clipped, clipped_low, clipped_high, clipped_dual, guard = fractions.tolist()
    return LossOutput(
        loss=aggregate(per_token, mask),
        log_ratio=token,
        clip_fraction=clipped,
        clip_low_fraction=clipped_low,
        clip_high_fraction=clipped_high,
        dual_clip_fraction=clipped_dual,
        guard_fraction=guard,
        approx_kl=-masked_mean(token.double(), mask).item(),
    )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodPreset:
    """One row of `--alp.method`."""

    ratio: UnifiedRatioConfig
    perturbed: bool
    """Whether the numerator's forward pass is perturbed."""


# The clip windows of the authors' scripts; the paper's appendix E has dual clip 10 throughout.
_TOKEN = UnifiedRatioConfig(level="token", clip_low=0.2, clip_high=0.28, dual_clip=10.0)
_SEQUENCE = UnifiedRatioConfig(level="sequence", clip_low=0.5, clip_high=3.0, dual_clip=10.0)

METHODS: dict[str, MethodPreset] = {
    "token-alp": MethodPreset(ratio=_TOKEN, perturbed=True),
    "seq-alp": MethodPreset(ratio=_SEQUENCE, perturbed=True),
    "token-bypass": MethodPreset(ratio=_TOKEN, perturbed=False),
    "seq-bypass": MethodPreset(ratio=_SEQUENCE, perturbed=False),
}
"""`--alp.method`. ALP and Bypass share their clip window: the noise is the only difference."""
