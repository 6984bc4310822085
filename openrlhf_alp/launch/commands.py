"""The command line of each process of a run, made from its recipe."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf_alp.data.templates import INPUT_KEY, LABEL_KEY, TEMPLATES
from openrlhf_alp.launch.processes.servers import service_command
from openrlhf_alp.launch.recipe import Recipe, RecipeError
from openrlhf_alp.report.metrics import BATCHES, METRICS
from services.common.wire import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, TOOL_KEY_VARIABLE

_PREFLIGHT_ONCE = {"rollout.preflight_every": 10**9, "rollout.preflight_stop": True}
"""The first step is measured, and none after it."""

HOLD = "hold"
"""File of the run folder in which the learner says that it waits for an evaluation."""

_OWN_FLAGS = {
    "actor.model_name_or_path": "[model] path",
    "data.prompt_dataset": "[data]",
    "rollout.service_urls": "[rollout] servers or urls",
    "tool.service_urls": "[tool] servers or urls",
    "train.seed": "[run] seed",
    "ckpt.load_enable": "openrlhf-alp launch --resume RUN",
    "ckpt.path": "[run] folder",
    "ckpt.output_dir": "[run] folder",
    "eval.hold_steps": "[evaluate] every",
    "eval.hold_file": "[evaluate] every",
    "logger.metrics_jsonl": "[run] folder",
    "logger.tensorboard_dir": "[run] folder",
}
"""Flags of the trainer that follow from another place of the recipe -> that place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What is known once the services run."""

    model: str
    prompts: str
    folder: Path
    rollout_urls: Sequence[str]
    tool_urls: Sequence[str]
    resume: bool = False


def rollout_command(
    recipe: Recipe, *, model: str, url_file: Path, port: int, weights_dir: Path
) -> list[str]:
    """A rollout server. `port` 0 takes any free one; the service writes it to `url_file`."""
    gpus = recipe.rollout.gpus
    flags: dict[str, Any] = {
        "model": model,
        "seed": recipe.run.seed,
        # One for all servers, and the same after a restart: the learner writes each update once.
        "weights_dir": weights_dir,
        **({"tensor_parallel_size": gpus} if gpus > 1 else {}),
        # When nothing is said: learner and engine take turns on a CPU, so each may use every core.
        **({} if gpus else {"num_threads": os.cpu_count() or 1}),
        **recipe.rollout.flags,
    }
    return service_command("services.rollout", flags, url_file=url_file, port=port)


def tool_command(recipe: Recipe, *, url_file: Path, port: int) -> list[str]:
    """A tool server, with the best isolation that this machine allows."""
    assert recipe.tool is not None
    return service_command("services.tool", recipe.tool.flags, url_file=url_file, port=port)


def warm_up_command(recipe: Recipe, *, model: str, output: Path) -> list[str]:
    """The supervised warm-up that shows a model the form of a tool call."""
    steps, seed = recipe.model.warm_up_steps, recipe.run.seed
    return [
        *(sys.executable, "-m", "openrlhf_alp.launch.stages.warmup", "--model", model),
        *("--output", str(output), "--steps", str(steps), "--seed", str(seed)),
    ]


def prepare_command(recipe: Recipe, *, model: str, output: Path) -> list[str]:
    """`openrlhf-alp prepare-data` over the sources."""
    data = recipe.data
    command = [sys.executable, "-m", "openrlhf_alp.cli.main", "prepare-data"]
    command += ["--from", *data.sources, "--to", str(output), "--tokenizer", model, "--overwrite"]
    for name in (
        *("template", "format", "split", "problem_field", "label_field"),
        *("max_prompt_tokens", "pass_rates", "pass_rate", "limit", "workers"),
    ):
        if (value := getattr(data, name)) is not None:
            values = value if isinstance(value, tuple) else [value]
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
    return command


def train_command(recipe: Recipe, inputs: Inputs) -> list[str]:
    """The trainer, submitted to a Ray cluster when the recipe names one."""
    flags = train_flags(recipe, inputs)
    command = ["-m", "openrlhf_alp.cli.train_ppo_ray", *flags]
    if address := recipe.train.ray_address:
        # The cluster's own interpreter: this one's path may not exist there.
        entry = shlex.join(["python", *command])
        job = ("-m", "openrlhf_alp.launch.ray_job", "--address", address, "--entry", entry)
        return [sys.executable, *job]
    return [sys.executable, *command]


def train_flags(recipe: Recipe, inputs: Inputs) -> list[str]:
    """Flags of the trainer: those that follow from the recipe, then those of `[train]`.

    Raises:
        RecipeError: `[train]` sets one that follows from another place.
    """
    for name, place in _OWN_FLAGS.items():
        if name in recipe.train.flags:
            raise RecipeError(f"train.{name} follows from {place}: set it there.")
    folder, seed = inputs.folder, recipe.run.seed
    given: dict[str, Any] = {
        "actor.model_name_or_path": inputs.model,
        "data.prompt_dataset": inputs.prompts,
        "rollout.service_urls": list(inputs.rollout_urls),
        **({"tool.service_urls": list(inputs.tool_urls)} if inputs.tool_urls else {}),
        "actor.num_gpus_per_node": max(1, recipe.train.gpus),
        "ref.num_gpus_per_node": max(1, recipe.train.gpus),
        **_data_flags(recipe),
        "train.seed": seed,
        "alp.seed": seed,
        **(_PREFLIGHT_ONCE if recipe.run.preflight else {}),
        "logger.metrics_jsonl": folder / METRICS,
        "logger.tensorboard_dir": folder / "tensorboard",
        **({"alp.record": folder / BATCHES} if recipe.run.record else {}),
        "ckpt.path": folder / "checkpoints",
        "ckpt.output_dir": folder / "model",
        **({"ckpt.load_enable": True} if inputs.resume else {}),
        **_hold_flags(recipe, folder),
        **recipe.train.flags,
    }
    return list(_trainer_flags(given))


def _hold_flags(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What makes the learner wait while a step is evaluated."""
    if recipe.evaluate is None or not recipe.evaluate.every:
        return {}
    return {"eval.hold_steps": recipe.evaluate.every, "eval.hold_file": folder / HOLD}


