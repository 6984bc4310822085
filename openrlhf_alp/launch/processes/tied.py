"""Runs a command, and ends all that it started with it, or with the starter (Linux).

    python -I -S tied.py PID_OF_THE_STARTER COMMAND ...

    starter --SIGTERM--> this process --SIGTERM--> command --starts--> daemons in any session
       dies ------------>    |        <--its end--    |
                             +--- ends every descendant, then ends as the command did

It adopts orphans of its descendants (it is a "subreaper"), so none of them gets away. Where it is
itself killed, the kernel kills the command, and its orphans go to the starter. It imports nothing
of ours, so that it costs some 50 ms and 5 MB.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_GRACE_S = 1.0
"""Time that daemons get to end by themselves after SIGTERM."""
_GIVE_UP_S = 10.0
"""Only a process that hangs in the kernel survives SIGKILL."""
_POLL_S = 0.05


def main() -> None:
    """Runs the command, and ends as it does: with its exit status, or by its signal."""
    starter, *command = sys.argv[1:]
    if sys.platform != "linux":
        os.execvp(command[0], command)
    kernel = ctypes.CDLL(None)
    kernel.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # They are waited for; until then they stay pending.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (*_FORWARDED, signal.SIGCHLD))
    kernel.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    guardian = os.getpid()
    child = os.fork()
    if child == 0:
        os.setsid()
        kernel.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # The parent may have died before the call; then no signal will ever come.
        if os.getppid() != guardian:
            sys.exit("the process that started this is gone")
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execvp(command[0], command)
    status = _guard(child, int(starter))
    _end_descendants()
    _end_as(status)


def _guard(child: int, starter: int) -> int:
    """Forwards signals until `child` ends, or `starter`; returns the exit code of `child`."""
    while os.getppid() == starter:
        if (status := _reap(child)) is not None:
            return status
        signum = signal.sigwait((*_FORWARDED, signal.SIGCHLD))
        # A starter that is gone has sent it by dying.
        if signum != signal.SIGCHLD and os.getppid() == starter:
            os.kill(child, signum)
    return -signal.SIGKILL


def _reap(child: int = 0) -> int | None:
    """Takes note of all that have ended; the exit code of `child` if it is one of them."""
    code = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            if ended[0] == child:
                code = os.waitstatus_to_exitcode(ended[1])
    return code


def _end_descendants() -> None:
    """Asks all of them to end, and kills what does not."""
    began_s = time.monotonic()
    asked: set[int] = set()
    while left := _descendants():
        took_s = time.monotonic() - began_s
        if took_s > _GIVE_UP_S:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if took_s > _GRACE_S:
                    os.kill(pid, signal.SIGKILL)
                elif pid not in asked:
                    os.kill(pid, signal.SIGTERM)
        asked |= left
        signal.sigtimedwait((signal.SIGCHLD,), _POLL_S)


def _descendants() -> set[int]:
    """Ids of all processes below this one, as they are now."""
    _reap()
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting += below
    return found


def _parents() -> Iterator[tuple[int, int]]:
    """Each process of the machine, and its parent."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat", "rb") as file:
            # "pid (name) state parent ...", and the name may hold anything.
            yield int(pid), int(file.read().rpartition(b")")[2].split()[1])


def _end_as(status: int) -> None:
    if status >= 0:
        sys.exit(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump of this process tells nothing
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (-status,))
    os.kill(os.getpid(), -status)


if __name__ == "__main__":
    main()
