"""What a run will start and need, checked before anything starts. `--dry-run` prints it."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from openrlhf_alp.launch import machine
from openrlhf_alp.launch.commands import ROLLOUT_KEYS, TOOL_KEYS, Commands, Inputs
from openrlhf_alp.launch.recipe import Recipe, RecipeError, Source, nearest
from openrlhf_alp.launch.supervisor import Supervisor

_CHECK_GRACE_S = 1.0
_EVALUATIONS = ("evaluate-before", "evaluate-after")
_CHECKED = ("rollout-0", "tool-0", *_EVALUATIONS)
"""Processes whose program is asked about its options."""
_PROCESS_GB = 1.0
"""Interpreter, torch and the engine's own buffers, of each process that has a model."""
_URL = "http://127.0.0.1:{}"
"""In place of a URL that is known once a service has taken a free port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Memory or disk that is needed at least, in GB, and how it was computed."""

    where: str
    what: str
    gb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of the run as it will be started."""

    name: str
    command: list[str]
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Processes in the order of their start, and what they need."""

    recipe: Recipe
    folder: Path
    model: str
    """Folder of the policy, or an id that has not been fetched."""
    processes: tuple[Process, ...]
    needs: tuple[Need, ...] = ()
    shape: dict[str, Any] = field(default_factory=dict)
    """What the trainer's own parser says of the run, see `learner/flags/check.py`."""


def gpus_needed(recipe: Recipe) -> int:
    """GPUs of this machine that the recipe asks for."""
    servers = 0 if recipe.rollout.urls else recipe.rollout.servers
    learner = 0 if recipe.train.ray_address else recipe.train.gpus
    serving = servers * recipe.rollout.gpus
    return max(serving, learner) if recipe.train.shares_gpus else serving + learner


def make_plan(
    recipe: Recipe, folder: Path, model: str, gpus: Sequence[machine.Gpu], commands: Commands
) -> Plan:
    """The processes of `recipe` on `gpus`: first the servers', then the learner's."""
    names = iter([gpu.name for gpu in gpus])
    base = model
    logs, processes = folder / "logs", []
    rollout_urls, tool_urls = recipe.rollout.urls, recipe.tool.urls if recipe.tool else ()
    prompts = recipe.data.path or str(folder / "data" / "prompts.jsonl")
    if recipe.data.sources:
        command = commands.prepare(recipe, model=model, output=Path(prompts))
        processes.append(Process(name="data", command=command))
    if recipe.tool and not tool_urls:
        for name, port in named_ports("tool", recipe.tool.servers, recipe.tool.flags):
            command = commands.tool(recipe, url_file=logs / f"{name}.url", port=port)
            processes.append(Process(name=name, command=command))
            tool_urls += (_URL.format(port or name),)
    if recipe.model.warm_up_steps:
        output = folder / "warm-model"
        command = commands.warm_up(recipe, model=model, output=output)
        processes.append(Process(name="warm-up", command=command))
        model = str(output)
    if not rollout_urls:
        shared = Path("SHARED")
        for name, port in named_ports("rollout", recipe.rollout.servers, recipe.rollout.flags):
            url_file = logs / f"{name}.url"
            command = commands.rollout(
                recipe, model=model, url_file=url_file, port=port, weights_dir=shared
            )
            own = tuple(next(names) for _ in range(recipe.rollout.gpus))
            processes.append(Process(name=name, command=command, gpus=own))
            rollout_urls += (_URL.format(port or name),)
    inputs = Inputs(
        model=model,
        prompts=prompts,
        folder=folder,
        rollout_urls=rollout_urls,
        tool_urls=tool_urls,
    )
    left = [gpu.name for gpu in gpus] if recipe.train.shares_gpus else names
    own = tuple(itertools.islice(left, recipe.train.gpus))
    learner = Process(name="train", command=commands.train(recipe, inputs), gpus=own)
    before, after = (
        [
            Process(
                name=f"evaluate-{name}",
                command=commands.evaluate(recipe, inputs, folder / "evaluation" / name),
            )
        ]
        if recipe.evaluate and getattr(recipe.evaluate, name)
        else []
        for name in ("before", "after")
    )
    return Plan(
        recipe=recipe,
        folder=folder,
        model=base,
        processes=(*processes, *before, learner, *after),
    )


