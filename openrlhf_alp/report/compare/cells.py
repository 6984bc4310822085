"""What the report's tables show, as HTML and as Markdown."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from openrlhf_alp.evaluate.results import markdown_table
from openrlhf_alp.report.compare.measures import Measure
from openrlhf_alp.report.compare.runs import Run
from openrlhf_alp.report.compare.table import Cell, Row, Table
from openrlhf_alp.report.html.render import macros
from openrlhf_alp.report.html.tables import table_html

_RUN_COLUMNS = ("run", "method", "condition", "seed", "steps", "state", "digest", "commit")


def matrix_html(table: Table, runs: Sequence[Run], colors: Mapping[str, str]) -> Markup:
    """Methods down, conditions across; each number links to its run in `runs_html`."""
    cells = macros("cells.html", number=number, signed=signed, tone=tone)
    head = ["method", *_labels(table)]
    rows = [
        [
            cells.method(row.method, colors[row.method]),
            *(cell and cells.of_method(cell, row, table.measure, runs) for cell in row.cells),
        ]
        for row in table.rows
    ]
    columns = {f"{table.measure.key}-{at}": label for at, label in enumerate(head)}
    return table_html(columns, rows, missing="no such run or number")


def runs_html(runs: Sequence[Run], under: Sequence[str], links: Sequence[str]) -> Markup:
    """Every run with its number, a link to its folder, and what it was made of."""
    cells = macros("cells.html")
    rows = [
        [
            number,
            cells.run(run.name, number, link),
            *_facts(run, condition),
            cells.state(run.state),
            cells.mono(run.digest),
            cells.commit(run),
        ]
        for number, (run, condition, link) in enumerate(zip(runs, under, links, strict=True))
    ]
    return table_html({"of-number": "", **{f"of-{name}": name for name in _RUN_COLUMNS}}, rows)


def matrix_markdown(table: Table, runs: Sequence[Run]) -> str:
    """`matrix_html` without the single seeds."""
    digits = table.measure.digits
    rows = [
        [row.method, *(_text(cell, row, digits, runs) for cell in row.cells)] for row in table.rows
    ]
    return markdown_table(["method", *_labels(table)], rows)


def runs_markdown(runs: Sequence[Run], under: Sequence[str]) -> str:
    """`runs_html` without links."""
    rows = [
        [run.name, *_facts(run, condition), run.state, run.digest, run.commit[:12]]
        for run, condition in zip(runs, under, strict=True)
    ]
    return markdown_table(_RUN_COLUMNS, rows)


def number(value: float, digits: int) -> str:
    """With `digits` decimals, or as a power of ten where these would show zeros only."""
    return f"{value:.1e}" if 0 < abs(value) < 10**-digits else f"{value:.{digits}f}"


def signed(value: float, digits: int) -> str:
    """The same with a sign."""
    return f"{'+' if value >= 0 else ''}{number(value, digits)}"


def tone(cell: Cell, measure: Measure) -> str:
    """Class of a difference with a sign: `good`, `bad`, or `told` where neither is better."""
    if cell.verdict == "open":
        return ""
    if not measure.better:
        return "told"
    return "good" if (cell.verdict == "more") == (measure.better > 0) else "bad"


def _labels(table: Table) -> list[str]:
    return [condition or "all runs" for condition in table.conditions]


def _facts(run: Run, condition: str) -> tuple[str, str, str, str]:
    return run.method, condition, "" if run.seed is None else str(run.seed), str(len(run.steps))


def _text(cell: Cell | None, row: Row, digits: int, runs: Sequence[Run]) -> str:
    if cell is None:
        return ""
    text, half = number(cell.interval.mean, digits), cell.interval.half
    if half is not None:
        text += f" ± {number(half, digits)}"
    if any(runs[at].notes for at, _ in cell.of_runs):
        text += "*"
    change = cell.difference
    if change is None:
        return text
    shown = signed(change.mean, digits)
    if change.low is not None and change.high is not None:
        shown += f" [{signed(change.low, digits)}, {signed(change.high, digits)}]"
    bold = "" if cell.verdict == "open" else "**"
    return f"{text}; {bold}{shown}{bold} ({row.compared_with})"
