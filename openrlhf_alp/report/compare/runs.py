"""What is read of a run folder. A run that is broken or still going gives what it has, and says so.

recipe.toml       method, seed, condition, settings      metrics.jsonl   the steps
environment.json  commit, versions                       evaluation/     results before and after
summary.json      only of a finished run
"""

import hashlib
import json
import os
import re
import statistics
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from openrlhf_alp.report.metrics import (
    ENVIRONMENT,
    METRICS,
    RECIPE,
    REWARD,
    SUMMARY,
    StepMetrics,
    salvage_steps,
)
from openrlhf_alp.report.visible import visible

BEFORE, AFTER = "before", "after"
METHOD, SEED, CONDITION = "train.alp.method", "run.seed", "run.condition"
NO_METHOD = "openrlhf"
"""Method of a run that trains with OpenRLHF's own loss."""

_AT_STEP = "step-"
_MAX_DEPTH = 3
"""Folders below the one that was named in which runs are looked for."""
_LIVE_S = 600.0
"""A file that was written to within this time, or five steps, may belong to a run that goes on."""
_OF_SERVICES = ("port", "urls", "max_restarts", "ready_timeout_s")
_NOT_COMPARED = (
    *(METHOD, SEED, CONDITION),
    *("run.folder", "run.existing", "run.record", "train.alp.record"),
    # Where services listen and how long they are waited for is no condition of a run.
    *(f"{service}.{name}" for service in ("rollout", "tool") for name in _OF_SERVICES),
)
_TASK = ("data.task", "data.path", "data.sources")


@with_config({"extra": "ignore"})
class _Estimate(TypedDict):
    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


@with_config({"extra": "ignore"})
class _Suite(TypedDict):
    suite: str
    title: str
    avg: _Estimate
    pass_at: dict[int, _Estimate]


@with_config({"extra": "ignore"})
class _Results(TypedDict):
    suites: list[_Suite]


_RESULTS = TypeAdapter(_Results)
"""What is used of an evaluation."""


