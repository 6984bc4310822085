"""Settings of the perturbation, checked before any model is touched."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

SigmaKind = Literal["vector", "scalar"]
SigmaScale = Literal["relative", "absolute"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PerturbationConfig:
    """Settings of `LayerwisePerturbation`; each is the training flag `--alp.<field>` as well.

    Raises:
        ValueError: a value is out of range; the message names the flag that sets it.
    """

    sigma0: float | None = field(default=None, metadata={"none": "auto", "metavar": "SIGMA|auto"})
    """Standard deviation of the noise at the start, in the unit of --alp.sigma_scale; 0 means no
    noise. auto measures the mismatch of learner and rollout service before step 1 and matches its
    KL (Theorem 1); until then sigma is sigma_min. The authors' code uses 0.02 (single turn) and
    1e-6 (multi turn), both absolute."""
    kind: SigmaKind = field(default="vector", metadata={"name": "sigma"})
    """One sigma per hidden dimension of a layer (the paper, section 2.2), or a scalar per layer
    (the authors' code)."""
    sigma_scale: SigmaScale = "relative"
    """Unit of sigma0 and of its bounds. relative: the median |h_l| of each layer's input, measured
    once on the first step's tokens, so that sigma grows with the hidden states over the depth.
    absolute: that of the hidden states, one sigma0 for all layers (the authors' code)."""
    sigma_min: float = 1e-6
    """Lower bound of every sigma, at least 0, in the unit of --alp.sigma_scale."""
    sigma_max: float | None = field(default=None, metadata={"none": "default"})
    """Upper bound of every sigma, in the unit of --alp.sigma_scale; default: 1 when relative, 0.1
    when absolute."""
    layers: str = "all"
    """Decoder layers to perturb: all, 0-4, 12,13 or 0-1,5. The paper's ablation (section 4.3) finds
    all layers best."""
    seed: int = 42
    """Seed of the noise, independent of every other seed of the run."""

    def __post_init__(self) -> None:
        _check_choice("--alp.sigma", self.kind, get_args(SigmaKind))
        _check_choice("--alp.sigma_scale", self.sigma_scale, get_args(SigmaScale))
        if not 0 <= self.sigma_min < self.upper_bound < math.inf:
            raise ValueError(
                f"--alp.sigma_min is {self.sigma_min} and --alp.sigma_max is {self.upper_bound}; "
                "they must be finite with 0 <= sigma_min < sigma_max"
            )
        if self.sigma0 is not None:
            check_sigma0(self.sigma0, self.sigma_min, self.upper_bound)
        elif self.sigma_min == 0 and self.sigma_scale == "absolute":
            raise ValueError(
                "--alp.sigma_min is 0 with --alp.sigma0 auto and --alp.sigma_scale absolute: a "
                "sigma that falls below the rounding of its hidden states has neither effect nor "
                "gradient. Set --alp.sigma_min 1e-6, or --alp.sigma_scale relative"
            )
        # bool is a subclass of int, but a seed of True is a mistake.
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"--alp.seed is {self.seed!r}; it must be an integer")

    @property
    def upper_bound(self) -> float:
        """`sigma_max`, or its default for `sigma_scale`."""
        if self.sigma_max is not None:
            return self.sigma_max
        return DEFAULT_SIGMA_MAX[self.sigma_scale]


DEFAULT_SIGMA_MAX: dict[SigmaScale, float] = {"relative": 1.0, "absolute": 0.1}
"""`--alp.sigma_max` when it is not given. Noise as large as the median entry is no longer small."""


def _check_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = " or ".join(map(repr, choices))
        raise ValueError(f"{flag} is {value!r}; it must be {expected}")


def check_sigma0(sigma0: float, sigma_min: float, sigma_max: float) -> None:
    """Raise ValueError unless sigma0 lies in [sigma_min, sigma_max]."""
    if not sigma_min <= sigma0 <= sigma_max:
        raise ValueError(
            f"--alp.sigma0 is {sigma0}; it must lie in [{sigma_min}, {sigma_max}], the bounds set "
            "by --alp.sigma_min and --alp.sigma_max"
        )


def parse_layers(spec: str, num_layers: int) -> tuple[int, ...]:
    """Turn `--alp.layers` into sorted layer indices.

    Args:
        spec: `all`, or comma-separated indices and inclusive ranges: `12,13`, `0-4`, `0-1,5`.
        num_layers: number of decoder layers of the model.

    Raises:
        ValueError: the text cannot be read, or names a layer the model does not have.
    """
    if spec.strip() == "all":
        return tuple(range(num_layers))
    selected: set[int] = set()
    for part in spec.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ValueError(
                f"--alp.layers is {spec!r}; {part.strip()!r} is neither an index nor a range. "
                "Write 'all', '0-4', '12,13' or a mixture such as '0-1,5'"
            )
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if first > last or last >= num_layers:
            raise ValueError(
                f"--alp.layers is {spec!r}; {part.strip()!r} must be an ascending range within "
                f"0-{num_layers - 1}, since the model has {num_layers} decoder layers"
            )
        selected.update(range(first, last + 1))
    return tuple(sorted(selected))