def _data_flags(recipe: Recipe) -> dict[str, Any]:
    """What reads the prompt file: its fields, and what goes with the template it was made with."""
    fields = {"data.input_key": INPUT_KEY, "data.label_key": LABEL_KEY}
    if recipe.data.task:
        return {**fields, "data.apply_chat_template": True}
    if recipe.data.path:
        return fields
    if recipe.data.template not in TEMPLATES:
        raise RecipeError(
            f"data.template = {recipe.data.template!r}: it is none of {', '.join(TEMPLATES)}."
        )
    flags: dict[str, Any] = {}
    for text in TEMPLATES[recipe.data.template].train_flags.split("--")[1:]:
        name, _, value = text.strip().partition(" ")
        flags[name] = value or True
    return flags


def _trainer_flags(flags: Mapping[str, Any]) -> Iterable[str]:
    for name, value in flags.items():
        if value is False:
            continue  # its switches have no opposite
        yield f"--{name}"
        if value is not True:
            yield from map(str, value if isinstance(value, list) else [value])


def evaluate_command(recipe: Recipe, inputs: Inputs, output: Path) -> list[str]:
    """`openrlhf-alp evaluate` over the services of the run."""
    assert recipe.evaluate is not None
    tools = ["--tir", "--tool_urls", *inputs.tool_urls] if inputs.tool_urls else []
    return [
        *(sys.executable, "-m", "openrlhf_alp.cli.main", "evaluate"),
        *("--rollout_urls", *inputs.rollout_urls, *tools, "--tokenizer", inputs.model),
        *("--suite", *recipe.evaluate.suite, "--output", str(output)),
        *_trainer_flags({"seed": recipe.run.seed, **recipe.evaluate.flags}),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Commands:
    """How the processes are started; a test puts its own programs here."""

    rollout: Callable[..., list[str]] = rollout_command
    tool: Callable[..., list[str]] = tool_command
    warm_up: Callable[..., list[str]] = warm_up_command
    prepare: Callable[..., list[str]] = prepare_command
    train: Callable[..., list[str]] = train_command
    evaluate: Callable[..., list[str]] = evaluate_command


ROLLOUT_KEYS = (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE)
TOOL_KEYS = (TOOL_KEY_VARIABLE,)
