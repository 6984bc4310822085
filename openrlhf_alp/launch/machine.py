"""What this machine has: free GPUs, memory, disk, and the versions of what is installed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from openrlhf_alp.launch.recipe import RecipeError

SLICE = "MIG-"
"""How the name of a part of a GPU begins."""
_NUM_COLUMNS = 4
_BUSY_MB = 1024
"""A GPU with more memory in use than a few idle contexts take belongs to somebody."""
_PACKAGES = ("openrlhf-alp", "openrlhf", "torch", "transformers", "deepspeed", "ray", "vllm")
_GIT = ("git", "-C", str(Path(__file__).parent))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU under the name that CUDA_VISIBLE_DEVICES has for it."""

    name: str
    memory_gb: float
    used_gb: float = 0.0
    uuid: str = ""

    @property
    def is_free(self) -> bool:
        return self.used_gb * 1024 < _BUSY_MB


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a run may use."""

    gpus: tuple[Gpu, ...]
    memory_gb: float
    """Of the host, in all: what other programs have now may be free when the run needs it."""

    @property
    def free_gpus(self) -> tuple[Gpu, ...]:
        return tuple(gpu for gpu in self.gpus if gpu.is_free)


def this_machine() -> Machine:
    """This host; of its GPUs those that CUDA_VISIBLE_DEVICES names, if it is set."""
    return Machine(
        gpus=tuple(_visible(_installed_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"))),
        memory_gb=psutil.virtual_memory().total / 2**30,
    )


def pretended_machine(text: str) -> Machine:
    """The machine that "8x80" stands for: 8 free GPUs of 80 GB, to plan for one elsewhere.

    Raises:
        RecipeError: the text is not of this form.
    """
    written = re.fullmatch(r"(\d{1,4})x(\d+(?:\.\d+)?)", text)
    if not written:
        raise RecipeError(f"--pretend-gpus {text}: write it as 8x80, 8 GPUs of 80 GB")
    count, size = int(written[1]), float(written[2])
    gpus = tuple(Gpu(name=str(n), memory_gb=size) for n in range(count))
    visible = _visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Machine(gpus=tuple(visible), memory_gb=psutil.virtual_memory().total / 2**30)


def _installed_gpus() -> Sequence[Gpu]:
    listed = _nvidia_smi(
        "--query-gpu=index,uuid,memory.total,memory.used", "--format=csv,noheader,nounits"
    )
    host_gb = psutil.virtual_memory().total / 2**30
    rows = [line.split(", ") for line in listed.splitlines()]
    return [
        Gpu(name=index, uuid=uuid, memory_gb=_gb(total, host_gb), used_gb=_gb(used, 0.0))
        for index, uuid, total, used in (row for row in rows if len(row) == _NUM_COLUMNS)
    ]


def _slices() -> Sequence[Gpu]:
    """Parts of GPUs that the administrator has divided (MIG), which have no number of their own.

    What others use of them is not known, so they count as free: a scheduler gives each to one job.
    """
    return [
        Gpu(name=uuid, uuid=uuid, memory_gb=float(size))
        for size, uuid in re.findall(r"MIG \S*?(\d+)gb\b.*?UUID: (MIG-[^)]+)", _nvidia_smi("-L"))
    ]


def _nvidia_smi(*arguments: str) -> str:
    """What it prints; nothing where there is none."""
    try:
        # Not torch: it would open a context on every GPU, and take memory there.
        run = subprocess.run(
            ("nvidia-smi", *arguments),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return run.stdout


def _gb(mib: str, unknown: float) -> float:
    """`[N/A]` is said of a GPU that shares the host's memory."""
    return float(mib) / 1024 if mib.isdecimal() else unknown


def _visible(gpus: Sequence[Gpu], variable: str | None) -> Sequence[Gpu]:
    if variable is None:
        return gpus
    if SLICE in variable:
        gpus = [*gpus, *_slices()]
    chosen: dict[Gpu, None] = {}
    for name in (part.strip() for part in variable.split(",")):
        found = [gpu for gpu in gpus if _names(name, gpu)]
        # As CUDA does: what stands after a name that is none, or of several GPUs, is not visible.
        if len(found) != 1:
            break
        chosen[found[0]] = None
    return tuple(chosen)


def _names(name: str, gpu: Gpu) -> bool:
    """CUDA takes a number, or as much of the UUID as sets it apart."""
    return name == gpu.name or (name.startswith(("GPU-", SLICE)) and gpu.uuid.startswith(name))


@contextlib.contextmanager
def claimed(gpus: Sequence[Gpu], count: int) -> Iterator[tuple[Gpu, ...]]:
    """`count` of `gpus`, which no other launch on this machine gets while the block runs.

    Raises:
        RecipeError: fewer are free.
    """
    folder = Path(tempfile.gettempdir()) / f"openrlhf-alp-gpus-{os.getuid()}"
    with contextlib.ExitStack() as stack:
        taken: list[Gpu] = []
        for gpu in gpus:
            if len(taken) == count:
                break
            folder.mkdir(exist_ok=True)
            # A GPU that was just given to another launch shows no memory in use for a while.
            with contextlib.suppress(Timeout):
                stack.enter_context(FileLock(folder / f"{gpu.name}.lock", timeout=0))
                taken.append(gpu)
        if len(taken) < count:
            raise RecipeError(too_few_gpus(count, len(taken)))
        yield tuple(taken)


def too_few_gpus(needed: int, free: int) -> str:
    """What a person reads when GPUs are missing."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    among = "" if named is None else f" among those that CUDA_VISIBLE_DEVICES={named!r} names"
    return (
        f"the recipe needs {needed} GPU(s) and {free} are free{among}. Wait for the others, set "
        "CUDA_VISIBLE_DEVICES to the numbers of other ones, or ask for fewer with "
        "rollout.servers, rollout.gpus and train.gpus (0 runs on the CPU)."
    )


def free_disk_gb(folder: Path) -> float:
    """Of the file system on which `folder` is or will be made."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 2**30


def environment() -> dict[str, Any]:
    """Versions, commit and machine, for `environment.json`."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": sys.version.split()[0],
        "versions": versions,
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": (_git("status", "--porcelain", "-uno") or "").splitlines(),
        "working_directory": str(Path.cwd()),
        "host": platform.node(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [{"name": gpu.name, "memory_gb": gpu.memory_gb} for gpu in this_machine().gpus],
    }


def _git(*arguments: str) -> str | None:
    """What git says of the source; None where it is installed without a repository."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = subprocess.run((*_GIT, *arguments), capture_output=True, text=True, check=True)
        return run.stdout.strip()
    return None
