"""Settings of the perturbation, checked before any model is touched."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

SigmaKind = Literal["vector", "scalar"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PerturbationConfig:
    """Settings of `LayerwisePerturbation`; each is the training flag `--alp.<field>` as well.

    Raises:
        ValueError: a value is out of range; the message names the flag that sets it.
    """

    sigma0: float | None = field(default=None, metadata={"none": "auto", "metavar": "SIGMA|auto"})
    """Standard deviation of the noise at the start, in units of the hidden states; 0 means no
    noise. auto measures the mismatch of learner and rollout service before step 1 and matches its
    KL (Theorem 1); until then sigma is sigma_min. The authors' code uses 0.02 (single turn) and
    1e-6 (multi turn)."""
    kind: SigmaKind = field(default="vector", metadata={"name": "sigma"})
    """One sigma per hidden dimension of a layer (the paper, section 2.2), or a scalar per layer
    (the authors' code)."""
    sigma_min: float = 1e-6
    """Lower bound of every sigma, at least 0."""
    sigma_max: float = 0.1
    """Upper bound of every sigma."""
    layers: str = "all"
    """Decoder layers to perturb: all, 0-4, 12,13 or 0-1,5. The paper's ablation (section 4.3) finds
    all layers best."""
    seed: int = 42
    """Seed of the noise, independent of every other seed of the run."""

    def __post_init__(self) -> None:
        if self.kind not in ("vector", "scalar"):
            raise ValueError(f"--alp.sigma is {self.kind!r}; it must be 'vector' or 'scalar'")
        if not 0 <= self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"--alp.sigma_min is {self.sigma_min} and --alp.sigma_max is {self.sigma_max}; "
                "they must be finite with 0 <= sigma_min < sigma_max"
            )
        if self.sigma0 is not None:
            check_sigma0(self.sigma0, self.sigma_min, self.sigma_max)
        # bool is a subclass of int, but a seed of True is a mistake.
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"--alp.seed is {self.seed!r}; it must be an integer")


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
