"""A numerical check of the paper's Theorem 2: the largest curvature of the loss against sigma.

The loss is the surrogate of equation (2) for one prompt with many samples and without a clip,
J(x) = -sum_a A_a pi(a | x), of a softmax policy over a hidden state x in R^2. Under noise it is
J_sigma(x) = E J(x + delta), delta ~ N(0, sigma^2 I). Curvature is the spectral norm of the Hessian.

The formulas of Theorem 4 are missing in the text that we have of the paper; its proof in appendix D
says what they are. Let beta be the largest curvature of J and V(b) the volume in which the
curvature exceeds b. A Gaussian puts on a set of volume V(b) at most what it puts on a ball of that
volume around its mean, in R^2 1 - exp(-V / (2 pi sigma^2)). So for every b

    largest curvature of J_sigma <= b + (beta - b) (1 - exp(-V(b) / (2 pi sigma^2))),

and the bound printed is the least over b. It says something where sharp places are small. The
curvature is that in the hidden state, where the noise is added, not that in the weights.

    python examples/theory/theorem_2.py [--out DIR]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.ndimage import fourier_gaussian

SIGMAS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
HALF_WIDTH = 6.0
"""The grid is [-6, 6)^2: beyond it the policy is uniform and the curvature below 1e-6."""

SPACING = 0.04
BUMP_WIDTH = 0.4
SHARPNESS = 5.0
"""Height of a logit's bump; more makes the policy, and with it the loss, sharper."""


def loss(x: torch.Tensor) -> torch.Tensor:
    """J of one hidden state, (2,) float64 -> scalar: four actions, each likely around a centre."""
    centres = torch.tensor([[0.0, 0.0], [0.7, 0.2], [-0.4, 0.8], [0.1, -0.9]], dtype=x.dtype)
    advantages = torch.tensor([1.5, -0.5, -0.5, -0.5], dtype=x.dtype)
    distances = ((x - centres) ** 2).sum(-1)
    logits = SHARPNESS * torch.exp(-distances / (2 * BUMP_WIDTH**2))
    return -(advantages * torch.softmax(logits, -1)).sum()


def hessian_field() -> np.ndarray:
    """The Hessian of J at every point of the grid, (N, N, 2, 2), by automatic differentiation."""
    axis = torch.arange(-HALF_WIDTH, HALF_WIDTH, SPACING, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    hessians = torch.func.vmap(torch.func.hessian(loss), chunk_size=10_000)(points)
    return hessians.reshape(len(axis), len(axis), 2, 2).numpy()


def smoothed(field: np.ndarray, sigma: float) -> np.ndarray:
    """The Hessian of J_sigma on the grid: each entry of that of J, averaged over the noise."""
    pixels = (sigma / SPACING, sigma / SPACING, 0.0, 0.0)
    spectrum = np.fft.fft2(field, axes=(0, 1))
    return np.fft.ifft2(fourier_gaussian(spectrum, pixels), axes=(0, 1)).real


def curvature(field: np.ndarray) -> np.ndarray:
    """(N, N, 2, 2) Hessians -> (N, N) spectral norms."""
    return np.abs(np.linalg.eigvalsh(field)).max(-1)


def bound(curvatures: np.ndarray, sigma: float, num_thresholds: int = 200) -> float:
    """The bound of the head of this file, least over thresholds b; `curvatures` are J's own."""
    beta = curvatures.max()
    if sigma == 0.0:
        return float(beta)
    thresholds = np.linspace(0.0, beta, num_thresholds)
    volumes = np.array([(curvatures > b).sum() for b in thresholds]) * SPACING**2
    mass = -np.expm1(-volumes / (2 * np.pi * sigma**2))
    return float((thresholds + (beta - thresholds) * mass).min())


def draw(rows: list[tuple[float, float, float]]) -> Figure:
    """Largest curvature and bound against sigma."""
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    sigmas, largest, bounds = zip(*rows, strict=True)
    axes.plot(sigmas, largest, "o-", color="C0", label="largest curvature of J_sigma")
    axes.plot(sigmas, bounds, "--", color="C1", label="bound of Theorem 2")
    axes.set(xlabel="sigma", ylabel="spectral norm of the Hessian", yscale="log")
    axes.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for theorem_2.png")
    out = parser.parse_args().out
    field = hessian_field()
    own = curvature(field)
    print("sigma  largest curvature    bound")
    rows = []
    for sigma in SIGMAS:
        rows.append((sigma, float(curvature(smoothed(field, sigma)).max()), bound(own, sigma)))
        print("{:5.2f} {:18.3f} {:8.3f}".format(*rows[-1]))
    out.mkdir(parents=True, exist_ok=True)
    draw(rows).savefig(out / "theorem_2.png", dpi=150)


if __name__ == "__main__":
    main()
