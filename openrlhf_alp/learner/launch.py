"""Start a run: check what can be checked before Ray starts, then hand over to OpenRLHF.

Everything that a user can get wrong (flags, model folder, service) is found here, in seconds, in
the driver. What goes wrong later comes back as one sentence and a non-zero exit.
"""

from __future__ import annotations

import os
import sys
import traceback
from types import SimpleNamespace

import ray
import torch

from openrlhf_alp.clients.errors import ServiceError
from openrlhf_alp.episodes.records import EpisodeError
from openrlhf_alp.learner import seams
from openrlhf_alp.learner.flags import config
from openrlhf_alp.learner.flags.checks import check_data, check_model, check_services, check_tools

LOGICAL_DEVICES = 8
"""Slots that a local Ray offers on a machine without GPUs; OpenRLHF asks for one per model."""

KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Let glibc keep freed tensors, in huge pages: mapping the logits anew for every micro-batch is a
sixth of the time of a CPU update. Other C libraries ignore these."""


class LaunchError(Exception):
    """The run cannot start: flags, model or service are not right. Exit status 2."""


def launch() -> int:
    """Run OpenRLHF's main program with ours in place. Returns the exit status."""
    try:
        seams.run_upstream(config.add_arguments, _settle_and_start_ray)
    except (LaunchError, seams.UpstreamDriftError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ray.exceptions.RayError, ServiceError, EpisodeError, RuntimeError) as error:
        _explain(error)
        return 1
    finally:
        ray.shutdown()
    return 0


def _settle_and_start_ray(args: SimpleNamespace) -> SimpleNamespace:
    try:
        config.settle(args)
        check_data(args)
        tokenizer = check_model(args.actor.model_name_or_path)
        check_tools(args, tokenizer)  # first: it takes seconds, a model may take minutes to load
        if args.rollout_service.urls:
            check_services(args, tokenizer)
    except (ValueError, OSError, ServiceError) as error:
        raise LaunchError(str(error)) from error
    _start_ray(args)
    return args


def _start_ray(args: SimpleNamespace) -> None:
    """Ray with our shims in every worker; on a CPU machine with logical GPUs to schedule on."""
    env = {
        # The three that OpenRLHF sets when it starts Ray itself.
        "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "true"),
        "NCCL_DEBUG": os.environ.get("NCCL_DEBUG", "WARN"),
        "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": os.environ.get(
            "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS", "1"
        ),
    }
    devices = {}
    if not torch.cuda.is_available():
        # Ray gives a worker one OpenMP thread per logical CPU it asked for, that is one; the
        # policy's workers are the only ones that compute, and they share the cores.
        workers = args.actor.num_nodes * args.actor.num_gpus_per_node
        threads = max(1, (os.cpu_count() or 1) // workers)
        env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
        env["TORCHDYNAMO_DISABLE"] = "1"
        env |= {k: os.environ.get(k, v) for k, v in KEEP_MEMORY.items()}
        # Ray runs its workers at nice 15; on a CPU machine they are the job.
        os.environ.setdefault("RAY_worker_niceness", "0")
        if "RAY_ADDRESS" not in os.environ:
            devices = {"num_cpus": LOGICAL_DEVICES, "num_gpus": LOGICAL_DEVICES}
    ray.init(
        **devices,
        include_dashboard=False,
        runtime_env={
            "env_vars": env,
            "worker_process_setup_hook": "openrlhf_alp.learner.compat.install",
        },
    )


def _explain(error: Exception) -> None:
    """Traceback for the log, then one sentence with the innermost cause."""
    traceback.print_exception(error)
    cause: BaseException = error
    while isinstance(cause, ray.exceptions.RayTaskError) and cause.cause is not None:
        cause = cause.cause
    print(f"\nerror: training stopped: {type(cause).__name__}: {cause}", file=sys.stderr)
