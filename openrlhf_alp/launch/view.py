"""What a run shows: a live table on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markdown import Markdown
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
    from openrlhf_alp.launch.processes.servers import Server
    from openrlhf_alp.launch.stages.accuracy import Accuracy

_NUM_EXAMPLES = 3
_LINE_EVERY_S = 20.0
_RECENT_STEPS = 5
"""The time left is estimated from these; the first steps also compile and measure."""

_SPEAKERS = {TurnKind.PROMPT: "asked", TurnKind.ACTION: "policy", TurnKind.OBSERVATION: "tool"}

OnChange = Callable[[Sequence["Server"], StepMetrics | None], None]


class StageView:
    """Prints to `console`, in colour and with moving parts when it is a terminal.

    Args:
        failed: what an error is introduced with.
        quiet: print errors only.
    """

    def __init__(self, console: Console, *, failed: str, quiet: bool = False) -> None:
        self._console = console
        self._failed = failed
        self.quiet = quiet

    def say(self, stage: str, text: str) -> None:
        """One line: the stage's name, and what happened."""
        if not self.quiet:
            self._console.print(f"[bold cyan]{stage:<9}[/] {escape(text)}", soft_wrap=True)

    @property
    def is_live(self) -> bool:
        """Whether what is shown moves; a table then needs services to be asked."""
        return self._console.is_terminal and not self.quiet

    def waiting(self, text: str) -> AbstractContextManager[object]:
        """Shows a spinner while something slow runs; a log gets nothing."""
        return self._console.status(escape(text)) if self.is_live else nullcontext()

    def error(self, text: str) -> None:
        self._complain(self._failed, text)

    def refusal(self, text: str) -> None:
        """An error that was found in what was asked for."""
        self._complain("\nNothing was started.", text)

    def _complain(self, heading: str, text: str) -> None:
        self._console.print(f"[bold red]{heading}[/] {escape(text)}", soft_wrap=True)


class EvaluationView(StageView):
    """Lines per suite with an estimate of the time left; then the tables."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, failed="Not finished.")

    def suite(self, title: str, *, done: int, total: int) -> Callable[[], None]:
        """Begins a suite; returns what to call after each answer."""
        if done:
            self.say("stored", f"{title}: {done} of {total} answers are there already")
        if done < total:
            self.say("answers", f"{title}: {total - done} answers to go")
        count = done
        width = 0
        started_s = shown_s = 0.0

        def on_answer() -> None:
            nonlocal count, width, started_s, shown_s
            count += 1
            now_s = time.monotonic()
            if count == done + 1:
                # Before the first answer the graders start: no measure of what is left.
                started_s = shown_s = now_s
            last = count == total
            if not last and now_s - shown_s < _every_s(self._console):
                return
            shown_s = now_s
            left_s = (now_s - started_s) / max(1, count - done - 1) * (total - count)
            left = "all there" if last else f"about {_duration(left_s)} left"
            line = f"{title}: {count}/{total} answers, {left}"
            # A longer line before it on a terminal is written over.
            width = max(width, len(line) if self._console.is_terminal else 0)
            self._console.print(
                f"[bold cyan]{'answers':<9}[/] {escape(line.ljust(width))}",
                end="\r" if self._console.is_terminal and not last else "\n",
                soft_wrap=True,
            )

        return on_answer

    def tables(self, text: str) -> None:
        """Shows Markdown: as tables on a terminal, as it is elsewhere."""
        shown: Any = Markdown(text) if self._console.is_terminal else text
        self._console.print()
        self._console.print(shown, markup=False, soft_wrap=True)


class LaunchView(StageView):
    """What a launch shows."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        super().__init__(console, failed="\nThe run failed.", quiet=quiet)

    def title(self, text: str) -> None:
        if not self.quiet:
            self._console.print(f"\n[bold]{escape(text)}[/]\n")

    @contextmanager
    def training(self, num_steps: int | None, earlier: Sequence[StepMetrics]) -> Iterator[OnChange]:
        """Yields what to call with the services and the step that was made, if any."""
        board = Board(num_steps=num_steps, steps=list(earlier))
        if not self.is_live:

            def tell(servers: Sequence[Server], step: StepMetrics | None) -> None:
                if step is not None:
                    board.add(step)
                    self.say("step", board.line())

            yield tell
            return
        with Live(console=self._console, refresh_per_second=2) as live:

            def redraw(servers: Sequence[Server], step: StepMetrics | None) -> None:
                if step is not None:
                    board.add(step)
                live.update(Group(_service_table(servers), Text(board.line())))

            yield redraw

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
        if self.quiet:
            return
        accuracies = _accuracy_table(f"{len(rows)} held-out {noun}", before, after, steps)
        self._console.print("", accuracies, "", _example_table(rows, before, after), sep="\n")
        if not_scored := before.num_not_scored + after.num_not_scored:
            self.say("note", f"{not_scored} held-out answers could not be scored and do not count")

    def transcript(self, name: str, episode: Episode | None) -> None:
        """Shows one episode turn by turn: who wrote what, and how it ended."""
        if self.quiet:
            return
        if episode is None:
            self._console.print(f"[bold]{escape(name)}[/]: its reward could not be computed")
            return
        said = Text()
        for turn in episode.turns:
            said.append(f"{_SPEAKERS[turn.kind]:<7}", style="bold")
            said.append(f"{turn.text.strip()}\n".replace("\n", f"\n{'':7}").rstrip(" "))
        said.append(f"reward {episode.reward:g}, ended by {episode.stop_reason}", style="italic")
        self._console.print(Panel(said, title=escape(name), title_align="left"))


