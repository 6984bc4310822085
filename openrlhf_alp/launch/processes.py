"""Starts the demo's processes and ends every one of them, whatever happens.

Each child leads a session of its own, so Ctrl-C in the terminal reaches only the demo, which then
stops the children in order. Ray and vLLM start daemons that leave their parent's process group and
may outlive it. On Linux this process therefore adopts orphans of its descendants (a "subreaper"):
whatever the children started, in whatever session, is a descendant here and is ended by its pid.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_PR_SET_CHILD_SUBREAPER = 36
_KILL_ROUNDS = 20
"""Rounds of killing; a process that forks while it is being killed shows up in the next round."""

#   stop():  SIGTERM child --grace_s--> next child ... --> SIGTERM the rest --_REST_S--> SIGKILL
_REST_S = 3.0
"""Time that daemons which no child took down with it get to end by themselves."""

_TAIL_LINES = 25


class ProcessFailedError(Exception):
    """A process of the demo ended when it should not have. The message shows the end of its log."""


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

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def failure(self) -> ProcessFailedError:
        """The error that says how it ended, what its log says last, and where to look."""
        status = self.process.poll()
        return ProcessFailedError(
            f"{self.name} {_describe_status(status)}. Last lines of {self.log}:\n\n"
            f"{tail(self.log)}\n\n{_hint(status, self.log)}"
        )


class ProcessGuard:
    """Context in which children run. Leaving it, by any way, ends them and all they started.

    Raises StopRequested in the main thread on SIGINT, SIGTERM and SIGHUP. While it cleans up it
    ignores further signals: that takes a bounded time.
    """

    def __init__(self) -> None:
        self._children: list[Child] = []
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "ProcessGuard":
        _adopt_orphans()
        self._handlers = {signum: signal.signal(signum, _request_stop) for signum in STOP_SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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
        environment: Mapping[str, str],
        grace_s: float,
    ) -> Child:
        """Starts `command` with its output in `log` and `environment` on top of ours."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        child = Child(name=name, process=process, log=log, grace_s=grace_s)
        self._children.append(child)
        return child

    def wait(self, child: Child) -> None:
        """Waits for `child` to end and forgets it.

        Raises:
            ProcessFailedError: it ended with another status than 0.
        """
        if child.process.wait() != 0:
            raise child.failure()
        self._children.remove(child)

    def stop_all(self) -> None:
        """Ends the children, last started first, then everything that they left behind."""
        while self._children:
            child = self._children.pop()
            child.process.terminate()
            try:
                child.process.wait(timeout=child.grace_s)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        _end_left_behind()


def tail(log: Path, num_lines: int = _TAIL_LINES) -> str:
    """The last lines of a log that may be long and may hold broken characters."""
    if not log.exists():
        return "(no output)"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 64_000))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return "\n".join(lines[-num_lines:]) or "(no output)"


def _request_stop(signum: int, frame: FrameType | None) -> None:
    raise StopRequested(signum)


def _adopt_orphans() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_left_behind() -> None:
    left = _descendants_in_other_sessions()
    for process in left:
        _signal(process, signal.SIGTERM)
    psutil.wait_procs(left, timeout=_REST_S)
    for _ in range(_KILL_ROUNDS):
        left = _descendants_in_other_sessions()
        if not left:
            return
        for process in left:
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(left, timeout=_REST_S)


def _descendants_in_other_sessions() -> list[psutil.Process]:
    """All that the children started. What this process runs for itself stays in its own session."""
    own_session = os.getsid(0)
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if os.getsid(process.pid) != own_session:
                found.append(process)
        except ProcessLookupError:
            continue
    return found


def _signal(process: psutil.Process, signum: int) -> None:
    try:
        process.send_signal(signum)
    except psutil.NoSuchProcess:
        return


def _describe_status(status: int | None) -> str:
    if status is None:
        return "does not answer"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with exit status {status}"


def _hint(status: int | None, log: Path) -> str:
    if status == -signal.SIGKILL:
        return (
            "Nobody but the system kills like that, usually because memory ran out: close other "
            "programs (the demo needs about 8 GB), then try again."
        )
    return f"The reason is usually the first error in {log}, above these lines."
