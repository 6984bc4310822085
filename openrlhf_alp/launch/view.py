"""What the demo shows: a line per stage, a progress bar on a terminal, plain lines elsewhere."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from openrlhf_alp.data.tasks import Question
from openrlhf_alp.episodes.records import Episode, TurnKind
from openrlhf_alp.report.metrics import LOG_RATIO_QUANTILES, REWARD, StepMetrics

if TYPE_CHECKING:  # the module behind it imports transformers, and the title should not wait
    from openrlhf_alp.launch.accuracy import Accuracy

_NUM_EXAMPLES = 3
_EDGE_STEPS = 3
"""Rewards are compared over this many steps at the start and at the end."""

_SPEAKERS = {TurnKind.PROMPT: "asked", TurnKind.ACTION: "policy", TurnKind.OBSERVATION: "tool"}

OnStep = Callable[[StepMetrics], None]


class DemoView:
    """Prints to `console`; knows whether a person watches a terminal or a log is written."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def title(self, text: str) -> None:
        self._console.print(f"\n[bold]{escape(text)}[/]\n")

    def say(self, stage: str, text: str) -> None:
        """One line: the stage's name, and what happened."""
        self._console.print(f"[bold cyan]{stage:<9}[/] {escape(text)}", soft_wrap=True)

    def error(self, text: str) -> None:
        self._console.print(f"\n[bold red]The demo failed.[/] {escape(text)}", soft_wrap=True)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Shows that something slow goes on; nothing in a log."""
        if self._console.is_terminal:
            with self._console.status(escape(text)):
                yield
        else:
            yield

    @contextmanager
    def training(self, num_steps: int) -> Iterator[OnStep]:
        """Yields what to call with each finished step."""
        if not self._console.is_terminal:
            yield lambda step: self.say("step", f"{step.step}/{num_steps}  {describe(step)}")
            return
        with Progress(
            SpinnerColumn(),
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=self._console,
        ) as progress:
            task = progress.add_task("", total=num_steps, numbers="starting Ray and DeepSpeed")
            yield lambda step: progress.update(task, completed=step.step, numbers=describe(step))

    def results(
        self,
        noun: str,
        rows: Sequence[Question],
        before: "Accuracy",
        after: "Accuracy",
        steps: Sequence[StepMetrics],
    ) -> None:
        """The table of before and after, and a few answers to compare with one's own eyes.

        Args:
            noun: what is asked for, in the plural.
        """
        self._console.print()
        self._console.print(_accuracy_table(f"{len(rows)} held-out {noun}", before, after, steps))
        self._console.print()
        self._console.print(_example_table(rows, before, after))
        not_scored = before.num_not_scored + after.num_not_scored
        if not_scored:
            self.say("note", f"{not_scored} held-out answers could not be scored and do not count")

    def transcript(self, name: str, episode: Episode | None) -> None:
        """One episode as it was spoken: who said what, and how it ended."""
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
    """Reward, ratio P99 and speed of one step; a metric that is missing shows as `-`."""
    log_ratio = step.values.get(LOG_RATIO_QUANTILES[99])
    ratio = None if log_ratio is None else math.exp(log_ratio)
    return (
        f"reward {_number(step.values.get(REWARD), '.2f')}  "
        f"ratio P99 {_number(ratio, '.3f')}  "
        f"{_number(step.tokens_per_s, '.0f')} tokens/s"
    )


def reward_at_edges(steps: Sequence[StepMetrics]) -> tuple[float, float] | None:
    """Mean reward of the first and of the last three steps; None when there are fewer than six."""
    rewards = [step.values[REWARD] for step in steps if REWARD in step.values]
    if len(rewards) < 2 * _EDGE_STEPS:
        return None
    first, last = rewards[:_EDGE_STEPS], rewards[-_EDGE_STEPS:]
    return sum(first) / _EDGE_STEPS, sum(last) / _EDGE_STEPS


def _accuracy_table(
    held_out: str, before: "Accuracy", after: "Accuracy", steps: Sequence[StepMetrics]
) -> Table:
    table = Table(title="Right answers", title_justify="left")
    table.add_column("")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    _add_shares(table, f"{held_out}, greedy", before.greedy, after.greedy)
    _add_shares(table, f"{held_out}, temperature 1", before.sampled, after.sampled)
    if edges := reward_at_edges(steps):
        first, last = edges
        _add_shares(table, f"training reward, first and last {_EDGE_STEPS} steps", first, last)
    return table


def _add_shares(table: Table, name: str, before: float, after: float) -> None:
    # The difference of what is shown, so that the row adds up.
    change = f"{100 * round(after, 2) - 100 * round(before, 2):+.0f} points"
    table.add_row(name, f"{before:.0%}", f"{after:.0%}", change)


def _example_table(rows: Sequence[Question], before: "Accuracy", after: "Accuracy") -> Table:
    table = Table(title="Held-out questions, greedy answers", title_justify="left")
    for heading in ("question", "before", "after"):
        table.add_column(heading)
    pairs = zip(rows, before.greedy_episodes, after.greedy_episodes, strict=True)
    for row, old, new in list(pairs)[:_NUM_EXAMPLES]:
        table.add_row(escape(row.question), *(escape(_last_words(e)) for e in (old, new)))
    return table


def _last_words(episode: Episode | None) -> str:
    """The policy's last turn on one line."""
    if episode is None:
        return "-"
    turns = [turn.text for turn in episode.turns if turn.kind is TurnKind.ACTION]
    return " ".join(turns[-1].split())


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
