"""Decides the status of an execution from what the kernel said. Pure functions.

Nothing that a snippet says about itself decides; it only describes.
"""

import os
import signal
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from services.tool.sandbox.plan import CPU_GRACE_S

# The kernel's limit counts ticks, its usage nanoseconds: they drift apart.
_CPU_TOLERANCE = 0.5
_FIRST_OVER_S: dict[int, int] = {signal.SIGXCPU: 1, signal.SIGKILL: CPU_GRACE_S}
"""By how much the soft limit is over at the first of each signal that the kernel sends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitFacts:
    """What the kernel says about the end of a slot's first process."""

    status: int = 0
    """Wait status as of wait4."""
    cpu_s: float = 0.0
    peak_bytes: int = 0
    soft_cpu_s: int = 0
    """Its soft limit of CPU time at the end, which every SIGXCPU of the kernel raises by 1 s."""
    memory: bool = False
    """Whether the watchdog or its cgroup killed it for its memory."""
    lost: bool = False
    """The zygote died first, so nobody knows how the slot ended (the kernel killed it)."""


class Status(StrEnum):
    """How an execution ended. All but the last three mean that the code ran."""

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
    """Cause and fix in one line, for limits, crashes and the last three statuses."""
    files: dict[str, str] = field(default_factory=dict)
    """Fetched files, base64."""
    missing: dict[str, str] = field(default_factory=dict)
    """Files that were asked for and could not be fetched, with the reason."""
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_bytes: int = 0


def judge(
    facts: ExitFacts, *, stopped: Status | None, report: dict[str, Any], cpu_limit_s: int
) -> Outcome:
    """Decide how a program ended. The outcome has no output and no files yet.

    Args:
        facts: from the zygote.
        stopped: the limit for which the API process killed the slot, or None.
        report: what the slot's process said: error description, refusal, status of a program that
            its supervisor waited for.
    """
    outcome = _judge(facts, stopped, report, cpu_limit_s)
    return replace(outcome, cpu_s=facts.cpu_s, peak_bytes=facts.peak_bytes)


def _judge(
    facts: ExitFacts, stopped: Status | None, report: dict[str, Any], cpu_limit_s: int
) -> Outcome:
    if facts.lost:
        message = "the sandbox process died while the code ran; a retry runs it again"
        return Outcome(status=Status.SANDBOX_ERROR, message=message)
    if facts.memory:
        message = "memory limit exceeded"
        return Outcome(status=Status.MEMORY_LIMIT, signal="SIGKILL", message=message)
    if stopped is not None:
        return judge_stop(stopped)
    if isinstance(report.get("refused"), str):
        return Outcome(status=Status.REJECTED, message=report["refused"])
    # A supervisor that ended well passes on how its program ended. It cannot improve on a signal.
    supervised = as_wait_status(report.get("wait_status"))
    status, soft_cpu_s = facts.status, facts.soft_cpu_s
    if supervised is not None and status == 0:
        status, soft_cpu_s = supervised, as_seconds(report.get("soft_cpu_s"))
    cpu = CpuTime(used_s=facts.cpu_s, limit_s=cpu_limit_s, over_s=soft_cpu_s - cpu_limit_s)
    return judge_wait_status(status, cpu, report.get("error"))


def judge_stop(limit: Status) -> Outcome:
    """The outcome of what was killed for a limit."""
    return Outcome(status=limit, signal="SIGKILL", message=f"{limit.value} exceeded")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuTime:
    """CPU time of a process that has ended."""

    used_s: float
    limit_s: int
    over_s: int
    """By how much the kernel raised the soft limit: 1 s for each SIGXCPU that it sent."""

    def ended_it(self, number: int) -> bool:
        """Whether signal `number` is the kernel's for the limit, and not the program's own."""
        # A program may raise its soft limit itself, but hardly uses the time as well.
        if self.used_s < self.limit_s * _CPU_TOLERANCE:
            return False
        # SIGKILL follows at the hard limit, when a program survives the SIGXCPU before.
        first_s = _FIRST_OVER_S.get(number)
        return first_s is not None and self.over_s >= first_s


def judge_wait_status(status: int, cpu: CpuTime, error: Any) -> Outcome:
    """Decide by a wait status and the CPU time alone."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in set(signal.Signals) else f"SIG{number}"
        if cpu.ended_it(number):
            message = f"cpu limit of {cpu.limit_s} s exceeded"
            return Outcome(status=Status.CPU_LIMIT, signal=name, message=message)
        return Outcome(status=Status.CRASHED, signal=name, message=f"killed by {name}")
    code = os.WEXITSTATUS(status)
    if code == 0:
        return Outcome(status=Status.OK, exit_code=0)
    described = describe(error)
    status_of_exit = Status.EXIT if described is None else Status.ERROR
    return Outcome(status=status_of_exit, exit_code=code, error=described)


def as_wait_status(value: Any) -> int | None:
    """A wait status that untrusted code may have written, or None for what cannot be one."""
    return value if isinstance(value, int) and 0 <= value <= 0xFFFF else None


def as_seconds(value: Any) -> int:
    """Whole seconds that untrusted code may have written; 0 for anything that cannot be some."""
    return value if isinstance(value, int) and abs(value) < 2**31 else 0


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
