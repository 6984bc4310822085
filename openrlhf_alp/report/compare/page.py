"""The page of `openrlhf-alp report`: one file that opens from disk, pictures and tables beside."""

import os
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from plotly.offline import get_plotlyjs

from openrlhf_alp.report.compare.cells import (
    matrix_html,
    matrix_markdown,
    runs_html,
    runs_markdown,
)
from openrlhf_alp.report.compare.charts import colors_of
from openrlhf_alp.report.compare.curves import curve_charts
from openrlhf_alp.report.compare.interactive import plotly_figure
from openrlhf_alp.report.compare.parts import part_charts
from openrlhf_alp.report.compare.pictures import write_pictures
from openrlhf_alp.report.compare.runs import Run, conditions, notes_of, read_runs
from openrlhf_alp.report.compare.table import Group, group, make_tables
from openrlhf_alp.report.html.render import packed, render, script_json

PAGE, FIGURES, TABLES = "index.html", "figures", "tables.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What a report is made of."""

    page: Path
    tables: Path
    """The same tables in Markdown."""

    pictures: Sequence[Path]
    num_runs: int
    notes: Sequence[str]


def write_report(
    paths: Sequence[Path],
    out: Path,
    *,
    baseline: str | None = None,
    on_stage: Callable[[str], None] = lambda line: None,
) -> Written:
    """Writes `index.html`, `tables.md` and `figures/` into `out`.

    Args:
        paths: run folders, or folders of them.
        baseline: method that every row is compared with; None: each with its twin without noise.

    Raises:
        NoRunsError: a path has no run.
        OSError: `out` cannot be written.
    """
    on_stage("reading runs")
    runs = read_runs(paths)
    under = conditions(runs)
    groups = group(runs, under)
    charts = [*curve_charts(groups), *part_charts(groups)]
    methods = list(dict.fromkeys(one.method for one in groups))
    colors = colors_of(methods)
    out.mkdir(parents=True, exist_ok=True)
    on_stage("drawing pictures")
    pictures = write_pictures(charts, colors, out / FIGURES)
    on_stage("writing the page")
    repeated = (note for one in groups for note in one.repeated())
    notes = [*notes_of(runs), *repeated, *_without(groups, baseline)]
    title, tables = _title(runs, groups), make_tables(groups, baseline)
    page, markdown = out / PAGE, out / TABLES
    markdown.write_text(
        render(
            "tables.md",
            title=title,
            notes=notes,
            tables=[(table.measure, matrix_markdown(table, runs)) for table in tables],
            runs=runs_markdown(runs, under),
        ),
        encoding="utf-8",
    )
    page.write_text(
        render(
            "report.html",
            title=title,
            made=f"{datetime.now():%Y-%m-%d %H:%M}",
            tables=[(table.measure, matrix_html(table, runs, colors)) for table in tables],
            runs=runs_html(runs, under, [_link(run.folder, out) for run in runs]),
            charts=charts,
            colors=colors,
            notes=notes,
            figures=script_json([plotly_figure(chart, colors) for chart in charts]),
            plotly=packed(get_plotlyjs().encode()),
        ),
        encoding="utf-8",
    )
    return Written(page=page, tables=markdown, pictures=pictures, num_runs=len(runs), notes=notes)


def _title(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    if len(runs) == 1:
        return f"{runs[0].method}, {runs[0].name}"
    counts = (
        (len(runs), "run"),
        (len({one.method for one in groups}), "method"),
        (len({one.condition for one in groups}), "condition"),
    )
    return ", ".join(f"{num} {noun}{'' if num == 1 else 's'}" for num, noun in counts)


def _without(groups: Sequence[Group], baseline: str | None) -> list[str]:
    methods = list(dict.fromkeys(one.method for one in groups))
    if baseline is not None and baseline not in methods:
        return [f"No run has the baseline {baseline}; these do: {', '.join(methods)}."]
    return []


def _link(folder: Path, out: Path) -> str:
    """From the page to the run, so that both can be moved together."""
    path = Path(os.path.relpath(folder, out.resolve())).as_posix()
    # As bytes: a name need not be UTF-8. A colon is quoted too, or it would begin a scheme.
    return urllib.parse.quote(os.fsencode(path), safe="/=,+")
