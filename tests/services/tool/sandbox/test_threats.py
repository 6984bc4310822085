"""Every threat row at every level, as root and as an ordinary user, asserting the exact class."""

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tool_privileges import command, environment, unavailable
from tool_sessions import SESSIONS, SessionThreat
from tool_threats import THREATS, Threat

ROOM = Path(__file__).parent
REPOSITORY = ROOM.parents[3]
SETUPS = [("root", "full"), ("root", "uid"), ("ordinary", "full"), ("ordinary", "basic")]
RUN_S = 280


@functools.cache
def results(user: str, level: str) -> dict[str, dict[str, Any]]:
    """Run the whole list once; answers by row."""
    argv = [sys.executable, str(ROOM / "run_threats.py"), level]
    env = {**environment(user), "PYTHONPATH": f"{REPOSITORY}:{ROOM}"}
    done = subprocess.run(
        command(user, argv), env=env, cwd=REPOSITORY, capture_output=True, text=True, timeout=RUN_S
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    answers = {line["row"]: line for line in lines}
    if "summary" not in answers:
        pytest.fail(f"the run as {user} at {level} broke: {done.stderr[-3000:]}")
    return answers


def reason_to_skip(user: str, level: str, threat: Threat | None = None) -> str | None:
    if threat is not None and level not in threat.levels:
        return f"does not apply at level {level}"
    if threat is not None and threat.x86_only and platform.machine() != "x86_64":
        return "system call numbers of x86_64"
    if level == "full" and not Path("/proc/self/ns/user").exists():
        return "this kernel has no user namespaces"
    return unavailable(user)


@pytest.mark.parametrize("threat", THREATS, ids=[threat.row for threat in THREATS])
@pytest.mark.parametrize(("user", "level"), SETUPS, ids=[f"{u}-{lv}" for u, lv in SETUPS])
def test_a_threat_gets_the_answer_that_is_right(user: str, level: str, threat: Threat) -> None:
    reason = reason_to_skip(user, level, threat)
    if reason:
        pytest.skip(reason)
    answer = results(user, level)[threat.row]
    assert answer["status"] in threat.expect, answer
    if threat.says is not None and answer["status"] in ("ok", "timeout", "crashed"):
        assert threat.says in answer["stdout"], answer
    if threat.errors and answer["status"] == "error":
        assert answer["error"]["type"] in threat.errors, answer
    if threat.signal is not None:
        assert answer["signal"] == threat.signal, answer


@pytest.mark.parametrize("threat", SESSIONS, ids=[threat.row for threat in SESSIONS])
@pytest.mark.parametrize(("user", "level"), SETUPS, ids=[f"{u}-{lv}" for u, lv in SETUPS])
def test_cells_are_answered_for_themselves(user: str, level: str, threat: SessionThreat) -> None:
    reason = reason_to_skip(user, level)
    if reason is None and level not in threat.levels:
        reason = f"does not apply at level {level}"
    if reason:
        pytest.skip(reason)
    line = results(user, level)[f"session-{threat.row}"]
    assert [tuple(answer) for answer in line["answers"]] == list(threat.expect)
    assert line["lost"] == list(threat.lost or [False] * len(threat.cells))


@pytest.mark.parametrize(("user", "level"), SETUPS, ids=[f"{u}-{lv}" for u, lv in SETUPS])
def test_nothing_is_left_after_the_whole_list(user: str, level: str) -> None:
    reason = reason_to_skip(user, level)
    if reason:
        pytest.skip(reason)
    summary = results(user, level)["summary"]
    assert summary["restarts"] == 0
    assert summary["after"] == summary["idle"], "processes, mounts and descriptors of the pool"
    assert summary["stopped"]["processes"] == summary["before"]["processes"]
    assert summary["stopped"]["mounts"] == summary["before"]["mounts"]


@pytest.mark.parametrize(("user", "level"), SETUPS, ids=[f"{u}-{lv}" for u, lv in SETUPS])
def test_kills_come_soon_after_the_deadline(user: str, level: str) -> None:
    """The limit is 1 s. The median, because a busy machine may be late once; the benchmark measures
    p99."""
    reason = reason_to_skip(user, level)
    if reason:
        pytest.skip(reason)
    walls = [a["wall_s"] for a in results(user, level).values() if a.get("status") == "timeout"]
    assert walls and statistics.median(walls) < 5.0


def test_at_least_one_setup_was_tried() -> None:
    """A machine on which every layer is skipped proves nothing: that is a failure, not a pass."""
    tried = [setup for setup in SETUPS if reason_to_skip(*setup) is None]
    assert tried, "no level could be tried here"
    strongest = "root" if os.geteuid() == 0 else "ordinary"
    assert any(user == strongest for user, _ in tried)
