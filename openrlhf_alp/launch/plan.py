"""What a run will start and need, checked before anything starts. `--dry-run` prints it."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from openrlhf_alp.launch import machine, weights_folder
from openrlhf_alp.launch.commands import ROLLOUT_KEYS, TOOL_KEYS, Commands, Inputs
from openrlhf_alp.launch.processes.servers import Server
from openrlhf_alp.launch.processes.supervisor import Supervisor
from openrlhf_alp.launch.recipe import Recipe, RecipeError, Services, Source, nearest
from openrlhf_alp.report import tracking
from services.common.wire import require_keys

_CHECK_GRACE_S = 1.0
_PROGRAMS = {"rollout": "--check", "tool": "--check", "evaluate": "--list"}
"""Kind of process -> option with which its program reads every other one, and ends."""
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
    base: str
    """Folder of the model that the recipe names, or an id that has not been fetched."""
    inputs: Inputs
    """Before the services run their URLs are placeholders."""
    tools: tuple[Server, ...]
    rollouts: tuple[Server, ...]
    weights_dir: Path
    processes: tuple[Process, ...]
    needs: tuple[Need, ...] = ()
    shape: dict[str, Any] = field(default_factory=dict)
    """What the trainer's own parser says of the run, see `learner/flags/check.py`."""

    def process(self, name: str) -> Process:
        """The process of this name."""
        return next(process for process in self.processes if process.name == name)


def gpus_needed(recipe: Recipe) -> int:
    """GPUs of this machine that the recipe asks for."""
    servers = 0 if recipe.rollout.urls else recipe.rollout.servers
    learner = 0 if recipe.train.ray_address else recipe.train.gpus
    serving = servers * recipe.rollout.gpus
    return max(serving, learner) if recipe.train.shares_gpus else serving + learner


def make_plan(
    recipe: Recipe,
    folder: Path,
    model: str,
    gpus: Sequence[machine.Gpu],
    commands: Commands,
    *,
    resume: bool = False,
) -> Plan:
    """The processes of `recipe` on `gpus`: first the servers', then the learner's."""
    names = iter([gpu.name for gpu in gpus])
    folder = folder.resolve()
    prompts = recipe.data.path or str(folder / "data" / "prompts.jsonl")
    trained = str(folder / "warm-model") if recipe.model.warm_up_steps else model
    shared = weights_folder.weights_dir(folder)
    tools = _servers("tool", recipe.tool, folder, partial(commands.tool, recipe))
    start = partial(commands.rollout, recipe, model=trained, weights_dir=shared)
    rollouts = _servers("rollout", recipe.rollout, folder, start)
    inputs = Inputs(
        model=trained,
        prompts=prompts,
        folder=folder,
        rollout_urls=recipe.rollout.urls or _urls(rollouts),
        tool_urls=recipe.tool.urls or _urls(tools) if recipe.tool else (),
        resume=resume,
    )
    processes: list[Process] = []

    def add(name: str, command: list[str], gpus: Iterable[str] = (), num_gpus: int = 0) -> None:
        own = tuple(itertools.islice(gpus, num_gpus))
        if len(own) > 1 and any(gpu.startswith(machine.SLICE) for gpu in own):
            raise RecipeError(
                f"{name} would get {', '.join(own)}, and CUDA shows a process one slice of a GPU. "
                "Ask for one GPU each with rollout.gpus and train.gpus."
            )
        processes.append(Process(name=name, command=command, gpus=own))

    if recipe.data.sources:
        add("data", commands.prepare(recipe, model=model, output=Path(prompts)))
    for server in tools:
        add(server.name, server.command(server.port))
    if recipe.model.warm_up_steps:
        add("warm-up", commands.warm_up(recipe, model=model, output=trained))
    for server in rollouts:
        add(server.name, server.command(server.port), names, recipe.rollout.gpus)
    stages = recipe.evaluate.names if recipe.evaluate else []
    stages.insert("before" in stages, "train")
    for name in stages:
        if name == "train":
            left = iter([gpu.name for gpu in gpus]) if recipe.train.shares_gpus else names
            add(name, commands.train(recipe, inputs), left, recipe.train.gpus)
        else:
            command = commands.evaluate(recipe, inputs, folder / "evaluation" / name)
            add(f"evaluate-{name}", command)
    return Plan(
        recipe=recipe,
        base=model,
        inputs=inputs,
        tools=tools,
        rollouts=rollouts,
        weights_dir=shared,
        processes=tuple(processes),
    )


def _servers(
    kind: str, how: Services | None, folder: Path, command: Callable[..., list[str]]
) -> tuple[Server, ...]:
    """The servers to start; their ports follow the recipe's one, or are any free ones."""
    if how is None or how.urls:
        return ()
    first = how.port
    servers = []
    for index in range(how.servers):
        url_file = folder / "logs" / f"{kind}-{index}.url"
        server = Server(
            name=url_file.stem,
            command=lambda port, file=url_file: command(  # type: ignore[misc]
                url_file=file, port=port
            ),
            url_file=url_file,
            port=first and first + index,
            ready_timeout_s=how.ready_timeout_s,
            max_restarts=how.max_restarts,
        )
        servers.append(server)
    return tuple(servers)


def _urls(servers: Sequence[Server]) -> tuple[str, ...]:
    return tuple(_URL.format(server.port or server.name) for server in servers)


