"""Log-ratios of two policies on the sampled tokens, and the KL estimated from them.

With l_t = log pi_theta,sigma(y_t) of the learner and rho_t = log mu(y_t) of the denominator, the
rollout engine or the old policy:

    token      log r_t = l_t - rho_t
    sequence   s = sum_t (l_t - rho_t)            log r_t = sg(s) + l_t - sg(l_t)
    geometric  s = mean_t (l_t - rho_t)           log r_t = sg(s) + l_t - sg(l_t)

sg is stop-gradient: every token carries the value of the whole sequence's ratio, and the gradient
of its own log-probability (arXiv 2603.19470, eq. 3; carrying it token by token is GSPO's way, arXiv
2507.18071, and leaves the aggregation over tokens free).

Letters: B samples, A positions of the action axis.
"""

import torch
from torch import Tensor

from openrlhf_alp.objective.config import RatioLevel

MAX_LOG_RATIO = 20.0
"""|log r| above this is cut before exp: e**20 = 5e8 is far outside every clip window, and the
gradient there is meant to vanish, while exp of a sequence's summed log-ratio could overflow."""


def token_log_ratio(log_probs: Tensor, reference_log_probs: Tensor, action_mask: Tensor) -> Tensor:
    """l_t - rho_t, (B, A), and exactly 0 (with zero gradient) off `action_mask`."""
    # where, not a product: whatever stands at a masked position, inf and nan included, is dropped.
    return torch.where(action_mask.bool(), log_probs - reference_log_probs, 0.0)


def guarded_exp(log_ratio: Tensor) -> Tensor:
    """exp of a log-ratio cut to +-MAX_LOG_RATIO; no gradient where it was cut."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def per_token_log_ratio(
    log_probs: Tensor, reference_log_probs: Tensor, action_mask: Tensor, level: RatioLevel
) -> Tensor:
    """Log-ratio that each token carries into the loss.

    Args:
        log_probs: (B, A) float, of the learner, with gradient.
        reference_log_probs: (B, A) float, of the rollout engine or the old policy.
        action_mask: (B, A) bool or 0/1, true where the model chose the token. Prompt, tool output
            and padding are false and contribute nothing.
        level: what one ratio spans.

    Returns:
        (B, A) float, 0 off `action_mask`.
    """
    mask = action_mask.bool()
    token = token_log_ratio(log_probs, reference_log_probs, mask)
    if level == "token":
        return token
    # Detached, so that a token's gradient is that of its own log-probability alone.
    sequence = token.detach().sum(dim=-1, keepdim=True)
    if level == "geometric":
        sequence = sequence / mask.sum(dim=-1, keepdim=True).clamp(min=1)
    elif level != "sequence":
        raise ValueError(f"level is {level!r}; it must be 'token', 'sequence' or 'geometric'")
    return torch.where(mask, sequence + (token - token.detach()), 0.0)


def k3_kl(log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor) -> float:
    """k3 estimate of KL(reference || policy).

    The mean of exp(d) - 1 - d with d = log_probs - reference_log_probs.

    Unbiased for tokens drawn from the reference, never negative, and computed in float64: for the
    small d of a mismatch the three terms cancel to d**2 / 2.

    Args:
        log_probs: (..) float, of the policy.
        reference_log_probs: (..) float, of the distribution that drew the tokens.
        mask: (..) bool or 0/1, tokens that count.

    Raises:
        ValueError: the mask selects nothing.
    """
    selected = mask.bool()
    if not selected.any():
        raise ValueError("the mask selects no token; a KL divergence needs at least one")
    difference = (log_probs[selected].double() - reference_log_probs[selected].double()).detach()
    return (torch.expm1(difference) - difference).mean().item()
