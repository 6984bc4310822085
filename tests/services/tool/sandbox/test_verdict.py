"""Statuses follow from kernel facts; what a snippet says only describes."""

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tool.sandbox.host.verdict import ExitFacts, Status, judge

ERROR = {"type": "ValueError", "message": "no", "line": 3}


def exited(code: int) -> int:
    """Wait status of an exit with `code`: the code is the second byte."""
    return code << 8


def killed(number: signal.Signals) -> int:
    """Wait status of a death by signal: the number is the low seven bits."""
    return int(number)


@pytest.mark.parametrize(
    ("facts", "report", "stopped", "status"),
    [
        (ExitFacts(status=exited(0)), {}, None, Status.OK),
        (ExitFacts(status=exited(0)), {"error": ERROR}, None, Status.OK),
        (ExitFacts(status=exited(1)), {"error": ERROR}, None, Status.ERROR),
        (ExitFacts(status=exited(1)), {"error": "text"}, None, Status.EXIT),
        (ExitFacts(status=exited(3)), {}, None, Status.EXIT),
        (ExitFacts(status=killed(signal.SIGSEGV)), {"error": ERROR}, None, Status.CRASHED),
        (ExitFacts(status=killed(signal.SIGKILL)), {}, Status.TIMEOUT, Status.TIMEOUT),
        (ExitFacts(status=killed(signal.SIGKILL)), {}, Status.OUTPUT_LIMIT, Status.OUTPUT_LIMIT),
        (ExitFacts(status=killed(signal.SIGKILL), memory=True), {}, None, Status.MEMORY_LIMIT),
        (ExitFacts(lost=True), {}, None, Status.SANDBOX_ERROR),
        (ExitFacts(status=exited(1)), {"refused": "files: no space"}, None, Status.REJECTED),
        (ExitFacts(), {"wait_status": exited(4)}, None, Status.EXIT),
    ],
)
def test_the_status_follows_from_the_facts(
    facts: ExitFacts, report: dict[str, object], stopped: Status | None, status: Status
) -> None:
    assert judge(facts, stopped=stopped, report=report, cpu_limit_s=2).status is status


@pytest.mark.parametrize(
    ("number", "cpu_s", "soft_cpu_s", "status"),
    [
        # Of a limit of 20 s the kernel sends SIGXCPU at 20 s and again at 21 s, SIGKILL at 22 s,
        # and raises the soft limit each time.
        (signal.SIGXCPU, 20.0, 21, Status.CPU_LIMIT),
        (signal.SIGXCPU, 19.0, 20, Status.CRASHED),
        (signal.SIGKILL, 22.0, 22, Status.CPU_LIMIT),
        (signal.SIGKILL, 21.0, 21, Status.CRASHED),
        (signal.SIGKILL, 19.9, 20, Status.CRASHED),
        (signal.SIGXCPU, 1.0, 21, Status.CRASHED),  # it raised its own soft limit
        (signal.SIGXCPU, 1.0, 2, Status.CRASHED),  # it had lowered its own limit
        (signal.SIGSEGV, 20.5, 21, Status.CRASHED),
    ],
)
def test_the_kernels_cpu_signals_are_told_from_the_programs_own(
    number: signal.Signals, cpu_s: float, soft_cpu_s: int, status: Status
) -> None:
    facts = ExitFacts(status=killed(number), cpu_s=cpu_s, soft_cpu_s=soft_cpu_s)
    verdict = judge(facts, stopped=None, report={}, cpu_limit_s=20)
    assert (verdict.status, verdict.signal) == (status, number.name)
    supervised = {"wait_status": killed(number), "soft_cpu_s": soft_cpu_s}
    facts = ExitFacts(cpu_s=cpu_s, soft_cpu_s=20)
    assert judge(facts, stopped=None, report=supervised, cpu_limit_s=20).status is status


@given(
    st.dictionaries(
        st.sampled_from(["error", "wait_status", "soft_cpu_s", "refused", "files"]),
        st.none() | st.integers(-(2**40), 2**40) | st.text() | st.lists(st.integers()),
    ),
    st.integers(1, 255),
)
def test_no_report_turns_a_failure_into_a_success(report: dict[str, object], code: int) -> None:
    """A forged report may change which failure it is, never that it is one."""
    verdict = judge(ExitFacts(status=exited(code)), stopped=None, report=report, cpu_limit_s=2)
    assert verdict.status is not Status.OK