def check_plan(plan: Plan, source: Source, here: machine.Machine, supervisor: Supervisor) -> Plan:
    """`plan` with what its programs say of it.

    Raises:
        RecipeError: a flag, a value, a key, a port, the memory or the disk is not right.
    """
    _check_surroundings(plan.recipe)
    _check_code(plan.recipe, source)
    _check_ports(plan)
    # One of each kind: they share their options.
    kinds = {process.name.partition("-")[0]: process for process in reversed(plan.processes)}
    with tempfile.TemporaryDirectory() as folder:
        # All at once: OpenRLHF takes several seconds to import.
        asked = {
            kind: supervisor.start(
                f"The check of {kind}",
                _check_command(plan, kind, process),
                log=Path(folder) / kind,
                grace_s=_CHECK_GRACE_S,
            )
            for kind, process in kinds.items()
            if kind in (*_PROGRAMS, "train")
        }
        for kind in [kind for kind in _PROGRAMS if kind in asked]:
            _judge_program(plan, kind, source, supervisor.ended(asked[kind]))
        shape = _judge_trainer(plan, source, supervisor.ended(asked["train"]))
    plan = replace(plan, shape=shape)
    plan = replace(plan, needs=tuple(_needs(plan)))
    _check_room(plan, here)
    return plan


def describe(plan: Plan, gpus: Sequence[machine.Gpu]) -> Iterator[tuple[str, str]]:
    """Lines of `--dry-run`: commands, GPUs, estimates."""
    yield "folder", str(plan.inputs.folder)
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


def _check_surroundings(recipe: Recipe) -> None:
    """Keys of services that somebody else started come from the environment; packages are there."""
    if recipe.run.trackio and not tracking.is_installed():
        raise RecipeError(f"run.trackio needs the package trackio: {tracking.INSTALL}")
    try:
        if recipe.rollout.urls:
            require_keys(*ROLLOUT_KEYS, service="rollout")
        if recipe.tool and recipe.tool.urls:
            require_keys(*TOOL_KEYS, service="tool")
    except ValueError as error:
        raise RecipeError(str(error)) from error


def _check_code(recipe: Recipe, source: Source) -> None:
    """A reward or an agent of one's own; on a cluster its path may be another one."""
    for name, given in recipe.train.flags.items() if not recipe.train.ray_address else ():
        for path in given if isinstance(given, list) else [given]:
            if str(path).endswith(".py") and not Path(path).is_file():
                where = source.place(f"train.{name}")
                raise RecipeError(f"{where}: {name} = {path}: there is no such file from here.")


def _check_ports(plan: Plan) -> None:
    for server in (*plan.tools, *plan.rollouts):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", server.port))
            except (OSError, OverflowError) as error:
                raise RecipeError(
                    f"{server.name}: port {server.port} is not free ({error}). Stop what "
                    "listens there, name another port, or leave port out for any free one."
                ) from error


def _check_command(plan: Plan, kind: str, process: Process) -> list[str]:
    if option := _PROGRAMS.get(kind):
        return [*process.command, option]
    command, path = process.command, Path(plan.recipe.data.path or "made later")
    if "--entry" in command:
        command = shlex.split(command[command.index("--entry") + 1])
    question = {
        "argv": command[command.index("openrlhf_alp.cli.train_ppo_ray") + 1 :],
        "model": plan.base if Path(plan.base).is_dir() else None,
        # A path with a suffix is a file, also one that does not exist; other relative ones may be
        # ids.
        "check_data": bool(path.exists() or path.suffix or path.is_absolute()),
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
    """Of a model folder, from the headers of its safetensors files; None when there are none.

    Raises:
        RecipeError: a file is broken, or there are no weights of any kind.
    """
    total = 0
    for file in folder.glob("*.safetensors"):
        try:
            with safe_open(file, "numpy") as tensors:
                shapes = (tensors.get_slice(name).get_shape() for name in tensors.keys())  # noqa: SIM118
                total += sum(map(math.prod, shapes))
        except SafetensorError as error:
            raise RecipeError(
                f"{file} is broken ({error}), as when a download or a copy was cut off. Fetch the "
                "model again."
            ) from error
    if not total and folder.is_dir() and not any(folder.glob("*.bin")):
        raise RecipeError(
            f"{folder} has no weights (*.safetensors or *.bin): fetch the whole model, or set "
            "model.path to another one."
        )
    return total or None


def _needs(plan: Plan) -> Iterator[Need]:
    """A lower bound: what cannot be computed without running, such as activations, is left out."""
    recipe, shape, folder = plan.recipe, plan.shape, Path(plan.base)
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
    kept = shape["num_checkpoints"]
    what = f"the model and {kept} checkpoints of 14 bytes a weight"
    yield Need(where="disk of the run folder", what=what, gb=billions * (2 + 14 * kept))


def _learner_need(recipe: Recipe, shape: dict[str, Any], billions: float, vocabulary: int) -> Need:
    ranks, stage = shape["num_ranks"], shape["zero_stage"]
    each_bytes = shape["weight_bytes"]
    weights = each_bytes / (ranks if stage == 3 else 1)
    gradients = each_bytes / (ranks if stage >= 2 else 1)
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
            room, fix = machine.free_disk_gb(plan.inputs.folder), "set run.folder to another disk"
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