def named_ports(kind: str, servers: int, flags: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Name and port of each server; the ports follow the recipe's one, or are any free ones."""
    first = int(flags.get("port", 0))
    for index in range(servers):
        yield f"{kind}-{index}", first + index if first else 0


def check_plan(plan: Plan, source: Source, here: machine.Machine, supervisor: Supervisor) -> Plan:
    """`plan` with what its programs say of it.

    Raises:
        RecipeError: a flag, a value, a key, a port, the memory or the disk is not right.
    """
    _check_keys(plan.recipe)
    _check_ports(plan)
    with tempfile.TemporaryDirectory() as folder:
        # All at once: OpenRLHF takes several seconds to import.
        asked = {
            process.name: supervisor.start(
                f"The check of {process.name}",
                _check_command(plan, process),
                log=Path(folder) / process.name,
                grace_s=_CHECK_GRACE_S,
            )
            for process in plan.processes
            if process.name in (*_CHECKED, "train")
        }
        for name in _CHECKED:
            if child := asked.get(name):
                kind = name.partition("-")[0]
                _judge_program(plan, kind, source, supervisor.ended(child))
        shape = _judge_trainer(plan, source, supervisor.ended(asked["train"]))
    plan = replace(plan, shape=shape)
    plan = replace(plan, needs=tuple(_needs(plan)))
    _check_room(plan, here)
    return plan


def describe(plan: Plan, gpus: Sequence[machine.Gpu]) -> Iterator[tuple[str, str]]:
    """Lines of `--dry-run`: commands, GPUs, estimates."""
    yield "folder", str(plan.folder)
    for process in plan.processes:
        on = f"GPU {', '.join(process.gpus)}" if process.gpus else "CPU"
        yield process.name, f"on {on}: {shlex.join(process.command)}"
    if not plan.needs:
        yield "memory", f"unknown until {plan.recipe.model.path} is here"
    for need in plan.needs:
        yield "needs", f"{need.where}: at least {need.gb:.1f} GB ({need.what})"
    if gpus:
        spare = len(gpus) - gpus_needed(plan.recipe)
        yield "GPUs", f"{len(gpus)} free, {spare} of them not used by this run"


def _check_keys(recipe: Recipe) -> None:
    """Keys of services that somebody else started come from the environment."""
    needed = [*(ROLLOUT_KEYS if recipe.rollout.urls else ())]
    needed += TOOL_KEYS if recipe.tool and recipe.tool.urls else ()
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise RecipeError(
            f"{' and '.join(missing)} not set: urls names services that run already, and these are "
            "their keys. Export them."
        )


def _check_ports(plan: Plan) -> None:
    for process in plan.processes:
        if "--port" not in process.command:
            continue
        number = int(process.command[process.command.index("--port") + 1])
        if number:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", number))
                except OSError as error:
                    raise RecipeError(
                        f"{process.name}: port {number} is not free ({error.strerror}). Stop what "
                        "listens there, name another port, or leave port out for any free one."
                    ) from error


def _check_command(plan: Plan, process: Process) -> list[str]:
    if process.name != "train":
        # Both read every option, and end.
        return [*process.command, "--list" if process.name in _EVALUATIONS else "--check"]
    command, path = process.command, Path(plan.recipe.data.path or "")
    if "--entry" in command:
        command = shlex.split(command[command.index("--entry") + 1])
    question = {
        "argv": command[command.index("openrlhf_alp.cli.train_ppo_ray") + 1 :],
        "model": plan.model if Path(plan.model).is_dir() else None,
        # A path with a suffix is a file, also one that does not exist; others may be ids.
        "check_data": bool(path.is_file() or path.suffix),
    }
    return [sys.executable, "-m", "openrlhf_alp.learner.flags.check", json.dumps(question)]


def _judge_program(plan: Plan, kind: str, source: Source, answer: tuple[int, str]) -> None:
    status, output = answer
    if status == 0:
        return
    usage, _, wrong = output.partition("error: unrecognized arguments:")
    known = [name.replace("-", "_") for name in re.findall(r"--([a-z][\w.-]+)", usage)]
    for name in getattr(plan.recipe, kind).flags if wrong else ():
        if name not in known:
            where = source.place(f"{kind}.{name}")
            raise RecipeError(f"{where}: {kind} has no flag {name}.{nearest(name, known)}")
    last = output.strip().splitlines()[-1:]
    raise RecipeError(f"{source.path}, [{kind}]: {' '.join(last)}")


def _judge_trainer(plan: Plan, source: Source, answer: tuple[int, str]) -> dict[str, Any]:
    status, output = answer
    if status:
        raise RecipeError(f"the trainer's parser cannot be asked:\n{output[-2000:]}")
    shape: dict[str, Any] = json.loads(output.splitlines()[-1])
    known = [name.removeprefix("--") for name in shape.pop("names")]
    for name in plan.recipe.train.flags:
        if name not in known:
            where = source.place(f"train.{name}")
            raise RecipeError(f"{where}: the trainer has no flag {name}.{nearest(name, known)}")
    if error := shape.pop("error"):
        named = next((name for name in plan.recipe.train.flags if f"--{name}" in error), None)
        where = source.place(f"train.{named}") if named else f"{source.path}, [train]"
        raise RecipeError(f"{where}: {error}")
    return shape


def num_parameters(folder: Path) -> int | None:
    """Of a model folder, from the headers of its safetensors files; None when there are none."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as tensors:
            shapes = (tensors.get_slice(name).get_shape() for name in tensors.keys())  # noqa: SIM118
            total += sum(map(math.prod, shapes))
    return total or None


def _needs(plan: Plan) -> Iterator[Need]:
    """A lower bound: what cannot be computed without running, such as activations, is left out."""
    recipe, shape, folder = plan.recipe, plan.shape, Path(plan.model)
    parameters = num_parameters(folder)
    if parameters is None:
        return
    billions = parameters / 1e9
    if not recipe.rollout.urls:
        shards = max(1, recipe.rollout.gpus)
        cache = 0.0 if recipe.rollout.gpus else float(recipe.rollout.flags.get("kv_cache_gb", 1.0))
        kind = "each GPU of a server" if recipe.rollout.gpus else "host, each server"
        gb = 2 * billions / shards + cache + _PROCESS_GB
        what = f"2 bytes of {billions:.2f}e9 weights over {shards}, {cache:g} GB of cache, 1 GB"
        yield Need(where=kind, what=what, gb=gb)
    if not recipe.train.ray_address:
        yield _learner_need(recipe, shape, billions, _vocabulary(folder))
    keeps = float(recipe.train.flags.get("ckpt.save_steps", -1)) > 0
    kept = int(recipe.train.flags.get("ckpt.max_num", 3)) if keeps else 0
    what = f"the model and {kept} checkpoints of 14 bytes a weight"
    yield Need(where="disk of the run folder", what=what, gb=billions * (2 + 14 * kept))


def _learner_need(recipe: Recipe, shape: dict[str, Any], billions: float, vocabulary: int) -> Need:
    ranks, stage = shape["num_ranks"], shape["zero_stage"]
    weights = 2 / (ranks if stage == 3 else 1)
    gradients = 2 / (ranks if stage >= 2 else 1)
    on_gpu = recipe.train.gpus > 0
    states = 0.0 if on_gpu and shape["adam_offload"] else 12 / (ranks if stage >= 1 else 1)
    logits = 10 * shape["micro_batch_tokens"] * vocabulary / 1e9
    each = 1 if on_gpu else ranks
    return Need(
        where="each GPU of the learner" if on_gpu else "host, the learner",
        what=f"{weights + gradients + states:.1f} bytes of {billions:.2f}e9 weights, {logits:.1f} "
        f"GB of logits of {shape['micro_batch_tokens']} tokens, 1 GB; without activations",
        gb=each * (billions * (weights + gradients + states) + logits + _PROCESS_GB),
    )


def _vocabulary(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size", 0))


def _check_room(plan: Plan, here: machine.Machine) -> None:
    servers = plan.recipe.rollout.servers
    host = 0.0
    for need in plan.needs:
        if need.where.startswith("disk"):
            room, fix = machine.free_disk_gb(plan.folder), "set run.folder to another disk"
        elif "GPU" in need.where:
            room = min((gpu.memory_gb for gpu in here.free_gpus), default=0.0)
            fix = "use more GPUs, train.ds.zero_stage = 3, or train.ds.adam_offload = true"
        else:
            host += need.gb * (servers if "server" in need.where else 1)
            room, fix = here.memory_gb, "take a smaller model or batch, or another machine"
        needed = host if need.where.startswith("host") else need.gb
        if needed > room:
            raise RecipeError(
                f"too little room: {need.where} needs at least {need.gb:.1f} GB ({need.what}), "
                f"{needed:.1f} GB with what else is there, and there are {room:.1f} GB. To fix it, "
                f"{fix}."
            )
