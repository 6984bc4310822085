"""Measure the tool service against its floor and against what it replaces, in one run on one
machine.

    python benchmarks/tool_service.py [--quick] [--memory RUNS]

Everything is printed as a ratio of two numbers taken in the same run, beside the goal. The floor is
fork, _exit and wait of an interpreter with the same libraries preloaded: nothing that runs code in
a fresh process can be faster.
"""

import argparse
import asyncio
import contextlib
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from common.serving import environment, serving

from services.tool.sandbox.host.execution import Job, Limits
from services.tool.sandbox.host.pool import Sandbox, SandboxConfig
from services.tool.sandbox.inside import preload
from services.tool.sandbox.plan import Level

KEY = "benchmark-key"
LIMITS = Limits(
    wall_s=20.0, cpu_s=60, memory_bytes=512 << 20, output_bytes=1 << 20, fetch_bytes=1 << 20
)
HELLO = "print(1 + 1)"
NUMPY = "import numpy as np\nprint(round(float(np.linalg.det(np.eye(4) * 2)), 3))"
SYMPY = "import sympy as sp\nx = sp.Symbol('x')\nprint(sp.solve(x**2 - 5*x + 6, x))"
SNIPPETS = {"hello": HELLO, "numpy": NUMPY, "sympy solve": SYMPY}
GOALS = {"hello": 1.0, "numpy": 20.0, "sympy solve": 20.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table: what was measured, and the goal it is held against."""

    name: str
    value: float
    goal: float
    unit: str
    at_least: bool
    detail: str

    def __str__(self) -> str:
        met = self.value >= self.goal if self.at_least else self.value <= self.goal
        sign = ">=" if self.at_least else "<="
        verdict = "ok  " if met else "MISS"
        goal = f"{sign} {self.goal:g}"
        return (
            f"{verdict} {self.name:<44} {self.value:>9.2f} {self.unit:<5} {goal:<9} {self.detail}"
        )


def at_least(name: str, value: float, goal: float, detail: str) -> Row:
    """A ratio that must not fall below its goal."""
    return Row(name=name, value=value, goal=goal, unit="x", at_least=True, detail=detail)


def at_most(name: str, value: float, goal: float, unit: str, detail: str) -> Row:
    """A value that must not exceed its goal."""
    return Row(name=name, value=value, goal=goal, unit=unit, at_least=False, detail=detail)


def percentile(values: list[float], q: float) -> float:
    """The value below which a share `q` of `values` lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def floor_main(seconds: float) -> None:
    """Child process: fork + _exit + wait of a preloaded, warmed interpreter; prints its rate."""
    for preset in ("numpy", "sympy"):
        preload.load(preset)
    proc = os.open("/proc", os.O_PATH)
    preload.collapse_heap(proc)
    gc.collect()
    gc.freeze()
    gc.disable()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        count += 1
    print(count / (time.perf_counter() - started))


def measure_floor(seconds: float) -> float:
    """Forks per second of the floor."""
    argv = [sys.executable, __file__, "--floor", str(seconds)]
    env = environment(OPENBLAS_NUM_THREADS="1")
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    return float(done.stdout)


async def rate(run: Callable[[], Awaitable[None]], seconds: float, concurrency: int) -> float:
    """Executions per second with `concurrency` callers."""
    count = 0
    started = time.perf_counter()

    async def caller() -> None:
        nonlocal count
        while time.perf_counter() - started < seconds:
            await run()
            count += 1

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return count / (time.perf_counter() - started)


async def core_rows(seconds: float, floor: float) -> list[Row]:
    """The sandbox without HTTP, one launcher per core, as the service starts it."""
    cores = len(os.sched_getaffinity(0))
    config = SandboxConfig(
        level=Level.FULL, presets=("numpy", "sympy"), launchers=cores, warm_slots=4
    )
    sandbox = Sandbox(config)
    await sandbox.start()

    async def hello() -> None:
        outcome = await sandbox.run(Job(code=HELLO + "  # sympy"), LIMITS)
        assert outcome.stdout == "2\n", outcome

    try:
        await rate(hello, 0.5, cores)
        speed = await rate(hello, seconds, cores)
        waits = await paced_ms(hello, 100)
    finally:
        await sandbox.stop()
    ratio = speed / cores / floor
    text = f"{speed:.0f}/s on {cores} cores, floor {floor:.0f}/s per core"
    p99 = f"p99 {percentile(waits, 0.99):.2f} ms, min {min(waits):.2f} ms"
    return [
        at_least("core, full level, per core / floor", ratio, 0.55, text),
        at_most("core, warm print(1+1), p50", percentile(waits, 0.5), 1.5, "ms", p99),
    ]


async def paced_ms(run: Callable[[], Awaitable[None]], count: int) -> list[float]:
    """Latencies with pauses in between, so that a slot is waiting each time."""
    values = []
    for _ in range(count):
        await asyncio.sleep(0.03)
        started = time.perf_counter()
        await run()
        values.append((time.perf_counter() - started) * 1e3)
    return values


@contextlib.asynccontextmanager
async def server() -> AsyncIterator[tuple[aiohttp.ClientSession, int]]:
    """The service in its own process; yields a client and the process id."""
    flags = ("--max-queue", "2000", "--log-level", "WARNING", "--min-isolation", "full")
    command = ("-m", "services.tool", "--port", "0", "--api-key", KEY, *flags)
    with serving(*command) as (url, pid):
        # aiohttp: httpx spends more on a request than the service does, and more per request
        # the more connections there are.
        async with aiohttp.ClientSession(
            url,
            headers={"Authorization": f"Bearer {KEY}"},
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=120),
        ) as client:
            yield client, pid


