"""Statuses follow from kernel facts; what a snippet says only describes."""

import signal

import pytest
from hypothesis import HealthCheck, given, settings
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
        (ExitFacts(status=killed(signal.SIGXCPU), cpu_s=2.0), {}, None, Status.CPU_LIMIT),
        (ExitFacts(status=killed(signal.SIGXCPU), cpu_s=0.1), {}, None, Status.CRASHED),
        (ExitFacts(status=killed(signal.SIGKILL), cpu_s=3.9), {}, None, Status.CPU_LIMIT),
        (ExitFacts(status=killed(signal.SIGKILL), cpu_s=1.9), {}, None, Status.CRASHED),
        (ExitFacts(lost=True), {}, None, Status.SANDBOX_ERROR),
        (ExitFacts(status=exited(1)), {"refused": "files: no space"}, None, Status.REJECTED),
        (ExitFacts(), {"wait_status": exited(4)}, None, Status.EXIT),
    ],
)
def test_the_status_follows_from_the_facts(
    facts: ExitFacts, report: dict[str, object], stopped: Status | None, status: Status
) -> None:
    assert judge(facts, stopped=stopped, report=report, cpu_limit_s=2).status is status


def test_a_process_that_sends_itself_the_cpu_signal_has_not_hit_the_limit() -> None:
    facts = ExitFacts(status=killed(signal.SIGXCPU), cpu_s=0.5)
    verdict = judge(facts, stopped=None, report={}, cpu_limit_s=2)
    assert (verdict.status, verdict.signal) == (Status.CRASHED, "SIGXCPU")


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["error", "wait_status", "refused", "files"]),
        st.none() | st.integers(-(2**40), 2**40) | st.text() | st.lists(st.integers()),
    ),
    st.integers(1, 255),
)
def test_no_report_turns_a_failure_into_a_success(report: dict[str, object], code: int) -> None:
    """A forged report may change which failure it is, never that it is one."""
    verdict = judge(ExitFacts(status=exited(code)), stopped=None, report=report, cpu_limit_s=2)
    assert verdict.status is not Status.OK
