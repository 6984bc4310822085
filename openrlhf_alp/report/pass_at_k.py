"""Curves of pass@k over k, one per problem set, with their 95 % bands."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

_SIZE_INCHES = (7.0, 4.5)
_DPI = 150


def pass_at_k_figure(results: Mapping[str, Any]) -> Figure:
    """The figure of one run.

    Args:
        results: the content of a run's results.json.
    """
    # Without pyplot: it keeps global state, may want a display and is not safe in threads.
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    for suite in results["suites"]:
        curve = sorted((int(k), estimate) for k, estimate in suite["pass_at"].items())
        at = [k for k, _ in curve]
        (line,) = axes.plot(
            at, [one["value"] for _, one in curve], marker="o", markersize=3.5, label=suite["title"]
        )
        low, high = ([one[edge] for _, one in curve] for edge in ("low", "high"))
        axes.fill_between(at, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    # The scale's own ticks read 1.0 and 2.0, and there may be some between two k.
    ks = sorted({int(k) for suite in results["suites"] for k in suite["pass_at"]})
    axes.set_xticks(ks, labels=[str(k) for k in ks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("k answers per problem")
    axes.set_ylabel("pass@k")
    axes.set_ylim(-0.03, 1.03)
    axes.set_title(f"{results['model']}, {results['n']} answers per problem", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", fontsize="small", frameon=False)
    return figure


def write_pass_at_k(results: Mapping[str, Any], path: Path) -> Path:
    """Draws the figure into a PNG file and returns its path."""
    pass_at_k_figure(results).savefig(path, dpi=_DPI)
    return path
