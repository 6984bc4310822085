"""A long run of random hostile programs. SOAK_DRAWS=10000 is the full length, about ten minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tool_privileges import command, environment, unavailable

ROOM = Path(__file__).parent
REPOSITORY = ROOM.parents[3]


@pytest.mark.e2e
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("user", "level"), [("root", "full"), ("ordinary", "basic")])
def test_hostile_programs_leave_nothing_and_turn_no_verdict(user: str, level: str) -> None:
    reason = unavailable(user)
    if reason:
        pytest.skip(reason)
    draws = os.environ.get("SOAK_DRAWS", "300")
    argv = command(user, [sys.executable, str(ROOM / "run_soak.py"), level, draws])
    env = {**environment(user), "PYTHONPATH": f"{REPOSITORY}:{ROOM}"}
    done = subprocess.run(argv, env=env, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["flips"] == [] and summary["restarts"] == 0
    assert "sandbox_error" not in summary["statuses"]
    assert summary["after"] == summary["idle"]
    assert summary["stopped"]["processes"] == summary["before"]["processes"]
    assert summary["stopped"]["mounts"] == summary["before"]["mounts"]
