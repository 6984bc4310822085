"""The table: methods down, conditions across, one tab per measure, every number with its runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from openrlhf_alp.objective.methods import METHODS
from openrlhf_alp.report.compare.estimates import Interval, over_seeds, paired
from openrlhf_alp.report.compare.measures import MEASURES, Measure, finite
from openrlhf_alp.report.compare.runs import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One method under one condition."""

    of_runs: Sequence[tuple[int, float]]
    """Number of the run on the page, and its value; in the order of the seeds."""

    interval: Interval
    difference: Interval | None
    """Paired by seed, to the method that the row is compared with."""

    @property
    def verdict(self) -> str:
        """`more`, `less`, or `open` when the interval of the difference holds 0."""
        if self.difference is None or not self.difference.excludes_zero:
            return "open"
        return "more" if self.difference.mean > 0 else "less"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    method: str
    compared_with: str | None
    cells: Sequence[Cell | None]
    """In the order of the conditions; None where no run has the number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    measure: Measure
    conditions: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The runs of one method under one condition, with their numbers on the page."""

    method: str
    condition: str
    runs: Sequence[tuple[int, Run]]

    def by_seed(self, measure: Measure) -> dict[int, float]:
        """Seed to value, the mean of its runs; runs without a seed cannot be paired."""
        found: dict[int, list[float]] = {}
        for _, run in self.runs:
            value = finite(measure.of(run))
            if run.seed is not None and value is not None:
                found.setdefault(run.seed, []).append(value)
        return {seed: fmean(values) for seed, values in found.items()}

    def repeated(self) -> Iterator[str]:
        """A sentence for every seed of which there are several runs."""
        for seed in dict.fromkeys(run.seed for _, run in self.runs if run.seed is not None):
            names = [run.name for _, run in self.runs if run.seed == seed]
            if len(names) > 1:
                yield (
                    f"Seed {seed} of {', '.join(filter(None, (self.method, self.condition)))} has "
                    f"{len(names)} runs ({', '.join(names)}): an interval counts each as a seed of "
                    "its own and is too narrow, a difference takes their mean."
                )


def group(runs: Sequence[Run], conditions: Sequence[str]) -> list[Group]:
    """Runs by method, in the order of `--alp.method`, and by condition, in that of the runs."""
    found: dict[tuple[str, str], list[tuple[int, Run]]] = {}
    for number, (run, condition) in enumerate(zip(runs, conditions, strict=True)):
        found.setdefault((run.method, condition), []).append((number, run))
    order = {name: place for place, name in enumerate(METHODS)}
    places = {name: place for place, name in enumerate(dict.fromkeys(conditions))}
    return [
        Group(
            method=method,
            condition=condition,
            runs=sorted(members, key=lambda pair: (pair[1].seed is None, pair[1].seed or 0)),
        )
        for (method, condition), members in sorted(
            found.items(),
            key=lambda item: (order.get(item[0][0], len(order)), item[0][0], places[item[0][1]]),
        )
    ]


def compared_with(method: str, methods: Sequence[str], baseline: str | None) -> str | None:
    """What a row is compared with: the baseline that was asked for, else the method's own twin.

    The twin of `seq-alp` is `seq-bypass`: the same ratio and window without noise. Without it the
    first method of the table stands in.
    """
    if baseline is None:
        twin = method.replace("-alp-mis", "-alp").replace("-alp", "-bypass")
        baseline = twin if twin != method and twin in methods else methods[0]
    return None if baseline == method or baseline not in methods else baseline


def make_tables(groups: Sequence[Group], baseline: str | None = None) -> list[Table]:
    """A table for every measure that some run has."""
    methods = list(dict.fromkeys(one.method for one in groups))
    conditions = list(dict.fromkeys(one.condition for one in groups))
    by_key = {(one.method, one.condition): one for one in groups}
    tables = []
    for measure in MEASURES:
        rows = []
        for method in methods:
            other = compared_with(method, methods, baseline)
            cells = [_cell(measure, by_key, method, other, c) for c in conditions]
            rows.append(Row(method=method, compared_with=other, cells=cells))
        if any(cell for row in rows for cell in row.cells):
            tables.append(Table(measure=measure, conditions=conditions, rows=rows))
    return tables


def _cell(
    measure: Measure,
    groups: Mapping[tuple[str, str], Group],
    method: str,
    other: str | None,
    condition: str,
) -> Cell | None:
    ours = groups.get((method, condition))
    if ours is None:
        return None
    values = [(number, finite(measure.of(run))) for number, run in ours.runs]
    of_runs = [(number, value) for number, value in values if value is not None]
    interval = over_seeds([value for _, value in of_runs])
    if interval is None:
        return None
    theirs = groups.get((other, condition)) if other else None
    difference = paired(ours.by_seed(measure), theirs.by_seed(measure)) if theirs else None
    return Cell(of_runs=of_runs, interval=interval, difference=difference)
