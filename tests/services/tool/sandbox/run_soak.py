"""Draw hostile programs at random, interleave harmless ones, and count what is left and what
flipped.

    run_soak.py LEVEL DRAWS

Started by test_soak.py in a pid namespace of its own. Concurrency is twice the cores. Prints one
JSON object.
"""

import asyncio
import collections
import json
import os
import random
import sys
from dataclasses import replace

from run_threats import LIMITS, resources, settled, stopped
from tool_threats import THREATS

from services.tool.sandbox.host.execution import Job
from services.tool.sandbox.host.pool import Sandbox, SandboxConfig
from services.tool.sandbox.plan import Level

HARMLESS = [
    ("print(sum(range(1000)))", ("ok", "499500\n")),
    ("import numpy as np\nprint(np.arange(6).reshape(2, 3).sum())", ("ok", "15\n")),
    ("raise ValueError('x')", ("error", "")),
    ("import sys\nsys.exit(4)", ("exit", "")),
    ("open('f', 'w').write('data')\nprint(open('f').read())", ("ok", "data\n")),
]


async def main(level: Level, draws: int) -> None:
    generator = random.Random(draws)
    threats = [threat for threat in THREATS if level.value in threat.levels]
    before = resources()
    sandbox = Sandbox(SandboxConfig(level=level, presets=("numpy",), warm_slots=4))
    await sandbox.start()
    idle = await settled(sandbox)
    gate = asyncio.Semaphore(2 * len(os.sched_getaffinity(0)))
    statuses: collections.Counter[str] = collections.Counter()
    flips: list[str] = []

    async def hostile() -> None:
        threat = generator.choice(threats)
        async with gate:
            job = Job(code=threat.code, stdin=threat.stdin.encode(), files=threat.files)
            outcome = await sandbox.run(job, LIMITS)
        statuses[outcome.status.value] += 1

    async def harmless() -> None:
        code, expected = generator.choice(HARMLESS)
        async with gate:
            outcome = await sandbox.run(Job(code=code), replace(LIMITS, wall_s=30.0))
        if (outcome.status.value, outcome.stdout) != expected:
            flips.append(f"{outcome.status.value}: {code!r} {outcome.message}")

    await asyncio.gather(*(harmless() if i % 3 == 0 else hostile() for i in range(draws)))
    after = await settled(sandbox)
    restarts = sandbox.restarts
    await sandbox.stop()
    summary = {
        "draws": draws,
        "statuses": statuses,
        "flips": flips,
        "restarts": restarts,
        "before": before,
        "idle": idle,
        "after": after,
        "stopped": await stopped(before["processes"]),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    asyncio.run(main(Level(sys.argv[1]), int(sys.argv[2])))
