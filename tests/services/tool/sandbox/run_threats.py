"""Run the whole threat list at one level in this process's privileges; print one JSON line per
threat.

Started by test_threats.py as root and as an ordinary user, in a pid namespace of its own so that
what survives can be counted. The last line tells what was left.
"""

import asyncio
import contextlib
import json
import os
import platform
import sys
from dataclasses import asdict, replace

from tool_sessions import SESSIONS, SessionThreat
from tool_threats import THREATS, Threat

from services.tool.sandbox.host.execution import Job, Limits
from services.tool.sandbox.host.pool import Sandbox, SandboxConfig
from services.tool.sandbox.host.session import SandboxSession
from services.tool.sandbox.plan import Level

LIMITS = Limits(
    wall_s=1.0, cpu_s=30, memory_bytes=192 << 20, output_bytes=1 << 16, fetch_bytes=1 << 16
)


def processes() -> int:
    """Living processes of this pid namespace. Dead orphans stay listed: pid 1 here reaps nobody."""
    count = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
            count += file.read().rpartition(")")[2].split()[0] != "Z"
    return count


def resources() -> dict[str, int]:
    with open("/proc/self/mounts") as file:
        mounts = len(file.readlines())
    descriptors = len(os.listdir("/proc/self/fd"))
    return {"processes": processes(), "mounts": mounts, "descriptors": descriptors}


async def settled(sandbox: Sandbox) -> dict[str, int]:
    """Resources once every pool is full again, or as they are after ten seconds."""
    wanted = sandbox.config.warm_slots * len(sandbox.config.presets)
    for _ in range(200):
        if sandbox.waiting() == wanted and sandbox.busy() == 0:
            break
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.2)
    if sandbox.cgroups is None:
        return resources()
    cgroups = sum(path.is_dir() for path in sandbox.cgroups.folder.iterdir())
    return {**resources(), "cgroups": cgroups}


async def stopped(processes_before: int) -> dict[str, int]:
    """Resources once the killed processes are gone, at the latest after one second."""
    for _ in range(20):
        if processes() == processes_before:
            break
        await asyncio.sleep(0.05)
    return resources()


async def run_one(sandbox: Sandbox, threat: Threat, gate: asyncio.Semaphore) -> None:
    async with gate:
        job = Job(code=threat.code, stdin=threat.stdin.encode(), files=threat.files)
        # Programs that are to end by themselves get time enough for a busy test machine.
        wall_s = 1.0 if "timeout" in threat.expect else 40.0
        outcome = await sandbox.run(job, replace(LIMITS, wall_s=wall_s))
    line = {"row": threat.row, **asdict(outcome)}
    for stream in ("stdout", "stderr"):
        line[stream] = line[stream][:4000]
    print(json.dumps(line), flush=True)


async def run_session(sandbox: Sandbox, threat: SessionThreat, gate: asyncio.Semaphore) -> None:
    line: dict[str, object] = {"row": f"session-{threat.row}", "answers": [], "lost": []}
    async with gate:
        slot = await sandbox.take("numpy", LIMITS.memory_bytes)
        session = await SandboxSession.open(slot, LIMITS, None)
        limits = replace(LIMITS, wall_s=1.5 if threat.hangs else 40.0)
        answers = [await session.run_cell(c, n, limits) for n, c in enumerate(threat.cells)]
        session.close()
    line["answers"] = [(answer.outcome.status, answer.result) for answer in answers]
    line["lost"] = [answer.state_lost for answer in answers]
    print(json.dumps(line), flush=True)


async def main(level: Level) -> None:
    os.environ["PLANTED"] = "PLANTED-SECRET"
    before = resources()
    sandbox = Sandbox(SandboxConfig(level=level, presets=("numpy",)))
    await sandbox.start()
    idle = await settled(sandbox)
    gate = asyncio.Semaphore(2)
    threats = [t for t in THREATS if level.value in t.levels]
    threats = [t for t in threats if not t.x86_only or platform.machine() == "x86_64"]
    await asyncio.gather(*(run_one(sandbox, threat, gate) for threat in threats))
    sessions = [s for s in SESSIONS if level.value in s.levels]
    await asyncio.gather(*(run_session(sandbox, threat, gate) for threat in sessions))
    busy = await settled(sandbox)
    restarts = sandbox.restarts
    await sandbox.stop()
    summary = {
        "before": before,
        "idle": idle,
        "after": busy,
        "stopped": await stopped(before["processes"]),
    }
    print(json.dumps({"row": "summary", "restarts": restarts, **summary}), flush=True)


if __name__ == "__main__":
    asyncio.run(main(Level(sys.argv[1])))
