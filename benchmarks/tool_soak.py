"""Send the tool service hostile programs at random with harmless ones between, and count what
changed.

    python benchmarks/tool_soak.py [--draws 2000] [--setup root/full ordinary/basic ...]

The programs are those of the tests' threat list. Printed for each set-up: harmless programs whose
answer changed, hostile ones with an answer that is not right, processes and descriptors left, and
the memory of the service process over that after the first tenth. A set-up other than the current
user's needs root.
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
from common.serving import REPOSITORY, environment, serving

TESTS = REPOSITORY / "tests" / "services" / "tool"
sys.path += [str(TESTS), str(TESTS / "sandbox")]

import tool_privileges  # noqa: E402 - the tests' helpers are plain modules
from run_soak import HARMLESS  # noqa: E402
from run_threats import processes  # noqa: E402
from tool_threats import THREATS, Threat  # noqa: E402

SETUPS = ("root/full", "root/uid", "ordinary/full", "ordinary/basic")
KEY = "benchmark-key"
LIMITS = {"memory_mb": 192, "output_bytes": 1 << 16, "cpu_s": 30, "deadline_s": 3600}
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(slots=True, kw_only=True)
class Count:
    """What was seen so far."""

    sent: int = 0
    flips: list[str] = field(default_factory=list)
    """Harmless programs that were answered otherwise than alone."""
    wrong: list[str] = field(default_factory=list)
    """Hostile programs whose answer is none of the right ones."""


async def settled(count: Callable[[], int]) -> int:
    """A count once it has been the same for 2 s, or as it is after a minute."""
    last, since = count(), time.monotonic()
    give_up_s = since + 60.0
    while time.monotonic() < min(since + 2.0, give_up_s):
        await asyncio.sleep(0.1)
        now = count()
        if now != last:
            last, since = now, time.monotonic()
    return last


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES


async def execute(client: aiohttp.ClientSession, **body: Any) -> dict[str, Any]:
    async with client.post("/v1/execute", json={**LIMITS, **body}) as response:
        answer: dict[str, Any] = await response.json()
        return answer


async def send_hostile(client: aiohttp.ClientSession, threat: Threat, count: Count) -> None:
    # Programs that are to end by themselves get time enough for a busy machine.
    timeout_s = 1.0 if "timeout" in threat.expect else 60.0
    answer = await execute(
        client, code=threat.code, stdin=threat.stdin, files=threat.files, timeout_s=timeout_s
    )
    said = threat.says is None or threat.says in answer["stdout"]
    if answer["status"] not in threat.expect or (answer["status"] == "ok" and not said):
        count.wrong.append(f"{threat.row}: {answer['status']} {answer['message']}")


async def send_harmless(client: aiohttp.ClientSession, number: int, count: Count) -> None:
    code, expected = HARMLESS[number % len(HARMLESS)]
    answer = await execute(client, code=code, timeout_s=60.0)
    if (answer["status"], answer["stdout"]) != expected:
        count.flips.append(f"{code!r}: {answer['status']} {answer['message']}")


async def send_all(url: str, pid: int, level: str, draws: int) -> tuple[Count, dict[str, float]]:
    """Send `draws` programs. Returns what came back, and memory and what was left."""
    generator = random.Random(draws)
    threats = [threat for threat in THREATS if level in threat.levels]
    gate = asyncio.Semaphore(2 * len(os.sched_getaffinity(0)))
    count = Count()
    headers = {"Authorization": f"Bearer {KEY}"}
    timeout = aiohttp.ClientTimeout(total=3600)
    before = (await settled(processes), await settled(partial(descriptors, pid)))
    async with aiohttp.ClientSession(url, headers=headers, timeout=timeout) as client:

        async def send(number: int) -> None:
            async with gate:
                if number % 3 == 0:
                    await send_harmless(client, number // 3, count)
                else:
                    await send_hostile(client, generator.choice(threats), count)
            count.sent += 1
            if count.sent % 200 == 0:
                print(f"  {count.sent} of {draws} at {level}", file=sys.stderr, flush=True)

        first = draws // 10
        await asyncio.gather(*(send(number) for number in range(first)))
        before_bytes = resident_bytes(pid)
        await asyncio.gather(*(send(number) for number in range(first, draws)))
        after_bytes = resident_bytes(pid)
        async with client.get("/metrics") as response:
            metrics = await response.text()
    after = (await settled(processes), await settled(partial(descriptors, pid)))
    restarts = next(
        float(line.split()[1])
        for line in metrics.splitlines()
        if line.startswith("openrlhf_alp_tool_launcher_restarts ")
    )
    return count, {
        "processes_left": after[0] - before[0],
        "descriptors_left": after[1] - before[1],
        "memory_ratio": after_bytes / before_bytes,
        "launcher_restarts": restarts,
    }


def soak(level: str, draws: int) -> None:
    """Run one set-up with this process's rights; prints one JSON object."""
    flags = ("--isolation", level, "--min-isolation", level, "--presets", "numpy")
    started = time.monotonic()
    command = ("-m", "services.tool", "--port", "0", "--api-key", KEY, *flags)
    with serving(*command, "--log-level", "ERROR") as (url, pid):
        count, left = asyncio.run(send_all(url, pid, level, draws))
    minutes = (time.monotonic() - started) / 60
    print(json.dumps({"flips": count.flips, "wrong": count.wrong, **left, "minutes": minutes}))


def report(setup: str, result: dict[str, Any]) -> bool:
    """Print one line, and what was wrong below it. Returns whether all of it was right."""
    left = (result["processes_left"], result["descriptors_left"], result["launcher_restarts"])
    met = not result["flips"] and not result["wrong"] and not any(left)
    met = met and result["memory_ratio"] <= 1.1
    print(
        f"{'ok  ' if met else 'MISS'} {setup:<15} flips {len(result['flips'])}, wrong answers "
        f"{len(result['wrong'])}, processes / descriptors left {left[0]} / {left[1]}, launchers "
        f"restarted {left[2]:.0f}, memory x{result['memory_ratio']:.3f}, "
        f"{result['minutes']:.1f} minutes",
        flush=True,
    )
    for line in (*result["flips"], *result["wrong"]):
        print(f"     {line}")
    return met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=2000, help="programs for each set-up")
    parser.add_argument("--setup", nargs="+", choices=SETUPS, default=SETUPS)
    parser.add_argument("--inside", metavar="LEVEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside is not None:
        soak(arguments.inside, arguments.draws)
        return
    met = True
    for setup in arguments.setup:
        user, level = setup.split("/")
        reason = tool_privileges.unavailable(user)
        if reason is not None:
            print(f"skip {setup:<15} {reason}")
            continue
        inside = [sys.executable, __file__, "--inside", level, "--draws", str(arguments.draws)]
        env = environment(**tool_privileges.environment(user))
        argv = tool_privileges.command(user, inside)
        done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)
        if done.returncode != 0:
            raise SystemExit(f"{setup} broke; see its message above.")
        met = report(setup, json.loads(done.stdout.splitlines()[-1])) and met
    sys.exit(not met)


if __name__ == "__main__":
    main()
