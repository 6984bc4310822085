"""What a run shows: a line per stage, a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from openrlhf_alp.data.tasks import Question
from openrlhf_alp.episodes.records import Episode, TurnKind
from openrlhf_alp.report.metrics import (
    EDGE_STEPS,
    LOG_RATIO_QUANTILES,
    REWARD,
    StepMetrics,
    reward_at_edges,
)

if TYPE_CHECKING:  # it imports transformers, and the title should not wait for that
    from openrlhf_alp.launch.accuracy import Accuracy

_NUM_EXAMPLES = 3

_SPEAKERS = {TurnKind.PROMPT: "asked", TurnKind.ACTION: "policy", TurnKind.OBSERVATION: "tool"}

OnStep = Callable[[StepMetrics], None]


class StageView:
    """Prints to `console`, in colour and with progress bars when it is a terminal.

    Args:
        failed: what an error is introduced with.
    """

    def __init__(self, console: Console, *, failed: str) -> None:
        self._console = console
        self._failed = failed

    def say(self, stage: str, text: str) -> None:
        """One line: the stage's name, and what happened."""
        self._console.print(f"[bold cyan]{stage:<9}[/] {escape(text)}", soft_wrap=True)

    def error(self, text: str) -> None:
        self._console.print(f"[bold red]{self._failed}[/] {escape(text)}", soft_wrap=True)


class DemoView(StageView):
    """What the demo shows."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, failed="\nThe demo failed.")

    def title(self, text: str) -> None:
        self._console.print(f"\n[bold]{escape(text)}[/]\n")

    def waiting(self, text: str) -> AbstractContextManager[object]:
        """Shows a spinner while something slow runs; a log gets nothing."""
        return self._console.status(escape(text)) if self._console.is_terminal else nullcontext()

    @contextmanager
    def training(self, num_steps: int) -> Iterator[OnStep]:
        """Yields what to call with each finished step."""
        if not self._console.is_terminal:
            yield lambda step: self.say("step", f"{step.step}/{num_steps}  {describe(step)}")
            return
        with progress.Progress(
            progress.SpinnerColumn(),
            "training",
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            "{task.fields[numbers]}",
            progress.TimeElapsedColumn(),
            console=self._console,
        ) as bar:
            task = bar.add_task("", total=num_steps, numbers="starting Ray and DeepSpeed")
            yield lambda step: bar.update(task, completed=step.step, numbers=describe(step))

    def results(
        self,
        noun: str,
        rows: Sequence[Question],
        before: Accuracy,
        after: Accuracy,
        steps: Sequence[StepMetrics],
    ) -> None:
        """The table of before and after, and a few answers to read oneself.

        Args:
            noun: what is asked for, in the plural.
        """
        accuracies = _accuracy_table(f"{len(rows)} held-out {noun}", before, after, steps)
        self._console.print("", accuracies, "", _example_table(rows, before, after), sep="\n")
        if not_scored := before.num_not_scored + after.num_not_scored:
            self.say("note", f"{not_scored} held-out answers could not be scored and do not count")

    def transcript(self, name: str, episode: Episode | None) -> None:
        """Shows one episode turn by turn: who wrote what, and how it ended."""
        if episode is None:
            self._console.print(f"[bold]{escape(name)}[/]: its reward could not be computed")
            return
        said = Text()
        for turn in episode.turns:
            said.append(f"{_SPEAKERS[turn.kind]:<7}", style="bold")
            said.append(f"{turn.text.strip()}\n".replace("\n", f"\n{'':7}").rstrip(" "))
        said.append(f"reward {episode.reward:g}, ended by {episode.stop_reason}", style="italic")
        self._console.print(Panel(said, title=escape(name), title_align="left"))


def describe(step: StepMetrics) -> str:
    """Reward, P99 of the ratio and speed of one step; a metric that is missing shows as `-`."""
    log_ratio = step.values.get(LOG_RATIO_QUANTILES[99])
    ratio = None if log_ratio is None else math.exp(log_ratio)
    return (
        f"reward {_number(step.values.get(REWARD), '.2f')}  "
        f"ratio P99 {_number(ratio, '.3f')}  "
        f"{_number(step.tokens_per_s, '.0f')} tokens/s"
    )


def _accuracy_table(
    held_out: str, before: Accuracy, after: Accuracy, steps: Sequence[StepMetrics]
) -> Table:
    table = Table(title="Right answers", title_justify="left")
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    _add_shares(table, f"{held_out}, greedy", before.greedy, after.greedy)
    _add_shares(table, f"{held_out}, temperature 1", before.sampled, after.sampled)
    if edges := reward_at_edges(steps):
        first, last = edges
        _add_shares(table, f"training reward, first and last {EDGE_STEPS} steps", first, last)
    return table


def _add_shares(table: Table, name: str, before: float, after: float) -> None:
    # From the rounded shares, so that the row adds up for a reader.
    change = f"{100 * round(after, 2) - 100 * round(before, 2):+.0f} points"
    table.add_row(name, f"{before:.0%}", f"{after:.0%}", change)


def _example_table(rows: Sequence[Question], before: Accuracy, after: Accuracy) -> Table:
    table = Table(title="Held-out questions, greedy answers", title_justify="left")
    for heading in ("question", "before", "after"):
        table.add_column(heading)
    pairs = zip(rows, before.greedy_episodes, after.greedy_episodes, strict=True)
    for row, *episodes in list(pairs)[:_NUM_EXAMPLES]:
        # Escaped: what a policy writes may look like the markup of the console.
        table.add_row(escape(row.question), *(escape(_last_turn(e)) for e in episodes))
    return table


def _last_turn(episode: Episode | None) -> str:
    """The policy's last turn on one line."""
    turns = [turn.text for turn in episode.turns if turn.kind is TurnKind.ACTION] if episode else []
    return " ".join(turns[-1].split()) if turns else "-"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
