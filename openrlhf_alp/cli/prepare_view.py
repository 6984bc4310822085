"""What `prepare-data` shows: a line per stage, a progress bar on a terminal, the counts."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:  # the modules behind them import sympy
    from openrlhf_alp.data.output import OutputFiles, Summary
    from openrlhf_alp.data.prepare import OnProgress

_LINE_EVERY_ROWS = 2000
"""Without a terminal, a line is written each time that this many labels are checked."""


class PrepareView:
    """Prints to `console`; knows whether a person watches a terminal or a log is written."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, stage: str, text: str) -> None:
        """One line: the stage's name, and what happened."""
        self._console.print(f"[bold cyan]{stage:<9}[/] {escape(text)}", soft_wrap=True)

    def error(self, text: str) -> None:
        self._console.print(f"[bold red]Nothing was written.[/] {escape(text)}", soft_wrap=True)

    @contextmanager
    def checking(self) -> Iterator["OnProgress"]:
        """Yields what to call with each checked label."""
        if not self._console.is_terminal:
            yield self._line
            return
        with Progress(
            TextColumn("checking labels"),
            BarColumn(bar_width=40),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
        ) as progress:
            task = progress.add_task("", total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def results(self, summary: "Summary", files: "OutputFiles") -> None:
        """The table of counts, and what to do with the file."""
        self._console.print(_count_table(summary))
        if not summary.rows_kept:
            self.say("nothing", f"no row could be kept; {files.rejected} says why of each")
            return
        self.say("written", f"{files.prompts}, {files.rejected} and {files.summary}")
        self.say("train", f"--data.prompt_dataset {files.prompts} {summary.train_flags}")

    def _line(self, done: int, total: int) -> None:
        if done % _LINE_EVERY_ROWS == 0 or done == total:
            self.say("labels", f"{done} of {total} checked")


def _count_table(summary: "Summary") -> Table:
    table = Table(title=f"Prepared with {summary.template}", title_justify="left")
    table.add_column("")
    table.add_column("rows", justify="right")
    table.add_row("read", str(summary.rows_read))
    table.add_row("kept", str(summary.rows_kept), style="bold")
    _add_counts(table, "left out: ", {k.replace("_", " "): n for k, n in summary.rejected.items()})
    _add_counts(table, "from ", summary.kept_by_datasource)
    _add_counts(table, "label: ", summary.label_kinds)
    if summary.instructions_cut:
        table.add_row("instruction cut from the problem", str(summary.instructions_cut))
    if tokens := summary.prompt_tokens:
        table.add_section()
        table.add_row("prompt tokens, shortest", str(tokens.shortest))
        table.add_row("prompt tokens, median", f"{tokens.median:g}")
        table.add_row("prompt tokens, 95th percentile", str(tokens.p95))
        table.add_row("prompt tokens, longest", str(tokens.longest))
    return table


def _add_counts(table: Table, prefix: str, counts: Mapping[str, int]) -> None:
    table.add_section()
    for name, count in counts.items():
        table.add_row(escape(f"{prefix}{name}"), str(count))
