"""`openrlhf-alp report`: its options. The folder `report/compare` does the work."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape

from openrlhf_alp.report.visible import visible

HELP = "put any number of runs on one page: table, curves, intervals over seeds"

DESCRIPTION = """\
Write one page about any number of runs, which opens from disk without a network, and its figures
as PNG and SVG. Runs of one method and condition are seeds of each other: curves and numbers are
means over them with 95 % Student t intervals, and methods are compared by seed.

  openrlhf-alp report runs/demo
  openrlhf-alp report runs/stability-sweep --out runs/report --baseline seq-bypass

A run that failed, is still going, or has other metrics is shown with what it has; the page says
what is missing. exit status: 0 written, 2 no run was found or the page cannot be written.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `openrlhf-alp report`."""
    add = parser.add_argument
    add(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run folder, or a folder of them such as that of a sweep",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/report"),
        help="folder to write (default: %(default)s)",
    )
    add(
        "--baseline",
        metavar="METHOD",
        help="compare every method with this one (default: seq-alp with seq-bypass, and so on)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Writes the report; returns 0, or 2 when there is no run or no place to write it."""
    # Here and not above: matplotlib takes a second to import.
    from openrlhf_alp.report.compare.page import write_report

    console = Console()
    try:
        with console.status("") as status:
            written = write_report(
                arguments.runs,
                arguments.out,
                baseline=arguments.baseline,
                on_stage=status.update,
            )
    except (ValueError, OSError) as error:
        console.print(f"[bold red]Not written.[/] {escape(visible(error))}", soft_wrap=True)
        return 2
    for note in written.notes:
        console.print(f"[bold yellow]note[/]   {escape(visible(note))}", soft_wrap=True)
    size = decimal(written.page.stat().st_size)
    where = f"{written.page} ({size}), runs: {written.num_runs}"
    pictures = f"{written.tables.name} and {len(written.pictures)} pictures beside it"
    console.print(
        f"[bold cyan]report[/] {escape(visible(where))}, {escape(pictures)}", soft_wrap=True
    )
    return 0
