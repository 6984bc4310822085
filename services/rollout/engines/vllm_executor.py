"""vLLM's executors, tied to the life of the service.

vLLM's engine process survives a SIGKILL of the process that started it. It imports this module when
it unpickles its arguments, before it waits for the service, so here the kernel is asked to send the
engine after its parent; the workers below follow by vLLM's own death pipe.
"""

import ctypes
import os
import signal
import sys

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

SERVICE_PID = "OPENRLHF_ALP_ROLLOUT_SERVICE_PID"
"""Environment variable by which the engine process knows whose life it shares."""

_PR_SET_PDEATHSIG = 1


def die_with_service() -> None:
    """In the engine process: have the kernel kill it when the service dies, however (Linux)."""
    # Taken out of the environment: the engine's own children have another parent.
    service_pid = os.environ.pop(SERVICE_PID, None)
    if service_pid is None or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(service_pid):  # it died before the call
        sys.exit("the rollout service is gone")


class TiedMultiprocExecutor(MultiprocExecutor):
    """MultiprocExecutor whose engine process dies with the service."""


class TiedUniProcExecutor(UniProcExecutor):
    """UniProcExecutor whose engine process dies with the service."""


TIED = {MultiprocExecutor: TiedMultiprocExecutor, UniProcExecutor: TiedUniProcExecutor}

die_with_service()
