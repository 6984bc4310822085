"""What `preflight` shows: the distribution of the log-ratio, the verdict, what to look at."""

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from openrlhf_alp.learner.mismatch.judge import LIMITS, Level

if TYPE_CHECKING:  # the module behind it imports torch
    from openrlhf_alp.learner.mismatch.probe import ProbeReport

_COLORS = {Level.OK: "green", Level.SUSPICIOUS: "yellow", Level.BROKEN: "red"}
_MEANING = {
    Level.OK: "learner and service agree as far as their precision goes",
    Level.SUSPICIOUS: "they differ more than rounding explains",
    Level.BROKEN: "they do not compute the same thing: a run would train on wrong ratios",
}


class PreflightView:
    """Prints to `console`."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, stage: str, text: str) -> None:
        """One line: the stage's name, and what happens."""
        self._console.print(f"[bold cyan]{stage:<9}[/] {escape(text)}", soft_wrap=True)

    def error(self, text: str) -> None:
        self._console.print(f"[bold red]Nothing was measured.[/] {escape(text)}", soft_wrap=True)

    def report(self, report: "ProbeReport") -> None:
        """Table, weights and verdict."""
        self.say("measured", "log-ratio of the sampled tokens, learner over rollout")
        self._console.print(_table(report))
        self.say("versions", ", ".join(map(str, report.versions)))
        self.say("weights", _weights_line(report))
        verdict = report.verdict
        color = _COLORS[verdict.level]
        self._console.print(
            f"[bold cyan]{'verdict':<9}[/] [bold {color}]{verdict.level}[/]: "
            f"{_MEANING[verdict.level]}",
            soft_wrap=True,
        )
        for finding in verdict.findings:
            self.say("", finding)
        for cause in verdict.causes:
            self.say("cause?", cause)


def as_json(report: "ProbeReport") -> dict[str, Any]:
    """The same for machines."""
    return {
        "verdict": str(report.verdict.level),
        "findings": list(report.verdict.findings),
        "causes": list(report.verdict.causes),
        "figures": report.mismatch.figures(),
        "limits": {
            limit.figure: {"suspicious": limit.suspicious, "broken": limit.broken}
            for limit in LIMITS
        },
        "num_samples": report.num_samples,
        "versions": list(report.versions),
        "weights": {
            "num_tensors": report.weights.num_tensors,
            "different": list(report.weights.different),
        },
    }


def _table(report: "ProbeReport") -> Table:
    limits = {limit.figure: limit for limit in LIMITS}
    table = Table()
    for column in ("figure", "value", "suspicious", "broken"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    table.add_row("samples", str(report.num_samples), "", "")
    table.add_row("tokens", str(report.mismatch.num_tokens), "", "")
    for name, value in report.mismatch.figures().items():
        if name == "num_tokens":
            continue
        limit = limits.get(name)
        bounds = (f"{limit.suspicious:g}", f"{limit.broken:g}") if limit else ("", "")
        table.add_row(name, f"{value:+.5f}", *bounds)
    return table


def _weights_line(report: "ProbeReport") -> str:
    weights = report.weights
    if not weights.different:
        return f"all {weights.num_tensors} tensors are served as the model folder has them"
    return (
        f"{len(weights.different)} of {weights.num_tensors} tensors are not those of the model "
        f"folder, first {weights.different[0]}: another run has pushed, or it is another folder. "
        "--push makes them the folder's"
    )
