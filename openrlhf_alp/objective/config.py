"""Settings of a policy objective: what one loss is made of. Imports no torch.

A loss is a product of choices, each a field of `ObjectiveConfig`:

    numerator     clean or perturbed learner       the caller's forward pass
    denominator   rollout engine, or old policy    what the ratio divides by
    level         token, sequence, geometric       what one ratio spans
    clip          ppo, cispo, none                 what the clip window does
    correction    truncate or mask, or none        second factor for the mismatch
    trust_region  tv or kl, or none                which tokens may still move
    aggregation   token-mean, seq-mean-token-mean  tokens to one number
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

RatioLevel = Literal["token", "sequence", "geometric"]
Denominator = Literal["rollout", "old"]
Clip = Literal["ppo", "cispo", "none"]
Aggregation = Literal["token-mean", "seq-mean-token-mean"]
CorrectionUnit = Literal["token", "sequence", "geometric", "max-token"]
CorrectionMode = Literal["truncate", "mask"]
CorrectionWeight = Literal["unit", "token", "none"]
Divergence = Literal["tv", "kl"]

MAX_GEOMETRIC_WINDOW = 0.1
"""A mean of token log-ratios is within a few per cent of 0 (GSPO clips at 3e-4 and 4e-4)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Detached factor of a token's loss, for the mismatch of learner and rollout engine.

    The corrected ratio is old policy over rollout engine or, when the rollout engine is the
    objective's denominator already, learner over rollout engine.

    Raises:
        ValueError: bounds out of order, or a combination that does not exist.
    """

    mode: CorrectionMode
    """`truncate` bounds the factor to [low, high]; `mask` sets it to 0 outside of it."""
    unit: CorrectionUnit
    """Statistic that is compared with the bounds: the ratio of a `token`, of a `sequence`
    (product), its `geometric` mean, or the largest k3 KL of a sequence's tokens (`max-token`)."""
    low: float
    """Lower bound, at least 0; `--alp.correction_low_high`."""
    high: float
    """Upper bound, above low; `--alp.correction_low_high`."""
    weight: CorrectionWeight
    """Factor of what is kept: the `unit`'s own ratio, the `token`'s, or 1 (`none`)."""

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high < math.inf:
            raise ValueError(
                f"--alp.correction_low_high is {self.low} {self.high}; it must hold 0 <= low < "
                "high and a finite high"
            )
        if self.mode == "truncate" and (self.unit == "max-token" or self.weight != "unit"):
            raise ValueError(
                f"a correction that truncates bounds its own ratio, and unit={self.unit!r} with "
                f"weight={self.weight!r} has none. Use mode='mask'"
            )
        if self.unit == "max-token" and self.weight == "unit":
            raise ValueError("the largest KL of a sequence is no factor; use weight='none'")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustRegion:
    """Tokens whose probability has moved this far get no gradient that moves it further.

    The divergence is that of two Bernoulli distributions, "this token or another one", of the
    learner and of the objective's denominator (DPPO, arXiv 2602.04879).

    Raises:
        ValueError: the threshold is not positive and finite.
    """

    divergence: Divergence
    """`tv`: |p - q|. `kl`: KL(denominator || learner) in nats."""
    threshold: float
    """Largest divergence, above 0; `--alp.trust_region`."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold < math.inf:
            raise ValueError(
                f"--alp.trust_region is {self.threshold}; it must be a finite number above 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """Everything of a policy loss but the numerator, which the caller's forward pass decides.

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
    None switches it off. `--alp.dual_clip`; ppo only."""
    clip: Clip = "ppo"
    """`ppo`: the pessimistic bound of the clipped surrogate (arXiv 1707.06347). `cispo`: the window
    bounds a detached weight of log pi, and every token keeps a gradient (arXiv 2506.13585).
    `none`: the window is not used."""
    denominator: Denominator = "rollout"
    """`rollout`: the log-probs of the engine that sampled. `old`: the clean learner's at the start
    of the step, which cost one more forward pass."""
    correction: Correction | None = None
    """Second factor; None for none."""
    trust_region: TrustRegion | None = None
    """Divergence mask of single tokens; None for none."""
    aggregation: Aggregation = "token-mean"
    """Mean over all tokens of the optimizer step, or over sequences of their token means;
    `--actor.loss_agg_mode`."""

    def __post_init__(self) -> None:
        if self.level not in get_args(RatioLevel):
            raise ValueError(f"ratio level is {self.level!r}; see --alp.method")
        if not 0 < self.clip_low <= 1 or not self.clip_high > 0:
            self._refuse_window()
        if self.clip_high == math.inf and self.clip != "none":
            self._refuse_window()
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(
                f"--alp.dual_clip is {self.dual_clip}; it must be above 1: it bounds the loss of a "
                "negative advantage where the ratio is too large. Set 10, or inf for none"
            )

    def _refuse_window(self) -> None:
        raise ValueError(
            f"--alp.clip_low_high is {self.clip_low} {self.clip_high}; it must hold "
            "0 < low <= 1 and a finite high > 0"
        )

    @property
    def needs_old_policy(self) -> bool:
        """Whether a step makes a clean forward pass before its first update."""
        return self.denominator == "old"


def noise_budget(objective: ObjectiveConfig, mean_length: float) -> float:
    """Largest token KL of noise that fits into the clip window, in nats.

    Noise with a KL of k moves a token's log-ratio by -k on average, with a variance of 2 k. Over T
    tokens the product has T times both; the geometric mean has the token's mean, and its variance
    over T. Half of the distance to the nearer edge of the window bounds the mean shift as well as
    the standard deviation, so that noise alone seldom leaves the window.

    Args:
        objective: level and window.
        mean_length: T, action tokens of a sequence, at least 1.
    """
    low = _log_or_minus_infinity(1 - objective.clip_low)
    half = min(math.log1p(objective.clip_high), -low) / 2
    shifts = mean_length if objective.level == "sequence" else 1.0
    spreads = {"token": 1.0, "sequence": mean_length, "geometric": 1 / mean_length}
    return min(half / shifts, half**2 / (2 * spreads[objective.level]))


def _log_or_minus_infinity(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
