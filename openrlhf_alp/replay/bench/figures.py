"""The pictures of a replay: the envelope of the log-ratio (the paper's Figure 2), and the tails.

Letters: P bins of the rollout probability.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openrlhf_alp.objective.methods import METHODS
from openrlhf_alp.objective.metric_names import ENVELOPE_EDGES, NUM_ENVELOPE_BINS
from openrlhf_alp.replay.bench.update import MethodResult

_DPI = 150
_PANEL_INCHES = (4.2, 3.4)
_BLUE, _ORANGE = "#1f5fa8", "#c9621a"


def write_figures(results: Mapping[str, MethodResult], folder: Path) -> list[Path]:
    """Write `envelope.png` and `tails.png` into `folder`; returns their paths."""
    pictures = {
        folder / "envelope.png": envelope_figure(_to_compare(results)),
        folder / "tails.png": tails_figure(list(results.values())),
    }
    for path, figure in pictures.items():
        figure.savefig(path, dpi=_DPI)
    return list(pictures)


def envelope_figure(results: Sequence[MethodResult]) -> Figure:
    """P1 to P99 of the log-ratio by rollout probability, after the update (blue) and before it.

    One panel for each result: the paper's Figure 2, middle (Bypass) and right (ALP), shows the same
    with one update from the same checkpoint.
    """
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(results), height), layout="constrained")
    panels = list(figure.subplots(1, len(results), sharey=True, squeeze=False)[0])
    for axes, result in zip(panels, results, strict=True):
        _band(axes, result.before, color=_ORANGE, label="before")
        _band(axes, result.after, color=_BLUE, label="after the update")
        axes.axhline(0.0, color="0.6", linewidth=0.8, zorder=0)
        axes.set_title(result.method, fontsize="medium")
        axes.set_xlabel("rollout probability of the token")
        axes.set_xticks(range(NUM_ENVELOPE_BINS))
        axes.set_xticklabels([f"{low:g}" for low in ENVELOPE_EDGES[:-1]], fontsize="x-small")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("log-ratio learner / rollout, P1 to P99")
    panels[0].legend(fontsize="small", frameon=False)
    return figure


def tails_figure(results: Sequence[MethodResult]) -> Figure:
    """P1 to P99 of each method's log-ratio before and after its update, one row per method."""
    figure = Figure(figsize=(7.0, 1.2 + 0.28 * len(results)), layout="constrained")
    axes = figure.subplots()
    for row, result in enumerate(results):
        for figures, offset, color in (
            (result.before, -0.15, _ORANGE),
            (result.after, 0.15, _BLUE),
        ):
            low, high = figures["alp/log_ratio_p01"], figures["alp/log_ratio_p99"]
            axes.plot([low, high], [row + offset] * 2, color=color, linewidth=3)
    axes.axvline(0.0, color="0.6", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(results)))
    axes.set_yticklabels([result.method for result in results], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("log-ratio learner / rollout, P1 to P99: before (orange), after (blue)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _band(axes: Axes, figures: Mapping[str, float], *, color: str, label: str) -> None:
    # A bin without a token has no quantile, and 0 would look like one.
    at = [i for i in range(NUM_ENVELOPE_BINS) if figures[f"alp/envelope_{i}_share"] > 0]
    low, middle, high = (
        [figures[f"alp/envelope_{i}_{name}"] for i in at] for name in ("p01", "p50", "p99")
    )
    axes.fill_between(at, low, high, color=color, alpha=0.25, linewidth=0, label=label)
    axes.plot(at, middle, color=color, linewidth=1)


def _to_compare(results: Mapping[str, MethodResult]) -> list[MethodResult]:
    """The first two results that differ in the noise alone; without such a pair the first one."""
    for clean in results:
        for noisy in results:
            same = METHODS[clean].objective == METHODS[noisy].objective
            if same and METHODS[noisy].perturbed and not METHODS[clean].perturbed:
                return [results[clean], results[noisy]]
    return [next(iter(results.values()))]
