"""Start a run: check what can be checked before Ray starts, then hand over to OpenRLHF.

Flags, model folder, data and services are checked here, in the driver, within seconds. What goes
wrong later is reported as one sentence and a non-zero exit status.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
import torch
from transformers import AutoConfig, AutoTokenizer

from openrlhf_alp.clients.contract import (
    LearnerExpectation,
    check_contract,
    require_transport,
    simulated_mismatch,
)
from openrlhf_alp.clients.control import ControlClient
from openrlhf_alp.clients.errors import ServiceError, WeightUpdateFailed
from openrlhf_alp.clients.weights.carry import require_fit
from openrlhf_alp.data.sources import PATTERN_CHARS
from openrlhf_alp.episodes.observation import chat_template
from openrlhf_alp.episodes.records import EpisodeError
from openrlhf_alp.learner import seams
from openrlhf_alp.learner.flags.config import MATH_VERIFY, ServiceConfig
from openrlhf_alp.learner.flags.describe import describe
from openrlhf_alp.learner.flags.labels import check_labels_of
from openrlhf_alp.learner.flags.settle import add_arguments, settle
from openrlhf_alp.learner.weight_sync import pushed_tensors
from openrlhf_alp.rollouts.runners import ToolConfig, tool_client
from services.common.wire import (
    ADMIN_KEY_VARIABLE,
    API_KEY_VARIABLE,
    TOOL_KEY_VARIABLE,
    read_key_files,
)
from services.tool.wire.schemas import ExecuteRequest

logger = logging.getLogger(__name__)

LOGICAL_DEVICES = 8
"""Slots that a local Ray offers on a machine without GPUs; OpenRLHF asks for one per model."""

KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Let glibc keep freed tensors of less than 32 MB, and map larger ones in huge pages; by default it
maps nearly all of them anew in every layer. MALLOC_MMAP_MAX_=0 in the environment keeps them all:
an update then takes a sixth less time, and half as much memory again, because no other tensor
fits into the holes that large ones leave. Other C libraries ignore these."""


class LaunchError(Exception):
    """The run cannot start: flags, model or service are not right. Exit status 2."""


class _DryRun(Exception):
    """Ends a run with --dry_run where OpenRLHF would validate its flags; what it would do."""


