"""The table of methods: the level and clip window of each one's ratio, and whether it is perturbed.

Imports no torch, so that a command line can list the methods before anything heavy is loaded.
"""

import math
from dataclasses import dataclass
from typing import Literal

RatioLevel = Literal["token", "sequence", "geometric"]


MAX_GEOMETRIC_WINDOW = 0.1
"""A mean of token log-ratios is within a few per cent of 0 (GSPO clips at 3e-4 and 4e-4)."""


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
            raise ValueError(
                f"--alp.dual_clip is {self.dual_clip}; it must be above 1: it bounds the loss of a "
                "negative advantage where the ratio is too large. Set 10, or inf for none"
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
# A mean of log-ratios is closer to 0 than a sum by the length: the window of GSPO (arXiv
# 2507.18071, section 5.1). A dual clip of 10 only guards against a broken batch there.
_GEOMETRIC = UnifiedRatioConfig(level="geometric", clip_low=3e-4, clip_high=4e-4, dual_clip=10.0)

METHODS: dict[str, MethodPreset] = {
    "token-alp": MethodPreset(ratio=_TOKEN, perturbed=True),
    "seq-alp": MethodPreset(ratio=_SEQUENCE, perturbed=True),
    "token-bypass": MethodPreset(ratio=_TOKEN, perturbed=False),
    "seq-bypass": MethodPreset(ratio=_SEQUENCE, perturbed=False),
    "gspo-alp": MethodPreset(ratio=_GEOMETRIC, perturbed=True),
    "gspo-bypass": MethodPreset(ratio=_GEOMETRIC, perturbed=False),
}
"""`--alp.method`. ALP and Bypass share their clip window: the noise is the only difference."""


def noise_budget(ratio: UnifiedRatioConfig, mean_length: float) -> float:
    """Largest token KL of noise that fits into the clip window, in nats.

    Noise with a KL of k moves a token's log-ratio by -k on average, with a variance of 2 k. Over T
    tokens the product has T times both; the geometric mean has the token's mean, and its variance
    over T. Half of the distance to the nearer edge of the window bounds the mean shift as well as
    the standard deviation, so that noise alone seldom leaves the window.

    Args:
        ratio: level and window.
        mean_length: T, action tokens of a sequence, at least 1.
    """
    half = min(math.log1p(ratio.clip_high), -_log_or_minus_infinity(1 - ratio.clip_low)) / 2
    shifts = mean_length if ratio.level == "sequence" else 1.0
    spreads = {"token": 1.0, "sequence": mean_length, "geometric": 1 / mean_length}[ratio.level]
    return min(half / shifts, half**2 / (2 * spreads))


def _log_or_minus_infinity(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
