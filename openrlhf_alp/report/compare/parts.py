"""The charts that are no curves over steps: sigma, time, tools, evaluation."""

import re
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from openrlhf_alp.report.compare.charts import Bars, Chart, Heat, Line, Panel, Points
from openrlhf_alp.report.compare.curves import by_condition, mean_of
from openrlhf_alp.report.compare.runs import AFTER, BEFORE, Run
from openrlhf_alp.report.compare.table import Group
from openrlhf_alp.report.visible import visible

_SIGMA = re.compile(r"alp/layer_(\d+)_sigma")
_TIMES = {
    "timing/generation": "generation",
    "timing/make_experience": "experience",
    "timing/ppo_train": "update",
    "timing/broadcast": "weight push",
}
_STATUS = "tir/status_"


def part_charts(groups: Sequence[Group]) -> Iterator[Chart]:
    """Those that some run has the numbers for."""
    charts = (
        _sigma(groups),
        _time(groups),
        _tools(groups),
        _evaluation(groups),
        _evaluation_by_step(groups),
        _pass_at_k(groups),
    )
    return (chart for chart in charts if not all(panel.is_empty for panel in chart.panels))


def label_of(one: Group, run: Run | None = None) -> str:
    """The name of a group, or of one of its runs, where it stands alone."""
    seed = "" if run is None or run.seed is None else f"seed {run.seed}"
    return ", ".join(part for part in (one.method, one.condition, seed) if part)


def _sigma(groups: Sequence[Group]) -> Chart:
    panels = []
    for one in groups:
        for _, run in one.runs[:1]:
            if heat := _heat(run):
                panels.append(Panel(title=label_of(one, run), heat=heat))
    return Chart(
        key="sigma",
        title="Sigma per layer",
        caption="Change of a layer's median sigma since the first measured step, in per cent, for "
        "the first seed of each method. Red: the noise has grown.",
        y_title="layer",
        panels=panels,
    )


def _heat(run: Run) -> Heat | None:
    rows: dict[int, dict[int, float]] = {}
    for step in run.steps:
        for name, value in step.values.items():
            if found := _SIGMA.fullmatch(name):
                rows.setdefault(int(found[1]), {})[step.step] = value
    at = sorted({step for row in rows.values() for step in row})
    if len(at) < 2:
        return None
    z: list[list[float | None]] = []
    for layer in sorted(rows):
        first = rows[layer].get(at[0])
        change = [rows[layer].get(step) for step in at]
        z.append([100 * (v / first - 1) if v is not None and first else None for v in change])
    return Heat(x=at, y=sorted(rows), z=z)


def _time(groups: Sequence[Group]) -> Chart:
    return Chart(
        key="time",
        title="Where a step's time goes",
        caption="Mean seconds of a step, without the first one, which also compiles and measures. "
        "In an asynchronous run generation overlaps with the update.",
        x_title="seconds of a step",
        panels=[Panel(bars=_bars(groups, _TIMES))],
    )


def _tools(groups: Sequence[Group]) -> Chart:
    names = {
        name: visible(name.removeprefix(_STATUS))
        for one in groups
        for _, run in one.runs
        for step in run.steps
        for name in step.values
        if name.startswith(_STATUS)
    }
    return Chart(
        key="tools",
        title="How tool calls end",
        caption="Mean number of tool calls of an episode, by status.",
        x_title="calls of an episode",
        panels=[Panel(bars=_bars(groups, names))],
    )


def _bars(groups: Sequence[Group], names: dict[str, str]) -> Bars | None:
    rows = []
    for one in groups:
        means = [_mean(one, name) for name in names]
        if any(means):
            rows.append((label_of(one), means))
    if not rows:
        return None
    pieces = [
        (title, [means[place] for _, means in rows])
        for place, title in enumerate(names.values())
        if any(means[place] for _, means in rows)
    ]
    return Bars(labels=[label for label, _ in rows], pieces=pieces)


def _mean(one: Group, name: str) -> float:
    values = [value for _, run in one.runs for value in list(run.values(name).values())[1:]]
    return fmean(values) if values else 0.0


def _evaluation(groups: Sequence[Group]) -> Chart:
    panels = []
    for suite, title in _suites(groups).items():
        labels, values = [], []
        for one, run, when in _edges(groups):
            if found := _suite(run, when, suite):
                labels.append(f"{label_of(one, run)}, {when}")
                values.append((found["avg"]["value"], found["avg"]["low"], found["avg"]["high"]))
        panels.append(Panel(title=title, points=Points(labels=labels, values=values)))
    return Chart(
        key="evaluation",
        title="Evaluation",
        caption="avg@n before and after training with its 95 % interval, clustered by problem "
        "(docs/evaluation.md).",
        x_title="avg@n",
        panels=panels,
    )


def _evaluation_by_step(groups: Sequence[Group]) -> Chart:
    panels = []
    for suite, title in _suites(groups).items():
        for condition, members in by_condition(groups):
            lines = [mean_of(_averages(one, suite), one.method) for one in members]
            kept = [line for line in lines if line is not None and len(line.x) > 2]
            name = ", ".join(part for part in (title, condition) if part)
            panels.append(Panel(title=name, lines=kept))
    return Chart(
        key="evaluation-steps",
        title="Evaluation during training",
        caption="avg@n at the evaluated steps, before training at 0; mean over seeds with the 95 % "
        "t interval.",
        y_title="avg@n",
        panels=panels,
    )


def _averages(one: Group, suite: str) -> list[dict[int, float]]:
    """Step to avg@n of each run that was evaluated."""
    found = [
        {
            run.evaluated_at(when): result["avg"]["value"]
            for when in run.evaluations
            if (result := _suite(run, when, suite))
        }
        for _, run in one.runs
    ]
    return [values for values in found if values]


def _edges(groups: Sequence[Group]) -> Iterator[tuple[Group, Run, str]]:
    """Every run before training, and after it."""
    for one in groups:
        for when in (BEFORE, AFTER):
            for _, run in one.runs:
                yield one, run, when


def _pass_at_k(groups: Sequence[Group]) -> Chart:
    panels = []
    for suite, title in _suites(groups).items():
        lines = []
        for one in groups:
            for when in (BEFORE, AFTER):
                for _, run in one.runs[:1]:
                    if found := _suite(run, when, suite):
                        curve = sorted(found["pass_at"].items())
                        lines.append(
                            Line(
                                name=one.method,
                                x=[k for k, _ in curve],
                                y=[e["value"] for _, e in curve],
                                low=[e["low"] for _, e in curve],
                                high=[e["high"] for _, e in curve],
                                style="dash" if when == BEFORE else "solid",
                            )
                        )
        panels.append(Panel(title=title, lines=lines))
    return Chart(
        key="pass-at-k",
        title="pass@k",
        caption="Chance that k of the n answers hold a right one, for the first seed of each "
        "method. Dashed: before training. Bands: 95 % intervals over problems.",
        x_title="k",
        y_title="pass@k",
        panels=panels,
        paper="Figure 5",
    )


def _suites(groups: Sequence[Group]) -> dict[str, str]:
    """Name and title of every problem set that some run was evaluated on."""
    return {
        suite["suite"]: visible(suite["title"])
        for one in groups
        for _, run in one.runs
        for results in run.evaluations.values()
        for suite in results.get("suites", [])
    }


def _suite(run: Run, when: str, name: str) -> dict[str, Any] | None:
    for suite in run.evaluations.get(when, {}).get("suites", []):
        if suite["suite"] == name:
            return dict(suite)
    return None