def launch() -> int:
    """Run OpenRLHF's main program with our classes in it. Returns the exit status."""
    try:
        seams.run_upstream(add_arguments, _settle_and_check, ray_options)
    except _DryRun as planned:
        print(planned)
        return 0
    except (LaunchError, seams.UpstreamDriftError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except AssertionError as refusal:  # how OpenRLHF validates; its workers' arrive as RayError
        print(f"error: OpenRLHF does not take these flags: {refusal}", file=sys.stderr)
        return 2
    except (ray.exceptions.RayError, ServiceError, EpisodeError, RuntimeError) as error:
        _explain(error)
        return 1
    finally:
        ray.shutdown()
    return 0


def _settle_and_check(args: SimpleNamespace) -> SimpleNamespace:
    try:
        read_key_files()
        settle(args)
        if args.alp.dry_run:
            raise _DryRun(describe(args))
        check_data(args)
        tokenizer = check_model(args.actor.model_name_or_path)
        check_tools(args, tokenizer)  # first: it takes seconds, a model may take minutes to load
        if args.rollout_service.urls:
            check_services(args, tokenizer)
    except (ValueError, OSError, ServiceError) as error:
        raise LaunchError(str(error)) from error
    return args


def ray_options(args: SimpleNamespace, upstream_env: dict[str, str]) -> dict[str, Any]:
    """Arguments of `ray.init`: our shims in every worker, and logical GPUs where there are none.

    Args:
        args: settled.
        upstream_env: what OpenRLHF sets in its workers' environment; ours is added.
    """
    env = dict(upstream_env)
    devices = {}
    if not torch.cuda.is_available():
        # Ray gives a worker one OpenMP thread per logical CPU it asked for, that is one; the
        # policy's workers are the only ones that compute, and they share the cores.
        workers = args.actor.num_nodes * args.actor.num_gpus_per_node
        threads = max(1, (os.cpu_count() or 1) // workers)
        env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
        env["TORCHDYNAMO_DISABLE"] = "1"
        env |= {k: os.environ.get(k, v) for k, v in KEEP_MEMORY.items()}
        # Ray runs its workers at nice 15; on a CPU machine they do all the work.
        os.environ.setdefault("RAY_worker_niceness", "0")
        if "RAY_ADDRESS" not in os.environ:
            devices = {"num_cpus": LOGICAL_DEVICES, "num_gpus": LOGICAL_DEVICES}
    return {
        **devices,
        "include_dashboard": False,
        "runtime_env": {
            "env_vars": env,
            # Not `install`: it imports torch, and Ray starts a worker for every logical CPU.
            "worker_process_setup_hook": "openrlhf_alp.learner.compat.install_before_use",
        },
    }


def _explain(error: Exception) -> None:
    """Traceback for the log, then one sentence with the innermost cause."""
    traceback.print_exception(error)
    cause: BaseException = error
    while isinstance(cause, ray.exceptions.RayTaskError) and cause.cause is not None:
        cause = cause.cause
    print(f"\nerror: training stopped: {type(cause).__name__}: {cause}", file=sys.stderr)


def check_model(name_or_path: str | None) -> Any:
    """The tokenizer of the policy.

    Raises:
        ValueError: no model given, or neither a model folder nor a loadable Hugging Face id.
    """
    if not name_or_path:
        raise ValueError(
            "--actor.model_name_or_path is missing: give a folder or a Hugging Face id."
        )
    path = Path(name_or_path)
    if (path.is_absolute() or path.exists()) and not (path / "config.json").is_file():
        raise ValueError(
            f"--actor.model_name_or_path {name_or_path}: no config.json there, so it is not a "
            "Hugging Face model folder. Check the path; tokenizer and weights lie beside it."
        )
    try:
        return AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=True)
    except Exception as error:
        raise ValueError(
            f"--actor.model_name_or_path {name_or_path}: cannot load its tokenizer ({error}). Give "
            "a model folder, or an id that the Hugging Face hub or its local cache knows."
        ) from error


def check_data(args: SimpleNamespace) -> None:
    """The prompts are named, and have labels where the reward needs them; names those it refuses.

    Raises:
        ValueError: a flag is missing, or names a file or a field that is not there.
    """
    dataset = args.data.prompt_dataset
    if not dataset:
        raise ValueError(
            "--data.prompt_dataset is missing: give a .jsonl file, a dataset folder or a Hugging "
            "Face id, with --data.input_key and --data.label_key naming its fields."
        )
    # An absolute path is no Hugging Face id, so a mistyped one must not go to the hub.
    is_file = Path(dataset).suffix in {".json", ".jsonl", ".parquet"}
    if not (Path(dataset).is_file() if is_file else _may_be_data(Path(dataset))):
        raise ValueError(
            f"--data.prompt_dataset {dataset}: there is no such {'file' if is_file else 'data'}. "
            "Check the path."
        )
    # OpenRLHF's validation, which may have run, makes a list of it.
    is_math = args.reward.remote_url in (MATH_VERIFY, [MATH_VERIFY])
    if is_math and not args.data.label_key:
        raise ValueError(
            "--reward.remote_url math-verify compares answers with a label: name its field with "
            "--data.label_key."
        )
    if is_file and {*PATTERN_CHARS} & {*dataset}:
        raise ValueError(
            f"--data.prompt_dataset {dataset}: `datasets` takes brackets, * and ? in a path for a "
            "pattern of several files. Rename the file or its folder."
        )
    if Path(dataset).suffix == ".jsonl":
        _check_rows(args, Path(dataset))
    if is_math:
        check_labels_of(dataset, args.data.label_key, split=args.data.prompt_split)


def _may_be_data(path: Path) -> bool:
    """A Hugging Face id, or a folder or file that holds something."""
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() or not path.is_absolute()


def _check_rows(args: SimpleNamespace, path: Path) -> None:
    """Every line can be loaded, the named fields are there, and a conversation meets a chat
    template."""
    key = args.data.input_key
    row: dict[str, Any] = {}
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                read = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path}, line {number} is no JSON ({error}). Correct or remove it."
                ) from error
            if not isinstance(read, dict):
                raise ValueError(f"{path}, line {number} is no JSON object: {line:.60}")
            row = row or read
            if key in row and not isinstance(read.get(key), type(row[key]) if row[key] else str):
                raise ValueError(
                    f"{path}, line {number}: its prompt {key} is {read.get(key)!r:.60}. Every "
                    "prompt has to be a text, or every one a list of messages."
                )
    for flag, key in (("input_key", args.data.input_key), ("label_key", args.data.label_key)):
        if key and key not in row:
            raise ValueError(
                f"--data.{flag} {key}: the first row of {path} has no such field, but "
                f"{', '.join(row) or 'none at all'}."
            )
    if isinstance(row.get(args.data.input_key), list) and not args.data.apply_chat_template:
        raise ValueError(
            f"the prompts of {path} are conversations: add --data.apply_chat_template, without "
            "which the policy would read them as Python lists."
        )


