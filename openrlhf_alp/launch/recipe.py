"""What a recipe holds: a TOML file that says what a run starts, trains and writes.

    [run]      folder, seed            [rollout]  servers, GPUs of each, flags of services.rollout
    [model]    the policy              [tool]     servers, flags of services.tool
    [data]     task, file or sources   [train]    GPUs, and flags of the trainer by their names
    [evaluate] problem sets            [sweep]    values and conditions of several runs

Imports neither torch nor anything of the learner, so that a mistake is reported at once.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SMOLLM2 = "smollm2"
"""Value of `[model] path` that stands for SmolLM2-135M-Instruct from its installed package."""


NO_TOML = (ValueError, RecursionError)
"""What the parser raises: also for a number of thousands of digits, or as many brackets."""


class RecipeError(Exception):
    """A recipe, a setting or a folder cannot be used. The message says why and what to do."""


class Section(BaseModel):
    """One table of a recipe."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        ser_json_inf_nan="constants",  # TOML has them
    )


class Run(Section):
    folder: Path | None = None
    """Where everything is written; default: runs/NAME of the recipe file."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of a made task, of sampling, of training and of the noise; NumPy takes 32 bits."""
    existing: Literal["refuse", "aside"] = "refuse"
    """What becomes of an earlier run in the folder: stop and say so, or move it aside."""
    preflight: bool = True
    """Measure the log-prob mismatch before the first update, and stop when it is broken."""
    record: bool = False
    """Record the batch of every step in batches/ of the run folder (`--alp.record`)."""
    condition: str = ""
    """What sets this run apart from others in a report, besides its method and seed."""
    trackio: str | None = None
    """Project of Trackio that gets the steps, under the name of the run's folder."""


class Model(Section):
    path: str
    """Folder or Hugging Face id of the policy; `smollm2` is the one of the installed package."""
    warm_up_steps: int = Field(default=0, ge=0)
    """Supervised steps on made tool calls before training (task multiplication only)."""


