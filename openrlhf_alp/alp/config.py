"""What the perturbation looks like: checked once, here, before any model is touched."""

import math
import re
from dataclasses import dataclass
from typing import Literal

SigmaKind = Literal["vector", "scalar"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PerturbationConfig:
    """Settings of `LayerwisePerturbation`.

    Raises:
        ValueError: a value is out of range; the message names the flag that sets it.
    """

    sigma0: float
    """Standard deviation before training, in units of the hidden states; `--alp.sigma0`. The
    authors' code uses 0.02 (single turn) and 1e-6 (multi turn); calibrate it to the model instead
    (`calibrate_sigma0`). 0 means no noise at all."""
    kind: SigmaKind
    """`vector`: one sigma per hidden dimension of a layer (the paper, section 2.2). `scalar`: one
    per layer (the authors' code). `--alp.sigma`."""
    sigma_min: float
    """Lower bound of every sigma, >= 0; `--alp.sigma_min`."""
    sigma_max: float
    """Upper bound of every sigma; `--alp.sigma_max`."""
    layers: str
    """Decoder layers to perturb: `all`, `0-4`, `12,13`, `0-1,5`; `--alp.layers`. The paper's
    ablation finds all layers best."""
    seed: int
    """Seed of the noise, independent of every other seed of the run; `--alp.seed`."""

    def __post_init__(self) -> None:
        if self.kind not in ("vector", "scalar"):
            raise ValueError(f"--alp.sigma is {self.kind!r}; it must be 'vector' or 'scalar'")
        if not 0 <= self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"--alp.sigma_min is {self.sigma_min} and --alp.sigma_max is {self.sigma_max}; "
                "they must be finite with 0 <= sigma_min < sigma_max"
            )
        check_sigma0(self.sigma0, self.sigma_min, self.sigma_max)
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
