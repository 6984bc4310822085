"""What is added to vLLM's own processes: executors that end with the service, and worker methods.

vLLM's engine process survives a SIGKILL of the process that started it. It imports this module when
it unpickles its arguments, before it waits for the service, so this is where the kernel is asked to
kill the engine with its parent. The workers below it end through vLLM's own death pipe.

Weights go from the page cache (or /dev/shm) into the worker's model without crossing a socket.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from services.rollout.gpu_transfer.receiver import TransferReceiver
from services.rollout.weights.checkpoint import read_tensors
from services.rollout.weights.quantization import Rounding
from services.rollout.wire.schemas import Quantization

SERVICE_PID = "OPENRLHF_ALP_ROLLOUT_SERVICE_PID"
"""Environment variable that tells the engine process which process it has to end with."""

_PR_SET_PDEATHSIG = 1


def die_with_service() -> None:
    """In the engine process: have the kernel kill it when the service dies in any way (Linux)."""
    # Taken out of the environment: the engine's own children have another parent.
    service_pid = os.environ.pop(SERVICE_PID, None)
    if service_pid is None or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The service may have died before the call; then no signal will ever come.
    if os.getppid() != int(service_pid):
        sys.exit("the rollout service is gone")


class TiedMultiprocExecutor(MultiprocExecutor):
    """MultiprocExecutor whose engine process dies with the service."""


class TiedUniProcExecutor(UniProcExecutor):
    """UniProcExecutor whose engine process dies with the service."""


TIED = {MultiprocExecutor: TiedMultiprocExecutor, UniProcExecutor: TiedUniProcExecutor}


class WorkerExtension(TransferReceiver):
    """Methods that the engine calls through `collective_rpc`.

    Named by `worker_extension_cls`, so vLLM mixes this one class into its own Worker, to which
    `model_runner` belongs.
    """

    model_runner: Any

    def alp_reload_weights(
        self,
        plan: dict[str, list[str]],
        scheme: Quantization | None = None,
        names_to_round: Sequence[str] = (),
    ) -> int:
        """Reload the whole model: safetensors path -> names of the tensors to take from it.

        Args:
            plan: as above.
            scheme: grid of simulated quantization, to which `names_to_round` are rounded.

        Returns:
            Number of tensors read.
        """
        num_read = 0
        dtype = self.model_runner.model_config.dtype
        rounding = scheme and Rounding(scheme=scheme, names=frozenset(names_to_round))

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal num_read
            for path, names in plan.items():
                for name, tensor in read_tensors(Path(path), names):
                    num_read += 1
                    # Whole tensors are rounded, before vLLM merges, shards or repacks them.
                    yield name, rounding(name, tensor.to(dtype)) if rounding else tensor

        # Not the model's `load_weights`: on CPU the linear weights are repacked after start-up, so
        # it would find empty parameters.
        self.model_runner.reload_weights(weights_iterator=tensors())
        return num_read


def allow_amx() -> None:
    """Ask the kernel for AMX tiles, which a process may not use without asking (x86-64 Linux).

    vLLM's CPU attention uses them wherever the CPU has them, and leaves the asking to oneDNN. A
    model too small for oneDNN's AMX kernels never asks: its first request ends in SIGILL.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


# At import, because vLLM runs no other code of ours early enough; see the head of this file.
die_with_service()
allow_amx()
