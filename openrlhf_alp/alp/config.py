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
    sigma_max: float | None = None
    """Upper bound of every sigma, in the unit of --alp.sigma_scale (default: 1 when relative, 0.1
    when absolute)."""
    layers: str = "all"
    """Where the noise goes: the inputs of all decoder layers, of some (0-4, 12,13), of the paper's
    early, middle or late ones, the embedding (input of layer 0), or the output logits; commas join
    them. The paper's ablation (section 5.1, Table 4) finds all layers best and logits worst."""
    draws: int = field(default=1, metadata={"metavar": "K"})
    """Average the perturbed probability of a token over K draws of the noise. 1 is the paper's; K
    takes K forward passes, computed as one of K times the samples and memory."""
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
        if isinstance(self.draws, bool) or not isinstance(self.draws, int) or self.draws < 1:
            raise ValueError(f"--alp.draws is {self.draws!r}; it must be an integer of at least 1")
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


_PAPER_LAYERS = 28
_PAPER_BANDS = {"early": (0, 5), "middle": (12, 17), "late": (19, 24)}
"""First and one past the last layer of the bands of section 5.1, in Qwen2.5's 28 layers."""


def parse_layers(spec: str, num_layers: int) -> tuple[int, ...]:
    """Turn `--alp.layers` into sorted indices of places.

    Place l < num_layers is the input of decoder layer l, place num_layers the output logits.

    Args:
        spec: comma-separated `all`, `early`, `middle`, `late`, `embedding`, `logits`, indices and
            inclusive ranges: `12,13`, `0-4`, `embedding,logits`. The bands of the paper's ablation
            (0-4, 12-16 and 19-23 of 28 layers) keep their place and share in other models.
        num_layers: number of decoder layers of the model.

    Raises:
        ValueError: the text cannot be read, or names a layer the model does not have.
    """
    selected: set[int] = set()
    for part in spec.split(","):
        selected.update(_places(part.strip(), spec, num_layers))
    return tuple(sorted(selected))


def _places(part: str, spec: str, num_layers: int) -> range:
    if part == "all":
        return range(num_layers)
    if part == "embedding":
        return range(1)
    if part == "logits":
        return range(num_layers, num_layers + 1)
    if part in _PAPER_BANDS:
        first, stop = (round(edge * num_layers / _PAPER_LAYERS) for edge in _PAPER_BANDS[part])
        first = min(first, num_layers - 1)
        return range(first, max(first + 1, stop))
    match = re.fullmatch(r"(\d+)\s*(?:-\s*(\d+))?", part)
    if match is None:
        raise ValueError(
            f"--alp.layers is {spec!r}; {part!r} is neither an index nor a range. Write 'all', "
            "'0-4', '12,13', a mixture such as '0-1,5', or early, middle, late, embedding or logits"
        )
    first = int(match[1])
    last = int(match[2]) if match[2] else first
    if first > last or last >= num_layers:
        raise ValueError(
            f"--alp.layers is {spec!r}; {part!r} must be an ascending range within "
            f"0-{num_layers - 1}, since the model has {num_layers} decoder layers"
        )
    return range(first, last + 1)
