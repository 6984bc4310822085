"""Several runs of one recipe: every combination of what the recipe's `[sweep]`, `--seeds 1,2,3` and
`--sweep KEY=A,B` name.

Each cell is a launch of its own in a folder below the recipe's. A finished cell is skipped, one
with a checkpoint continues, so the same command goes on where an earlier one was stopped.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from openrlhf_alp.launch import machine, plan
from openrlhf_alp.launch.commands import Commands
from openrlhf_alp.launch.lent import Lender
from openrlhf_alp.launch.processes.supervisor import (
    Child,
    ProcessFailedError,
    StopRequested,
    Supervisor,
)
from openrlhf_alp.launch.recipe import (
    NO_TOML,
    Recipe,
    RecipeError,
    as_setting,
    read_recipe,
    to_value,
)
from openrlhf_alp.launch.recipe import Sweep as RecipeSweep
from openrlhf_alp.launch.run_folder import SPECIAL, has_checkpoint, read_run
from openrlhf_alp.launch.view import LaunchView
from openrlhf_alp.report.metrics import RECIPE, SUMMARY

_GRACE_S = 17.0
"""A cell is a launch and ends everything of its own."""
_POLL_S = 0.5
_NAME_BYTES = 240
"""Of 255 that a name may have; that of the cell's log is longer."""
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

    def command(self, recipe: Path, lent: Path | None = None) -> list[str]:
        """The launch of this cell; an attempt that left nothing to continue from is replaced.

        Args:
            lent: folder with the addresses of services that it may use.
        """
        command = [sys.executable, "-m", "openrlhf_alp.cli.main", "launch", str(recipe)]
        for setting in self.settings:
            command += ["--set", setting]
        command += ["--lent", str(lent)] if lent else []
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
    asked = _asked(sweeps if seeds is None else [*sweeps, f"{_SEED}={seeds}"])
    conditions = recipe.conditions if recipe else {}
    axes = {_CONDITION: [as_setting(name) for name in conditions]} if conditions else {}
    for key, choices in (recipe.values if recipe else {}).items():
        axes[key] = [as_setting(choice) for choice in choices]
    axes |= asked
    known = {as_setting(name): more for name, more in conditions.items()}
    if conditions and (unknown := [c for c in axes[_CONDITION] if c not in known]):
        raise RecipeError(f"--sweep {_CONDITION}={unknown[0]}: the recipe has {', '.join(known)}")
    ordered = sorted(axes, key=lambda key: (key != _SEED, key != _CONDITION))
    # A cell is one run: what the recipe sweeps over must not start a sweep in it again.
    alone = (*settings, "sweep={}") if conditions or (recipe and recipe.values) else (*settings,)
    cells = []
    for picked in itertools.product(*(axes[key] for key in ordered)):
        chosen = dict(zip(ordered, picked, strict=True))
        more = known.get(chosen.get(_CONDITION, ""), {})
        own = [f"{key}={to_value(value)}" for key, value in more.items()]
        own += [f"{key}={value}" for key, value in chosen.items()]
        name = _name({key: chosen[key] for key in axes})
        cells.append(Cell(name=name, settings=(*alone, *own), folder=folder / name))
    _check_names([cell.name for cell in cells])
    return cells


def _asked(sweeps: Sequence[str]) -> dict[str, list[str]]:
    asked: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, _, values = (part.strip() for part in sweep.partition("="))
        choices = _choices(values)
        if key == _CONDITION:  # always a text, also one of digits
            choices = [as_setting(choice.strip('"')) for choice in choices]
        if not key or not all(choices):
            raise RecipeError(f"--sweep {sweep}: write it as --sweep KEY=A,B")
        if key in asked:
            raise RecipeError(f"--sweep {sweep}: {key} is given twice; name all values at once")
        if key == "run.folder":
            raise RecipeError(
                f"--sweep {sweep}: each cell has a folder of its own; --output names where"
            )
        asked[key] = choices
    return asked


def _choices(text: str) -> list[str]:
    """Of `A,B`, where a list or a quoted text may have commas of its own."""
    if re.search(r"[\[{\"']", text):
        try:
            read = tomllib.loads(f"values = [{text}]")["values"]
        except NO_TOML as error:
            raise RecipeError(
                f"--sweep of {text}: where one value has brackets or quotes, each is written as "
                f"in TOML, a text in quotes ({error})"
            ) from error
        return [as_setting(choice) for choice in read]
    return [choice.strip() for choice in text.split(",")]


def _check_names(names: Sequence[str]) -> None:
    """A cell in the folder of another one, or of the sweep, would replace what is there."""
    if not names:
        raise RecipeError("the sweep has no cell: one of its settings has an empty list of values")
    for name in names:
        if names.count(name) > 1:
            raise RecipeError(f"two cells would have the folder {name}: give each value once")
        if name in (".", "..", "logs") or len(os.fsencode(name)) > _NAME_BYTES:
            raise RecipeError(
                f"{name!r} cannot name the folder of a cell: name it with a condition in [sweep] "
                f"that is no longer than {_NAME_BYTES} bytes, and not 'logs'"
            )


