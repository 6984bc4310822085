"""The two plots of a run folder: reward per step, and the band of log-ratios per step."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from openrlhf_alp.report.metrics import LOG_RATIO_QUANTILES, REWARD, StepMetrics

_SIZE_INCHES = (7.0, 4.0)
_DPI = 150
_BLUE = "#1f5fa8"


def reward_figure(steps: Sequence[StepMetrics], *, title: str) -> Figure:
    """Mean reward of the sampled answers, one point per step."""
    logged = [step for step in steps if REWARD in step.values]
    at, rewards = [step.step for step in logged], [step.values[REWARD] for step in logged]
    figure, axes = _new_figure(title)
    axes.plot(at, rewards, marker="o", markersize=3.5, color=_BLUE)
    axes.set_ylabel("mean reward of the step")
    # A little more than [0, 1], so that points at the edges are drawn whole.
    axes.set_ylim(-0.03, 1.03)
    return figure


def log_ratio_figure(steps: Sequence[StepMetrics], *, title: str) -> Figure:
    """Quantiles 1, 25, 50, 75 and 99 % of the tokens' log-ratio, one value of each per step.

    The ratio is the learner's probability of a sampled token, perturbed while ALP is on, over the
    probability that the rollout engine sampled it with. ALP should keep the outer band narrow.
    """
    names = LOG_RATIO_QUANTILES
    # A step without training has no ratios, and a gap in one band only would mislead.
    logged = [step for step in steps if set(names.values()) <= step.values.keys()]
    at = [step.step for step in logged]
    quantile = {percent: [step.values[name] for step in logged] for percent, name in names.items()}
    figure, axes = _new_figure(title)
    axes.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
    for low, high, alpha in ((1, 99, 0.18), (25, 75, 0.4)):
        lower, upper = quantile[low], quantile[high]
        band = axes.fill_between(at, lower, upper, color=_BLUE, alpha=alpha, linewidth=0)
        band.set_label(f"P{low} to P{high}")
    axes.plot(at, quantile[50], color=_BLUE, label="median (P50)")
    axes.set_ylabel("log-ratio learner / rollout, per token")
    axes.legend(loc="best", fontsize="small", frameon=False)
    return figure


def write_plots(steps: Sequence[StepMetrics], folder: Path, *, title: str) -> list[Path]:
    """Writes `reward.png` and `log_ratio.png` into `folder` and returns their paths."""
    figures = {
        folder / "reward.png": reward_figure(steps, title=title),
        folder / "log_ratio.png": log_ratio_figure(steps, title=title),
    }
    for path, figure in figures.items():
        figure.savefig(path, dpi=_DPI)
    return list(figures)


def _new_figure(title: str) -> tuple[Figure, Axes]:
    # Without pyplot: it keeps global state, may want a display and is not safe in threads.
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("training step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
