"""Choosing sigma0: as much noise as the training-inference mismatch, not more.

Theorem 1 of the paper (arXiv 2603.19470) bounds the KL divergence of rollout and perturbed policy
by two terms: one falls as sigma covers the mismatch, one grows as sigma distorts the policy. They
balance where the noise moves the log-probabilities by as much as the mismatch does. Both sides can
be measured on served tokens before the first update:

    mismatch   k3_kl(clean learner,     rollout engine)   = target
    noise      k3_kl(perturbed learner, clean learner)    = floor + slope * sigma**2

In bfloat16 even tiny noise changes roundings, and these alone move the log-probs about as far as
the mismatch, which consists of them too. They are the floor, and what counts is what sigma adds.

A parabola through three probes is only where the search begins. It bends off where noise is large,
and noise on values that bfloat16 keeps coarsely, such as logits, is rounded away where it is small.
So the KL at the sigma that was found is measured, and sigma is corrected until that is right.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

PROBES = (1e-4, 0.02, 0.06)
"""Sigmas of the three measurements, relative to the scale of the hidden states. The first is far
below the rounding of bfloat16 (relative 4e-3) and measures the floor; SmolLM2 reaches the mismatch
of its bfloat16 rollouts between the others."""

_CLOSE = 2.0
"""Factor within which the KL of noise and rounding has to be the wanted one."""

_MOST_CORRECTIONS = 8
"""Where rounding makes the KL jump over the target, they end within a tenth of the jump."""

_LARGEST_STEP = 8.0
"""A correction makes sigma larger by no more, where the noise shows no effect yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Outcome of `calibrate_sigma0`; KL divergences in nats per token."""

    sigma0: float
    needed: float
    """sigma0 if there were no bounds."""
    target_kl: float
    """KL that the noise should add to the floor."""
    floor_kl: float
    """KL of noise that only changes roundings."""
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
        perturbed_kl: sigma -> KL of perturbed against clean, called with the three PROBES and with
            each sigma that is tried. Use the same noise at every call (one `update` number), which
            makes it smooth in sigma.
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
    bounded = partial(_within, sigma_min=sigma_min, sigma_max=sigma_max)
    needed = _corrected(perturbed_kl, math.sqrt(target_kl / slope), floor, target_kl, bounded)
    low, high = needed < sigma_min, needed > sigma_max
    return Calibration(
        sigma0=bounded(needed),
        needed=needed,
        target_kl=target_kl,
        floor_kl=floor,
        at_bound="sigma_min" if low else "sigma_max" if high else None,
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
        # The first probe, whose error would weigh most, has nothing to say about the slope.
        above = list(zip(weights, squares, kls, strict=True))[1:]
        floor = 0.0
        slope = sum(w * x * y for w, x, y in above) / sum(w * x * x for w, x, _ in above)
    if slope <= 0:
        raise ValueError(
            f"the KL does not grow with the noise: {', '.join(f'{kl:.2e}' for kl in kls)} at "
            f"sigmas {', '.join(f'{sigma:.2e}' for sigma in sigmas)}. Rounding hides the noise; "
            "give --alp.sigma0 a number"
        )
    return floor, slope


def _corrected(
    perturbed_kl: Callable[[float], float],
    needed: float,
    floor: float,
    target: float,
    bounded: Callable[[float], float],
) -> float:
    """The sigma whose measured KL is close to floor + target; a start that is close is kept."""
    too_little, too_much = 0.0, math.inf
    for _ in range(_MOST_CORRECTIONS):
        tried = bounded(needed)
        kl = _finite(tried, perturbed_kl(tried))
        if 1 / _CLOSE < kl / (floor + target) < _CLOSE:
            break
        if kl < floor + target:
            too_little = tried
        else:
            too_much = tried
        if too_little and too_much < math.inf:
            needed = math.sqrt(too_little * too_much)
        else:
            step = math.sqrt(target / (kl - floor)) if kl > floor else _LARGEST_STEP
            needed = tried * min(step, _LARGEST_STEP)
        if bounded(needed) == tried:
            break
    return needed


def _within(sigma: float, sigma_min: float, sigma_max: float) -> float:
    return min(max(sigma, sigma_min), sigma_max)


def _finite(sigma: float, kl: float) -> float:
    if not 0 <= kl < math.inf:
        raise ValueError(
            f"the perturbed forward at sigma {sigma:.3g} gave a KL of {kl}; it must be finite. "
            "Look for an overflow in the learner's forward pass"
        )
    return kl
