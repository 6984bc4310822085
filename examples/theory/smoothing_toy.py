"""The claim of the paper's Figure 2 (left) in one dimension: noise smooths a sharp optimum away.

The loss is a wide well with a narrow, deeper one beside it. Both are Gaussian, so the loss under
noise of standard deviation sigma is known in closed form. The paper's text does not give the
function of its own toy (our copy carries neither formulas nor captions), so this is another
function with the same claim: the perturbed objective J_sigma(x) = E J(x + delta), as in section
2.3, loses the narrow well and keeps the wide one.

    python examples/theory/smoothing_toy.py [--out DIR]
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

SIGMAS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
GRID = np.linspace(-3.0, 3.0, 6001)
"""Where minima are searched; the spacing of 0.001 resolves the narrow well 30 times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Well:
    """The loss -depth * exp(-(x - centre)^2 / (2 width^2))."""

    centre: float
    width: float
    depth: float


WIDE = Well(centre=0.0, width=0.8, depth=1.0)
NARROW = Well(centre=1.2, width=0.03, depth=1.5)
WELLS = (WIDE, NARROW)


def smoothed_loss(x: np.ndarray, sigma: float) -> np.ndarray:
    """E J(x + delta), delta ~ N(0, sigma^2), in closed form; sigma 0 is J. (N,) -> (N,) float64.

    A Gaussian well stays one: its variance grows by sigma^2 and its area stays the same.
    """
    total = np.zeros_like(x)
    for well in WELLS:
        variance = well.width**2 + sigma**2
        depth = well.depth * well.width / np.sqrt(variance)
        total -= depth * np.exp(-((x - well.centre) ** 2) / (2 * variance))
    return total


def smoothed_curvature(x: np.ndarray, sigma: float) -> np.ndarray:
    """The second derivative of `smoothed_loss` with respect to x, in closed form."""
    total = np.zeros_like(x)
    for well in WELLS:
        variance = well.width**2 + sigma**2
        depth = well.depth * well.width / np.sqrt(variance)
        distance = (x - well.centre) ** 2
        total += depth * (1 - distance / variance) / variance * np.exp(-distance / (2 * variance))
    return total


def global_minimum(sigma: float) -> float:
    """The point of `GRID` at which the smoothed loss is least."""
    return float(GRID[smoothed_loss(GRID, sigma).argmin()])


def draw() -> Figure:
    """The smoothed loss for a few sigmas, with the global minimum of each."""
    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.subplots()
    for sigma, colour in zip((0.0, 0.05, 0.2, 0.5), ("0.6", "C1", "C0", "C2"), strict=True):
        axes.plot(GRID, smoothed_loss(GRID, sigma), color=colour, label=f"sigma = {sigma:g}")
        at = np.array([global_minimum(sigma)])
        axes.plot(at, smoothed_loss(at, sigma), "o", color=colour)
    axes.set_xlabel("x")
    axes.set_ylabel("loss under noise (dot: global minimum)")
    axes.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for smoothing_toy.png")
    out = parser.parse_args().out
    print(f"{'sigma':>6} {'global minimum':>15} {'curvature there':>16} {'largest curvature':>18}")
    for sigma in SIGMAS:
        at = global_minimum(sigma)
        there = smoothed_curvature(np.array([at]), sigma)[0]
        largest = np.abs(smoothed_curvature(GRID, sigma)).max()
        print(f"{sigma:6.2f} {at:15.3f} {there:16.2f} {largest:18.2f}")
    out.mkdir(parents=True, exist_ok=True)
    draw().savefig(out / "smoothing_toy.png", dpi=150)


if __name__ == "__main__":
    main()
