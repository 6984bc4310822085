"""Several draws of the noise in one forward pass, averaged as probabilities.

The paper defines the perturbed policy as an expectation over the noise and estimates it with one
draw (arXiv 2603.19470, section 2.3). K draws estimate it better:

    log pi_theta,sigma(y_t) = log (1 / K) sum_k pi_theta,sigma(y_t | epsilon_k)

The draws are rows of one batch, (K * B, T) in the order draw, sample: one graph, one backward pass
and one gradient reduction, whatever wraps the model. It takes K times the activations.

Letters: K draws, B samples, A positions.
"""

import math

from torch import Tensor


def repeat_rows(values: Tensor, draws: int) -> Tensor:
    """(B, ..) -> (K * B, ..): all samples of one draw, then of the next; K = 1 is itself."""
    return values if draws == 1 else values.repeat(draws, *[1] * (values.dim() - 1))


def mean_over_draws(values: Tensor, draws: int) -> Tensor:
    """Mean over the draws. (K * B, ..) -> (B, ..); K = 1 is itself."""
    return values if draws == 1 else values.unflatten(0, (draws, -1)).mean(dim=0)


def log_mean_exp_over_draws(log_probs: Tensor, draws: int) -> Tensor:
    """Log of the mean probability. (K * B, A) -> (B, A); K = 1 is itself, bit for bit.

    Its gradient weighs each draw by its share of the probability.
    """
    if draws == 1:
        return log_probs
    return log_probs.unflatten(0, (draws, -1)).logsumexp(dim=0) - math.log(draws)