def poster(client: aiohttp.ClientSession, code: str) -> Callable[[], Awaitable[None]]:
    """A caller's request: run `code` and insist that it ended well."""

    async def post() -> None:
        answer = await execute(client, {"code": code, "timeout_s": 60})
        assert answer["status"] == "ok", answer

    return post


async def execute(client: aiohttp.ClientSession, job: dict[str, Any]) -> dict[str, Any]:
    """The service's answer to one job."""
    async with client.post("/v1/execute", json=job) as response:
        answer: dict[str, Any] = await response.json()
        return answer


def subprocess_runner(code: str) -> Callable[[], Awaitable[None]]:
    async def run() -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
        )
        await process.communicate()
        assert process.returncode == 0

    return run


def resident_mb(pid: int) -> float:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


async def overshoot_ms(client: aiohttp.ClientSession, count: int, concurrency: int) -> list[float]:
    """How late timeouts come, by the service's own clock."""
    gate = asyncio.Semaphore(concurrency)

    async def one() -> float:
        async with gate:
            job = {"code": "import time\ntime.sleep(60)", "timeout_s": 0.2}
            return float((await execute(client, job))["usage"]["wall_ms"])

    return [wall - 200.0 for wall in await asyncio.gather(*(one() for _ in range(count)))]


async def http_rows(seconds: float, floor: float, runs: int) -> AsyncIterator[Row]:
    """The service over HTTP, with the client on the same cores."""
    async with server() as (client, pid):
        for code in SNIPPETS.values():
            await rate(poster(client, code), 0.5, 2)
        waits = await paced_ms(poster(client, HELLO), 100)
        p99 = f"p99 {percentile(waits, 0.99):.2f} ms"
        yield at_most("HTTP, warm print(1+1), p50", percentile(waits, 0.5), 4.0, "ms", p99)
        for name, code in SNIPPETS.items():
            ours = await rate(poster(client, code), seconds, 8)
            theirs = await rate(subprocess_runner(code), seconds, 8)
            text = f"{ours:.0f}/s against {theirs:.1f}/s"
            yield at_least(f"HTTP, {name} at 8, / python -c", ours / theirs, GOALS[name], text)
        speeds = {n: await rate(poster(client, HELLO), seconds, n) for n in (1, 8, 32, 256)}
        cores = len(os.sched_getaffinity(0))
        peak = max(speeds.values())
        text = ", ".join(f"{n}: {speed:.0f}/s" for n, speed in speeds.items())
        yield at_least("HTTP, full level, per core / floor", peak / cores / floor, 0.40, text)
        yield at_least("HTTP, at 256 / peak", speeds[256] / peak, 0.9, text)
        for name, concurrency, goal in (("idle", 1, 100.0), ("loaded", 4 * cores, 300.0)):
            late = await overshoot_ms(client, 30, concurrency)
            text = f"median {statistics.median(late):.1f} ms"
            yield at_most(
                f"timeout overshoot, {name}, p99", percentile(late, 0.99), goal, "ms", text
            )
        for row in await recovery_rows(client, pid):
            yield row
        yield await memory_row(client, pid, runs)