class Board:
    """The steps so far, and how long the others may take."""

    def __init__(self, *, num_steps: int | None, steps: list[StepMetrics]) -> None:
        self._num_steps = num_steps
        self._steps = steps
        self._times_s: list[float] = []

    def add(self, step: StepMetrics) -> None:
        """One more step was made just now."""
        self._steps.append(step)
        self._times_s.append(time.monotonic())

    def line(self) -> str:
        """The last step in words."""
        if not self._steps:
            return "starting the learner"
        last = self._steps[-1]
        of = "" if self._num_steps is None else f"/{self._num_steps}"
        return f"{last.step}{of}  {describe(last)}{self._left(last.step)}"

    def _left(self, step: int) -> str:
        recent = self._times_s[-_RECENT_STEPS - 1 :]
        if self._num_steps is None or len(recent) < 2 or step >= self._num_steps:
            return ""
        each_s = statistics.fmean(b - a for a, b in itertools.pairwise(recent))
        return f"  {(self._num_steps - step) * each_s / 60:.0f} min left"


def describe(step: StepMetrics) -> str:
    """Reward, tail of the ratio, KL, sigma and speed; a metric that is missing shows as `-`."""
    log_ratio = step.values.get(LOG_RATIO_QUANTILES[99])
    shown = [
        ("reward", step.values.get(REWARD), ".2f"),
        ("ratio P99", None if log_ratio is None else math.exp(log_ratio), ".3f"),
        ("KL", step.values.get("alp/k3_kl"), ".1e"),
        ("sigma", step.values.get("alp/sigma_mean"), ".1e"),
    ]
    text = "  ".join(f"{name} {_number(value, form)}" for name, value, form in shown)
    return f"{text}  {_number(step.tokens_per_s, '.0f')} tokens/s"


def _service_table(servers: Sequence[Server]) -> Table:
    table = Table("service", "state", title_justify="left")
    for heading in ("version", "requests", "tokens/s", "restarts"):
        table.add_column(heading, justify="right")
    for server in servers:
        status = server.status
        numbers = (status.version, status.requests, status.tokens_per_s)
        state = "serving" if server.is_ready else "starting"
        cells = (_number(number, ".0f") for number in numbers)
        table.add_row(server.name, state, *cells, str(server.restarts))
    return table


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


def _every_s(console: Console) -> float:
    return 0.5 if console.is_terminal else _LINE_EVERY_S


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
