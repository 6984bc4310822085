"""vLLM's executors, tied to the life of the service.

vLLM's engine process survives a SIGKILL of the process that started it. Its executor is the first
thing of ours that runs in it, so there the kernel is asked to send the engine after its parent; the
workers below follow by vLLM's own death pipe.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies, however it dies (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # it died before the call
        sys.exit("the rollout service is gone")


class TiedMultiprocExecutor(MultiprocExecutor):
    """MultiprocExecutor whose engine process dies with the service."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        die_with_parent()
        super().__init__(*args, **kwargs)


class TiedUniProcExecutor(UniProcExecutor):
    """UniProcExecutor whose engine process dies with the service."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        die_with_parent()
        super().__init__(*args, **kwargs)


TIED = {MultiprocExecutor: TiedMultiprocExecutor, UniProcExecutor: TiedUniProcExecutor}