async def recovery_rows(client: aiohttp.ClientSession, pid: int) -> list[Row]:
    """Kill a launcher and a zygote under load: how long does anything survive, when is an answer
    back?"""
    rows = []
    for victim in ("launcher", "zygote"):
        sleeping = {"code": "import time\ntime.sleep(5)", "timeout_s": 4}
        flying = [asyncio.create_task(execute(client, sleeping)) for _ in os.sched_getaffinity(0)]
        launcher = await busy_launcher(pid)
        below = [launcher, *launcher.children(recursive=True)]
        # Of the factory's children, rooms share its own memory and a zygote has far more.
        zygote = max(below[1].children(), key=lambda child: child.memory_info().rss)
        started = time.perf_counter()
        (launcher if victim == "launcher" else zygote).kill()
        back = asyncio.create_task(timed(poster(client, HELLO), started))
        while any(is_alive(process) for process in below):
            await asyncio.sleep(0.005)
        gone_s = time.perf_counter() - started
        answers = [answer["status"] for answer in await asyncio.gather(*flying)]
        text = f"callers: {', '.join(sorted(set(answers)))}"
        rows.append(at_most(f"{victim} killed: everything gone", gone_s, 1.0, "s", text))
        rows.append(at_most(f"{victim} killed: next answer", await back, 1.0, "s", ""))
    return rows


async def timed(run: Callable[[], Awaitable[None]], started: float) -> float:
    """Seconds from `started` to the end of one run."""
    await run()
    return time.perf_counter() - started


async def busy_launcher(pid: int) -> psutil.Process:
    """The launcher that has most to do: the one whose programs run."""
    await asyncio.sleep(1.0)
    return max(
        psutil.Process(pid).children(), key=lambda child: len(child.children(recursive=True))
    )


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def memory_only(runs: int) -> None:
    """Nothing but the memory of the API process, over as many runs as asked for."""
    async with server() as (client, pid):
        await rate(poster(client, HELLO), 5.0, 50)
        print(await memory_row(client, pid, runs), flush=True)


async def memory_row(client: aiohttp.ClientSession, pid: int, runs: int) -> Row:
    """Growth of the API process over many runs."""
    post = poster(client, HELLO)
    before = resident_mb(pid)
    for _ in range(runs // 50):
        await asyncio.gather(*(post() for _ in range(50)))
    after = resident_mb(pid)
    text = f"{before:.1f} -> {after:.1f} MB"
    return at_most(f"API memory after {runs} more runs / before", after / before, 1.1, "x", text)


async def measure(seconds: float, runs: int) -> None:
    floor = measure_floor(seconds)
    print(
        f"load {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores, floor {floor:.0f}/s"
    )
    for row in await core_rows(seconds, floor):
        print(row, flush=True)
    async for row in http_rows(seconds, floor, runs):
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="about a minute instead of ten")
    parser.add_argument("--memory", type=int, metavar="RUNS", help="measure memory alone")
    parser.add_argument("--floor", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.floor is not None:
        floor_main(arguments.floor)
        return
    if arguments.memory is not None:
        asyncio.run(memory_only(arguments.memory))
        return
    asyncio.run(measure(2.0, 1000) if arguments.quick else measure(10.0, 100_000))


if __name__ == "__main__":
    main()