def _name(chosen: Mapping[str, str]) -> str:
    """Folder of a cell: the last part of a key says enough, and a value may be a path."""
    parts = [
        value if key == _CONDITION else f"{key.rpartition('.')[2]}={value}"
        for key, value in chosen.items()
    ]
    name = "_".join(parts).replace("/", "_").replace(",", "+")
    # What is left would mean something to whoever reads the path of the prompts in the folder.
    return re.sub(rf"[{re.escape(SPECIAL)}\s\"'{{}}]", "", name)


def sweep(
    recipe: Path, cells: Sequence[Cell], view: LaunchView, commands: Commands | None = None
) -> int:
    """Runs the cells that are not finished, as many at once as there are GPUs for.

    On a CPU they run one after the other, and rollout services stay up between those that need the
    same ones.

    Returns:
        0, or 1 when a cell failed, 2 when a setting is wrong, or 128 + a stop signal.
    """
    recipes = _recipes(recipe, cells)
    needed = max(map(plan.gpus_needed, recipes.values()))
    at_once = max(1, len(machine.this_machine().free_gpus) // needed) if needed else 1
    waiting = [cell for cell in cells if not cell.is_finished]
    view.say("sweep", f"{len(cells)} cells, {len(cells) - len(waiting)} of them finished already")
    try:
        with (
            Supervisor() as supervisor,
            Lender(cells[0].folder.parent, supervisor, view, commands or Commands()) as lender,
        ):
            running = _Cells(
                recipe=recipe, recipes=recipes, view=view, supervisor=supervisor, lender=lender
            )
            failed = list(running.run_all(waiting, at_once))
    except StopRequested as stop:
        view.say("stopped", f"by {stop}; the same command continues")
        return stop.exit_status
    for cell in cells:
        outcome = "failed" if cell in failed else "finished"
        view.say("cell", f"{cell.name}: {outcome}, {cell.folder}")
    if failed:
        view.error(f"{', '.join(cell.name for cell in failed)}: see their logs beside the folders")
    return 1 if failed else 0


def check_cells(
    recipe: Path, cells: Sequence[Cell], view: LaunchView, pretend_gpus: str | None = None
) -> int:
    """A dry run of every cell that is not finished; the exit status of the first that fails."""
    _recipes(recipe, cells)
    flags = ["--dry-run", *(["--pretend-gpus", pretend_gpus] if pretend_gpus else [])]
    statuses = []
    for cell in cells:
        view.title(f"cell {cell.name}{' is finished already' if cell.is_finished else ''}")
        if not cell.is_finished:
            statuses.append(subprocess.run([*cell.command(recipe), *flags]).returncode)
    return next(filter(None, statuses), 0)


def _recipes(recipe: Path, cells: Sequence[Cell]) -> dict[str, Recipe]:
    """Of all cells before the first one starts: the last may be hours away."""
    recipes = {cell.name: read_recipe(recipe, cell.settings)[0] for cell in cells}
    _refuse_other_runs(cells, recipes)
    return recipes


def _refuse_other_runs(cells: Sequence[Cell], recipes: Mapping[str, Recipe]) -> None:
    """A run with other settings, from before the recipe changed, is no result of this sweep."""
    for cell in cells:
        started = cell.is_finished or has_checkpoint(cell.folder)
        if started and (cell.folder / RECIPE).exists():
            try:
                read_run(cell.folder, recipes[cell.name])
            except RecipeError as error:
                raise RecipeError(
                    f"the cell {cell.name} was run already, and not as it is asked for now: "
                    f"{error} Move {cell.folder} away to run the cell again, or give the sweep "
                    "another folder with --output."
                ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cells:
    """The cells of a sweep that run now."""

    recipe: Path
    recipes: Mapping[str, Recipe]
    """As read, by the name of the cell."""
    view: LaunchView
    supervisor: Supervisor
    lender: Lender
    running: dict[str, tuple[Cell, Child]] = field(default_factory=dict)

    def run_all(self, waiting: list[Cell], at_once: int) -> Iterator[Cell]:
        """Yields the cells that fail."""
        while waiting or self.running:
            while waiting and len(self.running) < at_once:
                cell = waiting.pop(0)
                try:
                    self._start(cell)
                except (ProcessFailedError, RecipeError) as error:
                    self.view.say("cell", f"{cell.name}: {error}")
                    yield cell
            time.sleep(_POLL_S)
            self.lender.keep_running()
            yield from self._failed()

    def _start(self, cell: Cell) -> None:
        lent = self.lender.lend(self.recipes[cell.name])
        # Not beside the cells: a pattern such as none_* then names runs only.
        log = cell.folder.parent / "logs" / f"{cell.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.view.say("cell", f"{cell.name}: started (log: {log})")
        child = self.supervisor.start(
            cell.name,
            cell.command(self.recipe, lent),
            log=log,
            grace_s=_GRACE_S,
            environment=self.lender.keys,
        )
        self.running[cell.name] = (cell, child)

    def _failed(self) -> Iterator[Cell]:
        for cell, child in [pair for pair in self.running.values() if not pair[1].is_running]:
            del self.running[cell.name]
            status, _ = self.supervisor.ended(child)
            if status:
                self.view.say("cell", child.failure().ending)
                yield cell