class NoRunsError(ValueError):
    """Nothing of what was named is a run. The message says what was looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run as it is on the disk."""

    folder: Path
    steps: Sequence[StepMetrics]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of recipe.toml, under dotted names; empty for a run that was started without a recipe."""

    environment: Mapping[str, Any] = field(default_factory=dict)
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """results.json of `openrlhf-alp evaluate` by when it was made: `before`, `step-N`, `after`."""

    state: str = "finished"
    """`finished`, `still going`, `not finished`, `not readable`, or `unknown` without a recipe."""

    digest: str = ""
    """First 12 hexadecimal digits of the SHA-256 of metrics.jsonl."""

    notes: Sequence[str] = ()
    """What is missing or odd, as sentences."""

    @property
    def name(self) -> str:
        """Of its folder, as it can be shown."""
        return visible(self.folder.name)

    @property
    def method(self) -> str:
        return visible(self.settings.get(METHOD, NO_METHOD if self.settings else "unknown"))

    @property
    def seed(self) -> int | None:
        """None for a run whose recipe has no whole number, which then pairs with no other."""
        found = self.settings.get(SEED)
        return found if isinstance(found, int) else None

    @property
    def condition(self) -> str:
        """As the recipe names it; what else differs is added by `conditions`."""
        return visible(self.settings.get(CONDITION, ""))

    @property
    def commit(self) -> str:
        return visible(self.environment.get("commit") or "")

    @property
    def versions(self) -> str:
        found = self.environment.get("versions")
        named = found.items() if isinstance(found, dict) else ()
        return ", ".join(visible(f"{package} {version}") for package, version in named)

    @property
    def task(self) -> str:
        return visible(" ".join(str(self.settings[key]) for key in _TASK if key in self.settings))

    def evaluated_at(self, name: str) -> int:
        """Steps that were made before the evaluation `name`."""
        if name.startswith(_AT_STEP):
            return int(name.removeprefix(_AT_STEP))
        return 0 if name == BEFORE or not self.steps else self.steps[-1].step

    def values(self, *names: str) -> dict[int, float]:
        """Step to value of the first of `names` that the run has; steps without it are left out."""
        for name in names:
            found = {s.step: s.values[name] for s in self.steps if name in s.values}
            if found:
                return found
        return {}


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Every run in the folders that were named, or below them.

    Raises:
        NoRunsError: there is no run, or a path does not exist.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        found = list(_run_folders(path if path.name != METRICS else path.parent, _MAX_DEPTH))
        if not found:
            what = "is no folder" if not path.exists() else f"has no {METRICS} or {RECIPE}"
            raise NoRunsError(
                f"{visible(path)} {what}, so there is no run in it. Name run folders, such as "
                "runs/demo, or a folder of them"
            )
        folders |= dict.fromkeys(folder.resolve() for folder in found)
    return [_read_run(folder) for folder in folders]


def conditions(runs: Sequence[Run]) -> list[str]:
    """What sets each run apart besides method and seed.

    That is `run.condition`, and how the settings of the runs that share it differ. A run without a
    recipe stands for itself.
    """
    known = [run for run in runs if run.settings]
    differing = {
        condition: _differing([run.settings for run in known if run.condition == condition])
        for condition in {run.condition for run in known}
    }
    return [_label(run, differing[run.condition]) if run.settings else run.name for run in runs]


def notes_of(runs: Sequence[Run]) -> list[str]:
    """What a reader has to know before comparing these runs."""
    named: dict[str, list[str]] = {}
    for run in runs:
        for note in run.notes:
            named.setdefault(visible(note), []).append(run.name)
    notes = [f"{', '.join(names)}: {note}" for note, names in named.items()]
    tasks = dict.fromkeys(run.task for run in runs if run.task)
    if len(tasks) > 1:
        notes.append(f"Runs of different tasks ({', '.join(tasks)}): rewards are not comparable.")
    commits = dict.fromkeys(run.commit[:12] for run in runs if run.commit)
    if len(commits) > 1:
        notes.append(f"Runs of different commits: {', '.join(commits)}.")
    return notes


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if _is_closed(folder) or (folder / METRICS).is_file() or (folder / RECIPE).is_file():
        yield folder
    elif depth and folder.is_dir():
        for child in sorted(folder.iterdir()):
            if child.is_dir():
                yield from _run_folders(child, depth - 1)


def _is_closed(folder: Path) -> bool:
    return folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK)


def _read_run(folder: Path) -> Run:
    notes: list[str] = []
    if _is_closed(folder):
        notes.append("this user may not read the folder, so nothing of it is shown.")
        return Run(folder=folder, steps=(), state="not readable", notes=notes)
    steps = _steps(folder, notes)
    settings = dict(
        _dotted(_parsed(folder / RECIPE, notes, "method, seed and settings are unknown"))
    )
    if not isinstance(settings.get(SEED, 0), int):
        notes.append(f"{SEED} is {settings[SEED]!r} and no whole number: it pairs with no run.")
    environment = _parsed(folder / ENVIRONMENT, notes, "commit and versions are unknown")
    state = _state(folder, steps, notes)
    if steps and not any(name.startswith("alp/") for step in steps for name in step.values):
        notes.append(
            "no metric begins with alp/, so ratios, KL and sigma are not shown. The run used "
            "OpenRLHF's own loss, or a version with other names."
        )
    if steps and not any(REWARD in step.values for step in steps):
        notes.append(f"there is no {REWARD}, so its reward is not shown.")
    return Run(
        folder=folder,
        steps=steps,
        settings=settings,
        environment=environment,
        evaluations=dict(_evaluations(folder, notes)),
        state=state,
        digest=_digest(folder / METRICS),
        notes=notes,
    )


def _steps(folder: Path, notes: list[str]) -> list[StepMetrics]:
    if not (folder / METRICS).is_file():
        return []  # its state says how many steps it has made
    try:
        steps, left_out = salvage_steps(folder / METRICS)
    except OSError as error:
        notes.append(f"{METRICS} cannot be read ({error.strerror}): its steps are not shown.")
        return []
    notes += left_out
    return steps


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError:  # its steps are missing too, which a note says
        return ""


def _parsed(path: Path, notes: list[str], consequence: str) -> dict[str, Any]:
    if not path.is_file():
        notes.append(f"there is no {path.name}: {consequence}.")
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        found: dict[str, Any] = (
            tomllib.loads(text) if path.suffix == ".toml" else dict(json.loads(text))
        )
    except (ValueError, TypeError, OSError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read ({error}): {consequence}.")
        return {}
    return found


def _state(folder: Path, steps: Sequence[StepMetrics], notes: list[str]) -> str:
    # Only a launch of a recipe writes a summary.
    if not (folder / RECIPE).is_file() and not (folder / SUMMARY).is_file():
        return "unknown"
    if (folder / SUMMARY).is_file():
        if not steps:
            notes.append(f"it is finished, and no step of {METRICS} can be shown.")
        return "finished"
    lasted = [step.values.get("timing/step_total", 0.0) for step in steps]
    live_s = max(_LIVE_S, 5 * (statistics.median(lasted) if lasted else 0.0))
    newest = max(
        (path.stat().st_mtime for path in (folder / METRICS, folder / RECIPE) if path.exists()),
        default=0.0,
    )
    if time.time() - newest < live_s:
        notes.append(f"it is still going, or was stopped a moment ago: {len(steps)} steps so far.")
        return "still going"
    notes.append(
        f"it ended without {SUMMARY} after {len(steps)} steps: it failed or was stopped. "
        "logs/ says why."
    )
    return "not finished"


def _evaluations(folder: Path, notes: list[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    names = [path.parent.name for path in folder.glob("evaluation/*/results.json")]
    steps = [n for n in names if re.fullmatch(rf"{_AT_STEP}\d+", n)]
    ordered = [BEFORE, *sorted(steps, key=lambda n: int(n.removeprefix(_AT_STEP))), AFTER]
    for name in (n for n in ordered if n in names):
        path = folder / "evaluation" / name / "results.json"
        consequence = f"evaluation {name} is not shown"
        if not (results := _parsed(path, notes, consequence)):
            continue
        try:
            checked: Mapping[str, Any] = _RESULTS.validate_python(results)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            notes.append(f"{path.name}, {place}: {first['msg']}. So {consequence}.")
            continue
        yield name, checked


def _dotted(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            # Python writes no more than 4,300 digits.
            too_long = isinstance(value, int) and value.bit_length() > 64
            yield f"{prefix}{key}", hex(value) if too_long else value


def _differing(compared: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for settings in compared for name in settings)
    return [
        name
        for name in names
        if name not in _NOT_COMPARED and len({str(s.get(name)) for s in compared}) > 1
    ]


def _label(run: Run, names: Sequence[str]) -> str:
    settings = run.settings
    short = {name: name.rpartition(".")[2] for name in names}
    parts = [f"{short[name]}={settings[name]}" for name in names if name in settings]
    unset = [f"{short[name]} not set" for name in names] if not parts else []
    return ", ".join([*filter(None, [run.condition]), *map(visible, parts or unset)])
