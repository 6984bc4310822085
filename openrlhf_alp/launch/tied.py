"""Runs a command that dies with the process that started it, however that one dies (Linux).

    python -I -S tied.py PID_OF_THE_STARTER COMMAND ...

A program of its own instead of a function between fork and exec, which would run beside the threads
of the starter. It imports nothing of ours, so that it costs some 10 ms.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ties itself to its parent and becomes the command."""
    starter, *command = sys.argv[1:]
    if sys.platform == "linux":
        # Not SIGTERM: nobody is left who would wait, and kill what ignores it.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # The starter may have died before the call; then no signal will ever come.
        if os.getppid() != int(starter):
            sys.exit("the process that started this is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