class Data(Section):
    """One of `task`, `path` and `sources`."""

    task: Literal["addition", "multiplication"] | None = None
    """A made task, with held-out questions that are asked before and after training."""
    steps: int | None = Field(default=None, ge=1)
    """How many steps the questions of a made task are for."""
    path: str | None = None
    """A prompt file that is ready to train on, or a Hugging Face id."""
    sources: tuple[str, ...] = ()
    """What `openrlhf-alp prepare-data --from` takes; the other fields are its options."""
    template: str = "chat-math"
    format: str | None = None
    split: str | None = None
    problem_field: str | None = None
    label_field: str | None = None
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    pass_rates: str | None = None
    pass_rate: tuple[float, float] | None = None
    limit: int | None = Field(default=None, ge=1)
    workers: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _is_one_kind(self) -> Data:
        given = [name for name in ("task", "path", "sources") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give one of task, path and sources, not {given or 'none'}")
        if (self.task is None) != (self.steps is None):
            raise ValueError("task and steps go together: a made task needs a number of steps")
        return self


class _Flagged(Section):
    """A table whose other keys are flags of a program, checked by that program itself."""

    flags: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _flags_apart(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "flags" in given:
            return given
        own = {key: value for key, value in given.items() if key in cls.model_fields}
        others = {key: value for key, value in given.items() if key not in own}
        return {**own, "flags": flatten(others)}


class Services(_Flagged):
    servers: int = Field(default=1, ge=1, le=1000)
    """How many to start on this machine."""
    port: int = Field(default=0, ge=0, le=65535)
    """Port of the first one, the others have those after it; 0: any free ones."""
    urls: tuple[str, ...] = ()
    """Services that run already, instead; their keys are taken from the environment."""
    max_restarts: int = Field(default=3, ge=0)
    """How often one of them may be started again when it ends during training."""
    ready_timeout_s: float = Field(default=900.0, gt=0)
    """How long one may take until it answers."""


class Rollout(Services):
    gpus: int = Field(default=0, ge=0)
    """GPUs of each server (tensor parallel); 0 serves on the CPU."""


class Train(_Flagged):
    gpus: int = Field(default=0, ge=0)
    """GPUs of the learner on this machine; 0 learns on the CPU."""
    shares_gpus: bool = False
    """Learn on the GPUs that serve, which then need a rollout.gpu_memory_utilization for both."""
    ray_address: str | None = None
    """Dashboard address of a running Ray cluster, such as http://head:8265, that is to train."""


class Evaluate(_Flagged):
    """What `openrlhf-alp evaluate` asks over the run's own services; other keys are its options."""

    suite: tuple[str, ...] = Field(min_length=1)
    """Published sets or files of your own."""
    before: bool = True
    """Evaluate the policy that training starts from."""
    every: int = Field(default=0, ge=0)
    """Evaluate after every so many steps, while the learner waits; 0: never."""
    after: bool = True
    """Evaluate the trained policy."""

    @property
    def names(self) -> list[str]:
        """What is evaluated, in this order; the names of folders."""
        step = f"step-{self.every}"
        wanted = {"before": self.before, step: bool(self.every), "after": self.after}
        return [name for name, is_wanted in wanted.items() if is_wanted]


class Sweep(Section):
    """Several runs of the recipe, one for every combination; see `launch/sweep.py`."""

    conditions: dict[str, dict[str, Any]] = {}
    """Name of a condition to the settings that make it; the runs have it as `run.condition`."""
    values: dict[str, list[Any]] = {}
    """Setting to the values that it takes in turn."""

    @model_validator(mode="before")
    @classmethod
    def _dotted(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        tables = dict(given)
        if isinstance(conditions := given.get("conditions"), dict):
            tables["conditions"] = {name: _flat(table) for name, table in conditions.items()}
        return {**tables, "values": _flat(given.get("values", {}))}


class Recipe(Section):
    """The whole file."""

    run: Run = Field(default_factory=Run)
    model: Model
    data: Data
    rollout: Rollout = Field(default_factory=Rollout)
    tool: Services | None = None
    train: Train
    evaluate: Evaluate | None = None
    sweep: Sweep = Field(default_factory=Sweep)

    @model_validator(mode="after")
    def _fit_together(self) -> Recipe:
        if self.model.warm_up_steps and self.data.task != "multiplication":
            raise ValueError("model.warm_up_steps goes with data.task = 'multiplication' only")
        if self.train.ray_address and not self.rollout.urls:
            raise ValueError(
                "train.ray_address needs rollout.urls: the learner runs elsewhere and would not "
                "reach a service on this machine's loopback address"
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A recipe file, and where each of its keys is written."""

    path: Path
    settings: Mapping[str, Any]
    """As parsed, with `--set` in it."""
    lines: Mapping[str, int] = field(default_factory=dict)

    def place(self, key: str) -> str:
        """Where `key` was given: "FILE, line N", or the command line."""
        line = self.lines.get(key)
        return f"{self.path}, line {line}" if line else f"--set {key}"


def read_recipe(path: Path, settings: Sequence[str] = ()) -> tuple[Recipe, Source]:
    """The recipe in `path`, with `KEY=VALUE` settings put over it.

    Raises:
        RecipeError: names file, line, key and the nearest right key.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
        tables = tomllib.loads(text)
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read ({error.strerror}). Give a recipe file."
        ) from error
    except NO_TOML as error:
        raise RecipeError(f"{path} is no TOML: {error}. Correct that place.") from error
    lines = _lines_of(text)
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise RecipeError(f"--set {setting}: write it as --set train.alp.method=seq-bypass")
        _put(tables, key.strip(), _value(value.strip()))
        lines.pop(key.strip(), None)
    tables = _at_home(tables)
    source = Source(path=path, settings=tables, lines=lines)
    try:
        return Recipe.model_validate(tables), source
    except ValidationError as error:
        problems = [_explain(problem, source) for problem in error.errors()]
        raise RecipeError("\n".join(problems)) from error


def nearest(name: str, names: Sequence[str]) -> str:
    """ " Did you mean ...?", or nothing when no name is near."""
    found = get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {found[0]}?" if found else ""


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _flat(table: Any) -> Any:
    """As `flatten`; what is no table is left to pydantic, which says so."""
    return flatten(table) if isinstance(table, Mapping) else table


def to_settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting of a recipe under its dotted name, defaults included."""
    tables = recipe.model_dump(mode="json", exclude_none=True)
    for table in tables.values():
        table |= table.pop("flags", {})
    return flatten(tables)


def to_toml(recipe: Recipe) -> str:
    """A recipe file that gives `recipe` again."""
    lines: list[str] = []
    table = ""
    for name, value in to_settings(recipe).items():
        section, _, key = name.partition(".")
        if section != table:
            lines += ["", f"[{section}]"]
            table = section
        lines.append(f"{key} = {to_value(value)}")
    return "\n".join(lines[1:]) + "\n"


def to_value(value: Any) -> str:
    """A value as TOML and `--set` have it."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(to_value, value))}]"
    # JSON's strings, numbers and booleans are TOML's too; its escapes of two halves are not.
    text = json.dumps(value, default=str, ensure_ascii=False).replace("\x7f", "\\u007f")
    return {"NaN": "nan", "Infinity": "inf", "-Infinity": "-inf"}.get(text, text)


def as_setting(value: Any) -> str:
    """What `--set KEY=` needs to have `value`: a text without quotes where it is none other's."""
    if isinstance(value, str) and value == value.strip() and _value(value) == value:
        return value
    return to_value(value)


def _explain(problem: Any, source: Source) -> str:
    where = [str(part) for part in problem["loc"]]
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        section = Recipe.model_fields.get(where[0]) if len(where) > 1 else None
        kind = section.annotation if section else Recipe
        known = list(getattr(kind, "model_fields", {}))
        return f"{source.place(key)}: there is no setting {key}.{nearest(where[-1], known)}"
    if problem["type"] == "missing":
        return f"{source.path}: {key} is missing."
    text = problem["msg"].removeprefix("Value error, ")
    at = f"{source.place(key)}: {key} = {problem['input']!r}: " if len(where) > 1 else ""
    return f"{at or f'{source.path}: ' + (f'[{key}] ' if key else '')}{text}."


def _lines_of(text: str) -> dict[str, int]:
    """Dotted name of a key or table -> its line, from 1."""
    lines: dict[str, int] = {}
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", line):
            table = header[1].replace(" ", "").replace('"', "")
            lines.setdefault(table, number)
        elif key := re.match(r"\s*([\w.\"-]+)\s*=", line):
            name = key[1].replace('"', "")
            lines.setdefault(f"{table}.{name}" if table else name, number)
    return lines


def _at_home(value: Any) -> Any:
    """`~/` as a shell has it, in whatever names a file; no shell has seen a recipe."""
    if isinstance(value, dict):
        return {key: _at_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_at_home(inner) for inner in value]
    is_path = isinstance(value, str) and (value == "~" or value.startswith("~/"))
    # Not Path's: it raises where nobody has a home, as in a container.
    return os.path.expanduser(value) if is_path else value


def _put(tables: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tables = tables.setdefault(parent, {})
        if not isinstance(tables, dict):
            raise RecipeError(f"--set {key}: {parent} is a value, not a table")
    tables[last] = value


def _value(text: str) -> Any:
    """A TOML value; anything else is a string, so that a shell needs no second quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except NO_TOML:
        return text