def check_services(args: SimpleNamespace, tokenizer: Any) -> None:
    """Wait for every service of `--rollout.service_urls` and compare its contract with the learner.

    Raises:
        ServiceError: not reachable within `--rollout.ready_timeout_s`, wrong key, or a
            ContractMismatch that lists each field with both values and the fix, or the transports
            that the service has; WeightUpdateFailed: its tensors are not the learner's.
        ValueError: the learner's model cannot be built.
    """
    model = AutoConfig.from_pretrained(args.actor.model_name_or_path, trust_remote_code=True)
    expected = LearnerExpectation.of(tokenizer, model, min_model_len=args.data.max_len)
    for url in args.rollout_service.urls:
        asyncio.run(_check_service(url, args.rollout_service, expected))
    # After the contract: whoever serves another model reads of its name, not of its tensors.
    tensors = pushed_tensors(args.actor.model_name_or_path)
    for url in args.rollout_service.urls:
        asyncio.run(_check_weights(url, tensors))


async def _check_service(url: str, service: ServiceConfig, expected: LearnerExpectation) -> None:
    api_key, admin_key = os.environ[API_KEY_VARIABLE], os.environ[ADMIN_KEY_VARIABLE]
    async with ControlClient([url], api_key=api_key, admin_key=admin_key) as client:
        await client.wait_ready(service.ready_timeout_s)
        contract = await client.contract()
    check_contract(contract, expected)
    require_transport(contract, service.weight_transport, url)
    if simulated := simulated_mismatch(contract):
        logger.warning("%s: %s", url, simulated)


async def _check_weights(url: str, tensors: Mapping[str, torch.Tensor]) -> None:
    api_key, admin_key = os.environ[API_KEY_VARIABLE], os.environ[ADMIN_KEY_VARIABLE]
    async with ControlClient([url], api_key=api_key, admin_key=admin_key) as client:
        (status,) = await client.weights()
    try:
        require_fit(tensors, status.tensors)
    except WeightUpdateFailed as error:
        raise WeightUpdateFailed(f"{url} cannot take this learner's weights. {error}") from error


def check_tools(args: SimpleNamespace, tokenizer: Any) -> None:
    """Run a program on every service of `--tool.service_urls`; build the observations' template.

    Raises:
        ServiceError: not reachable within `--rollout.ready_timeout_s`, wrong key, or
            `--tool.timeout_s` above what it allows.
        ValueError: the tokenizer's chat template cannot show a tool's output.
    """
    tool: ToolConfig = args.tool_service
    if tool.template == "chat":
        chat_template(tokenizer)
    for url in tool.urls:
        asyncio.run(_check_tool(url, tool, args.rollout_service.ready_timeout_s))


async def _check_tool(url: str, tool: ToolConfig, ready_timeout_s: float) -> None:
    one = dataclasses.replace(tool, urls=(url,), request_timeout_s=ready_timeout_s)
    async with tool_client(one, os.environ[TOOL_KEY_VARIABLE]) as client:
        answer = await client.execute(ExecuteRequest(code="print(6 * 7)", timeout_s=tool.timeout_s))
    if (answer.status, answer.stdout) != ("ok", "42\n"):
        reason = answer.message or answer.stderr
        raise ServiceError(
            f"{url} ran `print(6 * 7)` and answered {answer.status}: {reason}. Fix: its log and "
            "its GET /v1/isolation say what is wrong with the sandbox."
        )
    logger.info("%s runs code at isolation level %s", url, answer.isolation)
