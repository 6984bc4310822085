"""From kernel facts to one status. Pure functions; nothing a snippet says about itself decides."""

import os
import signal
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from services.tool.sandbox.host.handles import ExitFacts

_CPU_TOLERANCE = 0.5  # the kernel's limit counts ticks, its accounts nanoseconds: they drift apart


class Status(StrEnum):
    """How an execution ended. Everything but the last three means that the code ran."""

    OK = "ok"
    """Ended with exit code 0."""
    ERROR = "error"
    """An uncaught exception."""
    EXIT = "exit"
    """Ended by itself with a non-zero exit code."""
    TIMEOUT = "timeout"
    """Killed when its wall time was used up."""
    CPU_LIMIT = "cpu_limit"
    """Killed when its CPU time was used up."""
    MEMORY_LIMIT = "memory_limit"
    """Killed because all its processes together held too much memory."""
    OUTPUT_LIMIT = "output_limit"
    """Killed because it printed too much; the first part is kept."""
    CRASHED = "crashed"
    """Killed by a signal of its own making: segmentation fault, abort, forbidden system call."""
    REJECTED = "rejected"
    """Never ran: the input cannot be run as it is."""
    OVERLOADED = "overloaded"
    """Never ran: no free slot within the caller's deadline. Safe to retry."""
    SANDBOX_ERROR = "sandbox_error"
    """The sandbox failed; whether the code ran is unknown unless the message says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorInfo:
    """An uncaught exception, as the snippet's own process described it."""

    type: str
    message: str
    line: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The result of one execution."""

    status: Status
    stdout: str = ""
    stderr: str = ""
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    exit_code: int | None = None
    """None when killed by a signal or never run."""
    signal: str | None = None
    error: ErrorInfo | None = None
    message: str = ""
    """For the three statuses that mean "did not run" and for limits: cause and fix in one line."""
    files: dict[str, str] = field(default_factory=dict)
    """Fetched files, base64."""
    missing: dict[str, str] = field(default_factory=dict)
    """Files that were asked for and could not be fetched, with the reason."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0
    queue_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The part of an outcome that follows from how the process ended."""

    status: Status
    exit_code: int | None = None
    signal: str | None = None
    error: ErrorInfo | None = None
    message: str = ""


def judge(
    facts: ExitFacts, *, stopped: Status | None, report: dict[str, Any], cpu_limit_s: int
) -> Verdict:
    """Decide the status.

    Args:
        facts: from the zygote.
        stopped: the limit for which the API process killed the slot, or None.
        report: what the slot's process said: error description, refusal, status of a kept program.
    """
    if facts.lost:
        message = "the sandbox process died while the code ran; a retry runs it again"
        return Verdict(status=Status.SANDBOX_ERROR, message=message)
    if facts.memory:
        return Verdict(
            status=Status.MEMORY_LIMIT, signal="SIGKILL", message="memory limit exceeded"
        )
    if stopped is not None:
        return judge_stop(stopped)
    if isinstance(report.get("refused"), str):
        return Verdict(status=Status.REJECTED, message=report["refused"])
    kept = as_wait_status(report.get("wait_status"))
    status = kept if kept is not None and facts.status == 0 else facts.status
    return judge_wait_status(status, facts.cpu_s, report.get("error"), cpu_limit_s)


def judge_stop(limit: Status) -> Verdict:
    """The verdict on what this process killed for a limit."""
    return Verdict(status=limit, signal="SIGKILL", message=f"{limit.value} exceeded")


def judge_wait_status(status: int, cpu_s: float, error: Any, cpu_limit_s: int) -> Verdict:
    """Decide by a wait status alone."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in set(signal.Signals) else f"SIG{number}"
        limit = number in (signal.SIGXCPU, signal.SIGKILL) and cpu_s >= cpu_limit_s * _CPU_TOLERANCE
        if limit:
            message = f"cpu limit of {cpu_limit_s} s exceeded"
            return Verdict(status=Status.CPU_LIMIT, signal=name, message=message)
        return Verdict(status=Status.CRASHED, signal=name, message=f"killed by {name}")
    code = os.WEXITSTATUS(status)
    if code == 0:
        return Verdict(status=Status.OK, exit_code=0)
    described = describe(error)
    if described is not None:
        return Verdict(status=Status.ERROR, exit_code=code, error=described)
    return Verdict(status=Status.EXIT, exit_code=code)


def as_wait_status(value: Any) -> int | None:
    """A wait status that foreign code may have written, or None for what cannot be one."""
    return value if isinstance(value, int) and 0 <= value <= 0xFFFF else None


def describe(error: Any) -> ErrorInfo | None:
    """Read an error description that an attacker may have written."""
    if not isinstance(error, dict):
        return None
    line = error.get("line")
    return ErrorInfo(
        type=str(error.get("type", ""))[:200],
        message=str(error.get("message", ""))[:2000],
        line=line if isinstance(line, int) and 0 <= line < 2**31 else None,
    )
