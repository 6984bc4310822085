"""Starts the processes of a run and ends every one of them, whatever happens.

Each child leads a session of its own, so Ctrl-C in the terminal reaches only this process, which
then stops the children in order. Ray and vLLM start daemons that leave their parent's process group
and may outlive it. On Linux each child therefore runs below a guardian (`tied.py`), which adopts
orphans of its descendants: whatever the child started, in whatever session, is ended by its process
id when the child ends, or when this process is itself killed. What a guardian leaves because it was
killed falls to this process, which does the same at its own end.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_TIED = Path(__file__).with_name("tied.py")
_POLL_S = 0.3
_PR_SET_CHILD_SUBREAPER = 36
_KILL_ROUNDS = 20
"""Rounds of killing; a process that forks while it is being killed shows up in the next round."""

#   stop_all():  SIGTERM the work --grace_s--> SIGTERM the services --grace_s--> SIGTERM the rest
#                --_REST_S--> SIGKILL.  With both graces of the launcher this takes at most 20 s.
_REST_S = 2.0
"""Time that daemons which survived their parent get to end by themselves."""

_TAIL_LINES = 25
_TAIL_BYTES = 64_000


class ProcessFailedError(Exception):
    """A process ended when it should not have. The message shows the end of its log."""

    def __init__(self, ending: str, message: str) -> None:
        super().__init__(message)
        self.ending = ending
        """How it ended, in a few words."""


class StopRequested(BaseException):
    """A stop signal arrived."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_status = 128 + signum


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A running process, its name for people, and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    grace_s: float
    """Time to end by itself after SIGTERM."""
    is_service: bool = False
    """Others wait for it, so it is ended after them."""

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def failure(self, *, waited_s: float = 0.0) -> ProcessFailedError:
        """The error that says how it ended, what its log says last, and where to look.

        Args:
            waited_s: how long it was waited for, when it still runs.
        """
        status = self.process.poll()
        hint = f"The reason is usually the first error in {self.log}, above these lines."
        if status is None:
            ending = f"did not answer within {waited_s:.0f} s"
            hint = (
                f"It still ran: the machine may be too busy, or too small for the model. Close "
                f"other programs, or look for an error in {self.log}, then try again."
            )
        elif status < 0:
            ending = f"was ended by {signal.Signals(-status).name}"
        else:
            ending = f"ended with exit status {status}"
        if status == -signal.SIGKILL:
            hint = (
                "Only the kernel kills like this, usually because memory ran out: close other "
                "programs, or use a smaller model or batch, then try again."
            )
        ending = f"{self.name} {ending}"
        return ProcessFailedError(
            ending, f"{ending}. Last lines of {self.log}:\n\n{tail(self.log)}\n\n{hint}"
        )


class Supervisor:
    """Context in which children run. Leaving it in any way ends them and all that they started.

    Raises StopRequested in the main thread on SIGINT, SIGTERM and SIGHUP. While it cleans up it
    ignores further signals; cleaning up takes a bounded time.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """Children get `environment` on top of this process's own."""
        self._environment = {**os.environ, **(environment or {})}
        self._children: list[Child] = []
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Supervisor":
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._handlers = {signum: signal.signal(signum, _request_stop) for signum in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not end the clean-up half way: it would leave Ray and vLLM behind.
        for signum in STOP_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
        try:
            self.stop_all()
        finally:
            for stop_signal, handler in self._handlers.items():
                signal.signal(stop_signal, handler)

    def start(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        grace_s: float,
        environment: Mapping[str, str] | None = None,
        is_service: bool = False,
    ) -> Child:
        """Starts `command`; its output goes to the end of `log`. It dies with this process."""
        # Isolated: it imports nothing of ours, and what PYTHONPATH names may be slow to read.
        tied = (sys.executable, "-I", "-S", str(_TIED), str(os.getpid()))
        with log.open("ab") as output:
            process = subprocess.Popen(
                (*tied, *command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**self._environment, **(environment or {})},
                start_new_session=True,
            )
        child = Child(name=name, process=process, log=log, grace_s=grace_s, is_service=is_service)
        self._children.append(child)
        return child

    def wait(self, child: Child, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Waits for `child` to end and forgets it; `meanwhile` is called several times a second.

        Raises:
            ProcessFailedError: it ended with another status than 0.
        """
        while child.is_running:
            meanwhile()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(timeout=_POLL_S)
        if child.process.returncode != 0:
            raise child.failure()
        self.forget(child)

    def ended(self, child: Child) -> tuple[int, str]:
        """Exit status and output of `child`, once it has ended."""
        status = child.process.wait()
        self.forget(child)
        return status, child.log.read_text(encoding="utf-8", errors="replace")

    def stop(self, child: Child) -> None:
        """Ends `child` alone, within its grace, and forgets it."""
        _end([child.process], child.grace_s)
        self.forget(child)

    def forget(self, child: Child) -> None:
        """Leaves out of the end what has ended."""
        self._children.remove(child)

    def stop_all(self) -> None:
        """Ends the work, then the services, then everything that they left behind."""
        # In this order training ends before the services that it would otherwise wait for.
        for services in (False, True):
            group = [child for child in self._children if child.is_service is services]
            _end([child.process for child in group], max((c.grace_s for c in group), default=0.0))
        self._children.clear()
        _end_left_behind()


def _end(processes: Sequence[subprocess.Popen[bytes]], grace_s: float) -> None:
    """Ends them together: their grace is one and the same time."""
    for process in processes:
        process.terminate()
    give_up_s = time.monotonic() + grace_s
    for process in processes:
        try:
            process.wait(timeout=max(0.0, give_up_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tail(log: Path, num_lines: int = _TAIL_LINES) -> str:
    """The last lines of a log, which may be long and may hold invalid UTF-8."""
    if not log.exists():
        return "(no output)"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return "\n".join(lines[-num_lines:]) or "(no output)"


def _request_stop(signum: int, frame: FrameType | None) -> None:
    raise StopRequested(signum)


def _end_left_behind() -> None:
    for signum in (signal.SIGTERM, *[signal.SIGKILL] * _KILL_ROUNDS):
        left = _descendants_in_other_sessions()
        if not left:
            return
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signum)
        psutil.wait_procs(left, timeout=_REST_S)


def _descendants_in_other_sessions() -> list[psutil.Process]:
    """All that the children started. What this process runs for itself stays in its own session."""
    own_session = os.getsid(0)
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(process.pid) != own_session:
                found.append(process)
    return found
