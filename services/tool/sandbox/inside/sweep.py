"""Kills what a killed cell of a session has left running, without /proc, which no slot sees."""

import contextlib
import os
import signal
from collections.abc import Iterator

from services.tool.sandbox.inside import kernel

_STACK = kernel.new_stack()
_PASSES = 5  # what forks while it is swept has children with pids that are newer still
_RESERVED_PIDS = 300
"""Below this no pid is handed out a second time."""
_PID_LIMIT = 1 << 15
_FARTHEST = 1 << 16
"""Pids that are tried at most, which takes about 50 ms."""


def kill_since(first: int, spared: set[int]) -> None:
    """Kill the processes that were started since process `first`, and it, if this one may.

    A session sees no /proc. But the kernel hands out pids in order, so everything that was started
    since a process has a pid between that process's and the newest one.

    The caller has to collect the children that this function starts. It does not wait for them:
    beside what it has killed, which may take seconds to die, that would take long.

    Args:
        first: pid of a process, which may be dead.
        spared: pids that live on.
    """
    for _ in range(_PASSES):
        newest = _newest_pid(first)
        killed = False
        for pid in _pids_between(first, newest):
            if pid in spared:
                continue
            with contextlib.suppress(OSError):  # mostly: there is no such process
                os.kill(pid, signal.SIGKILL)
                killed = True
        if not killed:
            return
        first = newest + 1  # what is older was killed, and does nothing more even while it is dying


def _newest_pid(first: int) -> int:
    try:
        pid = kernel.clone_idle(signal.SIGCHLD, _STACK)  # a fork would copy this process's memory
    except OSError:  # the cell has taken all processes
        return first + _RESERVED_PIDS
    os.kill(pid, signal.SIGKILL)
    return pid


def _pids_between(first: int, newest: int) -> Iterator[int]:
    if first <= newest:
        yield from range(first, min(newest, first + _FARTHEST))
        return
    yield from range(first, max(_PID_LIMIT, first + 1))  # the kernel has begun again
    yield from range(_RESERVED_PIDS, min(newest, _FARTHEST))
