"""From runs to charts. A panel per condition, a curve per method: the mean over its seeds, with the
t interval as a band. A chart that no run has the numbers for is not made.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from openrlhf_alp.objective.metric_names import (
    ENVELOPE_EDGES,
    ENVELOPE_PREFIX,
    NUM_ENVELOPE_BINS,
)
from openrlhf_alp.report.compare.charts import Chart, Line, Panel
from openrlhf_alp.report.compare.estimates import over_seeds
from openrlhf_alp.report.compare.measures import KL, TAIL_HIGH, TAIL_LOW
from openrlhf_alp.report.compare.runs import Run
from openrlhf_alp.report.compare.table import Group
from openrlhf_alp.report.metrics import LOG_RATIO_QUANTILES, REWARD

_MAX_COLUMNS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Curves:
    """A chart whose panels have one metric each: a row of panels per name in `rows`."""

    key: str
    title: str
    caption: str
    y_title: str
    rows: Mapping[str, Sequence[str]]
    """Name of the row ("" when there is one) to the metric, older names of it last."""

    paper: str = ""
    log_y: bool = False


_REWARD = _Curves(
    key="reward",
    title="Reward",
    caption="Mean reward of a step's samples. Curves are means over seeds; bands are 95 % t "
    "intervals, cut off at the frame.",
    y_title="mean reward",
    rows={"": (REWARD,)},
)
_OTHERS = (
    _Curves(
        key="kl",
        title="KL of rollout and learner",
        caption="k3 KL(rollout || learner without noise) after the update, the same quantity for "
        "all methods.",
        y_title="nats per token",
        rows={"": KL},
        paper="Figures 3 and 4",
        log_y=True,
    ),
    _Curves(
        key="split",
        title="Where the ratio comes from",
        caption="Root mean square of the three parts of the log-ratio of fresh samples: learner "
        "with noise over without, learner after the step's updates over before, learner before "
        "them over the rollout engine. The three log-ratios of a token add up.",
        y_title="rms log-ratio, nats",
        rows={
            "noise": ("alp/lag_0_perturbation_rms",),
            "updates": ("alp/lag_0_staleness_rms",),
            "engine": ("alp/lag_0_mismatch_rms",),
        },
    ),
    _Curves(
        key="ess",
        title="Effective sample size",
        caption="Effective sample size of the ratios over their number: 1 when all weigh the same.",
        y_title="ESS / number",
        rows={"token": ("alp/token_ess",), "sequence": ("alp/sequence_ess",)},
    ),
    _Curves(
        key="entropy",
        title="Entropy",
        caption="Mean entropy of the learner without noise at the action tokens.",
        y_title="nats per token",
        rows={"": ("alp/entropy",)},
        paper="Figures 3 and 4",
    ),
    _Curves(
        key="gradient",
        title="Gradient norm",
        caption="Norm of the gradient of the weights at the step's last optimizer step, before it "
        "is cut.",
        y_title="norm",
        rows={"": ("alp/weight_grad_norm", "actor_grad_norm")},
        paper="Figure 3",
        log_y=True,
    ),
    _Curves(
        key="cuts",
        title="What the loss leaves out",
        caption="Share of action tokens whose gradient a clip window cut, and that a mask left "
        "out.",
        y_title="share of action tokens",
        rows={"clipped": ("alp/clip_fraction",), "masked": ("alp/mask_fraction",)},
    ),
)


def curve_charts(groups: Sequence[Group]) -> Iterator[Chart]:
    """Every chart with a training step on its x axis, then the envelope."""
    charts = (
        _chart(groups, _REWARD),
        _ratio_bands(groups),
        *(_chart(groups, curves) for curves in _OTHERS),
        _envelope(groups),
    )
    return (chart for chart in charts if not all(panel.is_empty for panel in chart.panels))


def mean_line(runs: Sequence[Run], name: str, *metrics: str) -> Line | None:
    """Mean over seeds at each step, with its band; None where no run has the metric."""
    return mean_of([values for run in runs if (values := run.values(*metrics))], name)


def mean_of(found: Sequence[Mapping[int, float]], name: str) -> Line | None:
    """The same of values by step, one mapping per seed."""
    at = sorted({step for values in found for step in values})
    if not at:
        return None
    bands = [over_seeds([values[step] for values in found if step in values]) for step in at]
    kept = [(step, band) for step, band in zip(at, bands, strict=True) if band is not None]
    has_band = any(band.low is not None for _, band in kept)
    return Line(
        name=name,
        x=[step for step, _ in kept],
        y=[band.mean for _, band in kept],
        low=[band.mean if band.low is None else band.low for _, band in kept] if has_band else None,
        high=[band.mean if band.high is None else band.high for _, band in kept]
        if has_band
        else None,
    )


def by_condition(groups: Sequence[Group]) -> Iterator[tuple[str, list[Group]]]:
    """Conditions in the order of the table, each with its methods in theirs."""
    order = list(dict.fromkeys(one.condition for one in groups))
    ordered = sorted(groups, key=lambda one: order.index(one.condition))
    for condition, members in groupby(ordered, key=lambda one: one.condition):
        yield condition, list(members)


def _panels(
    groups: Sequence[Group], lines_of: Callable[[Group], Sequence[Line]], row: str = ""
) -> list[Panel]:
    panels = []
    for condition, members in by_condition(groups):
        lines = [line for one in members for line in lines_of(one)]
        title = ", ".join(part for part in (row, condition) if part)
        panels.append(Panel(title=title, lines=lines))
    return panels


def _runs(one: Group) -> list[Run]:
    return [run for _, run in one.runs]


def _lines(*metrics: str) -> Callable[[Group], list[Line]]:
    def of(one: Group) -> list[Line]:
        line = mean_line(_runs(one), one.method, *metrics)
        return [line] if line else []

    return of


def _chart(groups: Sequence[Group], curves: _Curves) -> Chart:
    panels = [
        panel
        for name, metrics in curves.rows.items()
        for panel in _panels(groups, _lines(*metrics), name)
        if not panel.is_empty
    ]
    # Rows stand below each other only when every condition has its column.
    conditions = len({one.condition for one in groups})
    return Chart(
        key=curves.key,
        title=curves.title,
        caption=curves.caption,
        y_title=curves.y_title,
        panels=panels,
        paper=curves.paper,
        log_y=curves.log_y,
        num_columns=min(conditions, _MAX_COLUMNS) if conditions > 1 and len(curves.rows) > 1 else 3,
    )


def _ratio_bands(groups: Sequence[Group]) -> Chart:
    def of(one: Group) -> list[Line]:
        runs, quantiles = _runs(one), LOG_RATIO_QUANTILES
        median = mean_line(runs, one.method, quantiles[50])
        low, high = (mean_line(runs, one.method, quantiles[percent]) for percent in (1, 99))
        if not (median and low and high and len(low.y) == len(high.y) == len(median.y)):
            return []
        band = Line(name=one.method, x=median.x, y=median.y, low=low.y, high=high.y)
        tails = [mean_line(runs, one.method, name) for name in (TAIL_LOW, TAIL_HIGH)]
        dotted = [Line(name=t.name, x=t.x, y=t.y, style="dot") for t in tails if t]
        return [band, *dotted]

    return Chart(
        key="log-ratio",
        title="Log-ratio of a token",
        caption="Learner as it is trained (with its noise) over the rollout engine. Line: median. "
        "Band: quantiles 1 % to 99 %. Dotted: 0.1 % and 99.9 %, the tail that grows before a run "
        "breaks. Each is a mean over seeds.",
        y_title="log-ratio, nats",
        panels=_panels(groups, of),
        paper="Figure 1 (right)",
    )


def _envelope(groups: Sequence[Group]) -> Chart:
    middles = [float(index) for index in range(NUM_ENVELOPE_BINS)]
    extremes: list[float] = []

    def of(one: Group) -> list[Line]:
        found = [values for run in _runs(one) if (values := _last_envelope(run))]
        extremes.extend(value for values in found for part in values for value in part)
        if not found:
            return []
        low, median, high = (
            [sum(values[part][i] for values in found) / len(found) for i in range(len(middles))]
            for part in range(3)
        )
        return [Line(name=one.method, x=middles, y=median, low=low, high=high)]

    panels = _panels(groups, of)
    return Chart(
        key="envelope",
        title="Log-ratio by rollout probability",
        caption="Quantiles 1 %, 50 % and 99 % of the log-ratio of tokens by the probability that "
        "the engine gave them, at the last measured step; mean over seeds. The rare tokens on the "
        "left make the tail.",
        x_title="rollout probability of the token",
        y_title="log-ratio, nats",
        panels=panels,
        y_limits=(1.1 * min(extremes), 1.1 * max(extremes)) if extremes else None,
        paper="Figure 2 (middle and right)",
        ticks=[
            (float(i), f"{low:g}-{high:g}")
            for i, (low, high) in enumerate(pairwise(ENVELOPE_EDGES))
        ],
    )


def _last_envelope(run: Run) -> list[list[float]]:
    """P1, P50 and P99 of every bin at the last step that has all of them."""
    names = [
        [f"{ENVELOPE_PREFIX}{index}_{part}" for index in range(NUM_ENVELOPE_BINS)]
        for part in ("p01", "p50", "p99")
    ]
    for step in reversed(run.steps):
        if all(name in step.values for part in names for name in part):
            return [[step.values[name] for name in part] for part in names]
    return []
