"""Several runs of one recipe: `--seeds 1,2,3`, `--sweep KEY=A,B`, and every combination of them.

Each cell is a launch of its own in a folder below the recipe's. A finished cell is skipped, one
with a checkpoint continues, so the same command goes on where an earlier one was stopped.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from openrlhf_alp.launch import machine, plan
from openrlhf_alp.launch.recipe import RecipeError, read_recipe
from openrlhf_alp.launch.run_folder import RECIPE, SUMMARY, has_checkpoint
from openrlhf_alp.launch.supervisor import Child, StopRequested, Supervisor
from openrlhf_alp.launch.view import LaunchView

_GRACE_S = 17.0
"""A cell is a launch and ends everything of its own."""
_POLL_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One combination of the values."""

    name: str
    settings: tuple[str, ...]
    folder: Path

    @property
    def is_finished(self) -> bool:
        return (self.folder / SUMMARY).exists()

    def command(self, recipe: Path) -> list[str]:
        """The launch of this cell; an attempt that left nothing to continue from is replaced."""
        command = [sys.executable, "-m", "openrlhf_alp.cli.main", "launch", str(recipe)]
        for setting in self.settings:
            command += ["--set", setting]
        if has_checkpoint(self.folder):
            return [*command, "--resume", str(self.folder)]
        command += ["--set", f"run.folder={self.folder}"]
        return [*command, "--overwrite"] if (self.folder / RECIPE).exists() else command


def cells_of(
    folder: Path, settings: Sequence[str], seeds: str | None, sweeps: Sequence[str]
) -> list[Cell]:
    """Every combination of the seeds and the values.

    Args:
        folder: the cells' folders are made in it.
        settings: `KEY=VALUE`, the same for all cells.
        seeds: numbers with commas between them.
        sweeps: `KEY=A,B`.

    Raises:
        RecipeError: one of them is not of this form.
    """
    axes = [sweep.partition("=") for sweep in sweeps]
    axes += [("run.seed", "=", seeds)] if seeds else []
    for key, equals, values in axes:
        if not equals or not all(values.split(",")):
            raise RecipeError(f"--sweep {key}{equals}{values}: write it as --sweep KEY=A,B")
    choices = [[f"{key}={value}" for value in values.split(",")] for key, _, values in axes]
    cells = []
    for chosen in itertools.product(*choices):
        # The last part of a key says enough; a value may be a path.
        name = ",".join(c.rpartition(".")[2] if "=" in c.rpartition(".")[2] else c for c in chosen)
        name = name.replace("/", "_")
        cells.append(Cell(name=name, settings=(*settings, *chosen), folder=folder / name))
    return cells


def sweep(recipe: Path, cells: Sequence[Cell], view: LaunchView) -> int:
    """Runs the cells that are not finished, as many at once as there are GPUs for.

    Returns:
        0, or 1 when a cell failed, 2 when a setting is wrong, or 128 + a stop signal.
    """
    for cell in cells:
        # All before the first one starts: the last may be hours away.
        checked, _ = read_recipe(recipe, cell.settings)
    needed = plan.gpus_needed(checked)
    at_once = max(1, len(machine.this_machine().free_gpus) // needed) if needed else 1
    waiting = [cell for cell in cells if not cell.is_finished]
    view.say("sweep", f"{len(cells)} cells, {len(cells) - len(waiting)} of them finished already")
    try:
        with Supervisor() as supervisor:
            failed = list(_run_all(recipe, waiting, at_once, view, supervisor))
    except StopRequested as stop:
        view.say("stopped", f"by {stop}; the same command continues")
        return stop.exit_status
    for cell in cells:
        outcome = "failed" if cell in failed else "finished"
        view.say("cell", f"{cell.name}: {outcome}, {cell.folder}")
    if failed:
        view.error(f"{', '.join(cell.name for cell in failed)}: see their logs beside the folders")
    return 1 if failed else 0


def _run_all(
    recipe: Path, waiting: list[Cell], at_once: int, view: LaunchView, supervisor: Supervisor
) -> Iterator[Cell]:
    """Yields the cells that fail."""
    running: dict[str, tuple[Cell, Child]] = {}
    while waiting or running:
        while waiting and len(running) < at_once:
            cell = waiting.pop(0)
            cell.folder.parent.mkdir(parents=True, exist_ok=True)
            log = cell.folder.with_name(f"{cell.name}.log")
            view.say("cell", f"{cell.name}: started (log: {log})")
            child = supervisor.start(cell.name, cell.command(recipe), log=log, grace_s=_GRACE_S)
            running[cell.name] = (cell, child)
        time.sleep(_POLL_S)
        for cell, child in [pair for pair in running.values() if not pair[1].is_running]:
            del running[cell.name]
            status, _ = supervisor.ended(child)
            if status:
                view.say("cell", child.failure().ending)
                yield cell
