"""Detached factors of a token's loss: corrections of the mismatch, and trust regions.

Letters: B samples, A positions of the action axis.
"""

import torch
from torch import Tensor

from openrlhf_alp.objective.config import Correction, TrustRegion
from openrlhf_alp.objective.ratio import MAX_LOG_RATIO, guarded_exp

_MAX_LOG_PROB = -1e-7
"""Log-probs are cut to this before 1 - p is taken: float32 resolves no probability nearer to 1, and
a certain token would make the KL infinite."""


def correction_factor(
    token_log_ratio: Tensor, action_mask: Tensor, correction: Correction
) -> tuple[Tensor, Tensor]:
    """Factor of each token, and which tokens it keeps.

        truncate   w = clip(u, low, high)
        mask       w = v if low <= u <= high else 0

    u is the unit's statistic: r_t, prod r_t, (prod r_t)**(1/T), or max over t of r_t - 1 - log r_t;
    v is u, r_t or 1.

    Args:
        token_log_ratio: (B, A) float, log r_t, 0 off the mask.
        action_mask: (B, A) bool.
        correction: mode, unit, bounds, weight.

    Returns:
        (B, A) float without gradient, and (B, A) bool. Both are meaningless off the mask.
    """
    token = token_log_ratio.detach()
    unit = _statistic(token, action_mask, correction)
    if correction.mode == "truncate":
        return unit.clamp(correction.low, correction.high), torch.ones_like(action_mask)
    kept = (unit >= correction.low) & (unit <= correction.high)
    weight = {"unit": unit, "token": guarded_exp(token), "none": torch.ones_like(token)}
    return torch.where(kept, weight[correction.weight], 0.0), kept


def _statistic(token: Tensor, mask: Tensor, correction: Correction) -> Tensor:
    """u of `correction_factor`, (B, A): the same for all tokens of a sequence but for `token`."""
    if correction.unit == "token":
        return guarded_exp(token)
    if correction.unit == "max-token":
        # expm1 keeps the small differences that r - 1 would round away.
        k3 = torch.expm1(token.clamp(max=MAX_LOG_RATIO)) - token
        return torch.where(mask, k3, 0.0).amax(dim=-1, keepdim=True).expand_as(token)
    total = token.sum(dim=-1, keepdim=True)
    if correction.unit == "geometric":
        total = total / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    return guarded_exp(total).expand_as(token)


def bernoulli_divergence(
    log_probs: Tensor, reference_log_probs: Tensor, region: TrustRegion
) -> Tensor:
    """Divergence of "this token or another one" between two policies (arXiv 2602.04879).

        tv   |p - q|
        kl   q log(q / p) + (1 - q) log((1 - q) / (1 - p))       p learner, q reference

    Args:
        log_probs: (..) float, of the learner.
        reference_log_probs: (..) float, of the denominator.
        region: which divergence.

    Returns:
        (..) float64 without gradient, nats for kl.
    """
    log_p = log_probs.detach().double().clamp(max=_MAX_LOG_PROB)
    log_q = reference_log_probs.detach().double().clamp(max=_MAX_LOG_PROB)
    q = log_q.exp()
    if region.divergence == "tv":
        return (log_p.exp() - q).abs()
    log_rest_p, log_rest_q = ((-torch.expm1(log)).log() for log in (log_p, log_q))
    return q * (log_q - log_p) + (1 - q) * (log_rest_q - log_rest_p)


def inside_trust_region(
    log_probs: Tensor, reference_log_probs: Tensor, advantages: Tensor, region: TrustRegion
) -> Tensor:
    """Tokens that keep their gradient: (B, A) bool.

    A token loses it when its divergence is above the threshold and the advantage pushes the
    probability further away: up with a positive one, down with a negative one.
    """
    divergence = bernoulli_divergence(log_probs, reference_log_probs, region)
    rose = log_probs.detach() > reference_log_probs
    fell = log_probs.detach() < reference_log_probs
    outwards = ((advantages > 0) & rose) | ((advantages < 0) & fell)
    return ~(outwards & (divergence > region.threshold))
