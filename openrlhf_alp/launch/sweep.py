"""Several runs of one recipe: every combination of what the recipe's `[sweep]`, `--seeds 1,2,3` and
`--sweep KEY=A,B` name.

Each cell is a launch of its own in a folder below the recipe's. A finished cell is skipped, one
with a checkpoint continues, so the same command goes on where an earlier one was stopped.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from openrlhf_alp.launch import machine, plan
from openrlhf_alp.launch.recipe import RecipeError, read_recipe
from openrlhf_alp.launch.recipe import Sweep as RecipeSweep
from openrlhf_alp.launch.run_folder import has_checkpoint
from openrlhf_alp.launch.supervisor import Child, StopRequested, Supervisor
from openrlhf_alp.launch.view import LaunchView
from openrlhf_alp.report.metrics import RECIPE, SUMMARY

_GRACE_S = 17.0
"""A cell is a launch and ends everything of its own."""
_POLL_S = 0.5
_SEED, _CONDITION = "run.seed", "run.condition"


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
    folder: Path,
    settings: Sequence[str],
    seeds: str | None = None,
    sweeps: Sequence[str] = (),
    recipe: RecipeSweep | None = None,
) -> list[Cell]:
    """Every combination of seeds, conditions and values; the first seed of all comes first.

    Args:
        folder: the cells' folders are made in it.
        settings: `KEY=VALUE`, the same for all cells.
        seeds: numbers with commas between them.
        sweeps: `KEY=A,B`; `run.condition=A,B` picks conditions of the recipe.
        recipe: its `[sweep]`; seeds and sweeps win over its values.

    Raises:
        RecipeError: one of them is not of this form, or the recipe has no such condition.
    """
    given = [sweep.partition("=") for sweep in sweeps]
    given += [(_SEED, "=", seeds)] if seeds else []
    for key, equals, values in given:
        if not equals or not all(values.split(",")):
            raise RecipeError(f"--sweep {key}{equals}{values}: write it as --sweep KEY=A,B")
    asked = {key: values.split(",") for key, _, values in given}
    conditions = recipe.conditions if recipe else {}
    axes: dict[str, list[str]] = {_CONDITION: list(conditions)} if conditions else {}
    for key, choices in (recipe.values if recipe else {}).items():
        axes[key] = [c if isinstance(c, str) else json.dumps(c) for c in choices]
    axes |= asked
    if conditions and (unknown := [c for c in axes[_CONDITION] if c not in conditions]):
        raise RecipeError(
            f"--sweep {_CONDITION}={unknown[0]}: the recipe has {', '.join(conditions)}"
        )
    ordered = sorted(axes, key=lambda key: (key != _SEED, key != _CONDITION))
    # A cell is one run: what the recipe sweeps over must not start a sweep in it again.
    alone = (*settings, "sweep={}") if conditions or (recipe and recipe.values) else (*settings,)
    cells = []
    for picked in itertools.product(*(axes[key] for key in ordered)):
        chosen = dict(zip(ordered, picked, strict=True))
        more = conditions.get(chosen.get(_CONDITION, ""), {})
        own = [f"{key}={json.dumps(value)}" for key, value in more.items()]
        own += [f"{key}={value}" for key, value in chosen.items()]
        name = _name({key: chosen[key] for key in axes})
        cells.append(Cell(name=name, settings=(*alone, *own), folder=folder / name))
    return cells


def _name(chosen: Mapping[str, str]) -> str:
    """Folder of a cell: the last part of a key says enough, and a value may be a path."""
    parts = [
        value if key == _CONDITION else f"{key.rpartition('.')[2]}={value}"
        for key, value in chosen.items()
    ]
    # OpenRLHF reads a comma in the path of its prompts as the end of a first path.
    return "_".join(parts).replace("/", "_").replace(",", "+")


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
