"""Choosing sigma0: as much noise as the training-inference mismatch, not more.

Theorem 1 of the paper (arXiv 2603.19470) bounds the KL divergence of rollout and perturbed policy
by two terms: one falls as sigma covers the mismatch, one grows as sigma distorts the policy. They
balance where the noise moves the log-probabilities by as much as the mismatch does. Both sides can
be measured on served tokens before the first update:

    mismatch   k3_kl(clean learner,     rollout engine)   = target
    noise      k3_kl(perturbed learner, clean learner)    = floor + slope * sigma**2

In bfloat16 even tiny noise changes roundings, and these alone move the log-probs about as far as
the mismatch, which consists of them too. They are the floor, and what counts is what sigma adds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PROBES = (1e-4, 0.02, 0.06)
"""Sigmas of the three measurements, relative to the scale of the hidden states. The first is far
below the rounding of bfloat16 (relative 4e-3) and measures the floor; SmolLM2 reaches the mismatch
of its bfloat16 rollouts between the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Outcome of `calibrate_sigma0`; KL divergences in nats per token."""

    sigma0: float
    target_kl: float
    """KL that the noise should add to the floor."""
    floor_kl: float
    """KL of noise that only changes roundings."""
    slope: float
    """KL that noise adds to the floor, over sigma**2."""
    at_bound: str | None
    """`sigma_min` or `sigma_max` when the target lies beyond it and sigma0 was set to the bound."""


def calibrate_sigma0(
    perturbed_kl: Callable[[float], float],
    target_kl: float,
    *,
    sigma_min: float,
    sigma_max: float,
    unit: float = 1.0,
) -> Calibration:
    """Find the sigma whose noise adds `target_kl` to what rounding alone does.

    Args:
        perturbed_kl: sigma -> KL of perturbed against clean, called with the three PROBES. Use the
            same noise at every call (one `update` number), which makes it smooth in sigma.
        target_kl: > 0, the mismatch to cover.
        sigma_min: >= 0, lower bound of the answer.
        sigma_max: upper bound of the answer.
        unit: sigma of a relative strength of 1: 1 for relative sigmas, and the scale of the hidden
            states of the most sensitive layer for absolute ones.

    Raises:
        ValueError: the target or a measured KL is not a positive finite number, the noise has no
            effect, or the bounds are out of order.
    """
    if not (0 <= sigma_min < sigma_max < math.inf):
        raise ValueError(f"bounds [{sigma_min}, {sigma_max}] must hold 0 <= sigma_min < sigma_max")
    if not (0 < target_kl < math.inf):
        raise ValueError(
            f"the measured mismatch is {target_kl}; calibration needs a positive finite KL. "
            "Without any mismatch there is nothing to cover: give --alp.sigma0 a number"
        )
    sigmas = [probe * unit for probe in PROBES]
    floor, slope = _fit(sigmas, [_finite(sigma, perturbed_kl(sigma)) for sigma in sigmas])
    free = math.sqrt(target_kl / slope)
    return Calibration(
        sigma0=min(max(free, sigma_min), sigma_max),
        target_kl=target_kl,
        floor_kl=floor,
        slope=slope,
        at_bound="sigma_min" if free < sigma_min else "sigma_max" if free > sigma_max else None,
    )


def _fit(sigmas: Sequence[float], kls: Sequence[float]) -> tuple[float, float]:
    """Least squares of floor + slope * sigma**2, floor >= 0.

    A KL is measured with a relative error (5 to 10 % with a few hundred tokens), so the residuals
    are divided by it.
    """
    squares = [sigma**2 for sigma in sigmas]
    if max(kls) <= 0:
        raise ValueError(
            f"noise of {PROBES[-1]:g} times the hidden states changes no log-prob, so sigma0 "
            "cannot be measured. Look for layers that are not used (--alp.layers), or give "
            "--alp.sigma0 a number"
        )
    weights = [1 / max(kl, 1e-9 * max(kls)) ** 2 for kl in kls]
    sum_w, sum_x, sum_y, sum_xx, sum_xy = (
        sum(w * term for w, term in zip(weights, terms, strict=True))
        for terms in (
            [1.0] * len(kls),
            squares,
            kls,
            [x * x for x in squares],
            [x * y for x, y in zip(squares, kls, strict=True)],
        )
    )
    slope = (sum_w * sum_xy - sum_x * sum_y) / (sum_w * sum_xx - sum_x**2)
    floor = (sum_y - slope * sum_x) / sum_w
    if floor < 0:
        floor, slope = 0.0, sum_xy / sum_xx
    if slope <= 0:
        raise ValueError(
            f"the KL does not grow with the noise: {', '.join(f'{kl:.2e}' for kl in kls)} at "
            f"sigmas {', '.join(f'{sigma:.2e}' for sigma in sigmas)}. Rounding hides the noise; "
            "give --alp.sigma0 a number"
        )
    return floor, slope


def _finite(sigma: float, kl: float) -> float:
    if not 0 <= kl < math.inf:
        raise ValueError(
            f"the perturbed forward at sigma {sigma:.3g} gave a KL of {kl}; it must be finite. "
            "Look for an overflow in the learner's forward pass"
        )
    return kl
