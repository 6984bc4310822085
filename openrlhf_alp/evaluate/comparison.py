"""Is run B better than run A? A paired bootstrap over problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy

from openrlhf_alp.evaluate.folder import FolderError, RunFolder
from openrlhf_alp.evaluate.numbers import LEVEL
from openrlhf_alp.evaluate.results import markdown_table

NUM_DRAWS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """B minus A, in the mean over suites of the mean over problems."""

    value: float
    low: float
    high: float
    p_value: float
    """Two-sided: how often draws of a centred difference are at least as far from zero."""

    num_problems: int


def paired_difference(
    suites: Sequence[tuple[Mapping[str, float], Mapping[str, float]]], *, seed: int = 0
) -> Difference:
    """Bootstraps the difference of two runs on the same problems.

    Problems are drawn with replacement within each suite, and a drawn problem brings the share of
    right answers of both runs: what makes a problem hard cancels.

    Args:
        suites: of each suite the shares of run A and of run B, by problem id.

    Raises:
        ValueError: the runs do not have the same problems, or none.
    """
    if not suites or not all(first for first, _ in suites):
        raise ValueError("there is no problem to compare on")
    generator = numpy.random.default_rng(seed)
    observed, draws = 0.0, numpy.zeros(NUM_DRAWS)
    for first, second in suites:
        if first.keys() != second.keys():
            alone = sorted(first.keys() ^ second.keys())
            raise ValueError(f"the runs do not have the same problems: {alone[:5]} are in one only")
        change = numpy.array([second[name] - first[name] for name in first])
        observed += change.mean() / len(suites)
        draws += _drawn_means(change, generator) / len(suites)
    low, high = (numpy.quantile(draws, 0.5 + side * LEVEL / 2) for side in (-1, 1))
    # Plus one: a bootstrap of so many draws cannot say that a chance is zero.
    extreme = int((numpy.abs(draws - observed) >= abs(observed) - 1e-12).sum())
    return Difference(
        value=float(observed),
        low=float(low),
        high=float(high),
        p_value=(extreme + 1) / (NUM_DRAWS + 1),
        num_problems=sum(len(first) for first, _ in suites),
    )


def _drawn_means(change: numpy.ndarray, generator: numpy.random.Generator) -> numpy.ndarray:
    """Means (NUM_DRAWS,) of problems drawn with replacement."""
    # Counts of each problem instead of its indices: less memory for the same draw.
    num = len(change)
    chances = numpy.full(num, 1 / num)
    means = numpy.empty(NUM_DRAWS)
    for start in range(0, NUM_DRAWS, 1000):
        counts = generator.multinomial(num, chances, size=min(1000, NUM_DRAWS - start))
        means[start : start + len(counts)] = counts @ change / num
    return means


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """The difference of run B over run A, by suite and in the mean over suites.

    Raises:
        FolderError: a run is not finished, the runs share no suite, or a suite's problems differ.
    """
    runs = [RunFolder(path) for path in (first, second)]
    results = [run.results() for run in runs]
    by_name = [{suite["suite"]: suite for suite in result["suites"]} for result in results]
    shared = [name for name in by_name[0] if name in by_name[1]]
    if not shared:
        raise FolderError(
            f"{first} evaluates {', '.join(by_name[0])}, {second} {', '.join(by_name[1])}: no "
            "suite is in both. Fix: evaluate both on the same suites"
        )
    for name in shared:
        a, b = (suites[name]["problems_digest"] for suites in by_name)
        if a != b:
            raise FolderError(
                f"{name}: the two runs were asked or graded on different problems or labels "
                f"({a[:12]} and {b[:12]}), so they cannot be paired. Fix: evaluate both from the "
                "same file, without different --limit"
            )
    pairs = [
        (_shares(runs[0], results[0], name), _shares(runs[1], results[1], name)) for name in shared
    ]
    return {
        "first": {"path": str(first), "model": results[0]["model"], "n": results[0]["n"]},
        "second": {"path": str(second), "model": results[1]["model"], "n": results[1]["n"]},
        "only_in_one": sorted(by_name[0].keys() ^ by_name[1].keys()),
        "asked_differently": _differing(*(result["plan"] for result in results)),
        "suites": {
            name: {
                "title": by_name[0][name]["title"],
                "first": by_name[0][name]["avg"]["value"],
                "second": by_name[1][name]["avg"]["value"],
                **asdict(paired_difference([pair])),
            }
            for name, pair in zip(shared, pairs, strict=True)
        },
        "average": asdict(paired_difference(pairs)),
    }


def _shares(run: RunFolder, results: Mapping[str, Any], name: str) -> dict[str, float]:
    (suite,) = (suite for suite in results["suites"] if suite["suite"] == name)
    return run.shares(name, num_problems=suite["num_problems"], n=results["n"])


def _differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Sampling, template and tools that are not the same in both runs."""
    names = sorted(first.keys() | second.keys())
    pairs = {name: [first.get(name), second.get(name)] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def comparison_markdown(compared: dict[str, Any]) -> str:
    """The comparison as a table, in percent and percentage points."""
    first, second = compared["first"], compared["second"]
    lines = [
        f"A: {first['model']} ({first['path']}), {first['n']} answers per problem",
        "",
        f"B: {second['model']} ({second['path']}), {second['n']} answers per problem",
        "",
    ]
    rows = []
    for suite in compared["suites"].values():
        values = [f"{100 * suite[run]:.1f}" for run in ("first", "second")]
        rows.append([suite["title"], str(suite["num_problems"]), *values, *_changes(suite)])
    if len(compared["suites"]) > 1:
        average = compared["average"]
        rows.append(["Average", str(average["num_problems"]), "", "", *_changes(average)])
    head = ["suite", "problems", "A, %", "B, %", "B - A, points", "95 % interval", "p"]
    lines.append(markdown_table(head, rows))
    if compared["only_in_one"]:
        lines += ["", f"Only in one of the runs: {', '.join(compared['only_in_one'])}."]
    if compared["asked_differently"]:
        pairs = [f"{name} {a} and {b}" for name, (a, b) in compared["asked_differently"].items()]
        lines += ["", f"The difference is not of the weights alone: {'; '.join(pairs)}."]
    for suite in compared["suites"].values():
        if suite["low"] == suite["high"]:
            lines += [
                "",
                f"{suite['title']}: the difference is the same on every problem, so the bootstrap "
                "sees no spread and the interval says nothing.",
            ]
    return "\n".join(lines) + "\n"


def _changes(found: dict[str, Any]) -> list[str]:
    low, high = 100 * found["low"], 100 * found["high"]
    value = f"{100 * found['value']:+.1f}"
    return [value, f"[{low:+.1f}, {high:+.1f}]", f"{found['p_value']:.4f}"]
