"""Kills from outside: nothing survives, the service is back, callers are told the truth."""

import asyncio
import os
import resource
import signal
import time

import httpx
import psutil
import pytest

from services.tool.service import ToolService

pytestmark = pytest.mark.asyncio(loop_scope="module")


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, nearest first; slots come and go while it looks."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


async def test_killing_the_launcher_ends_everything_below_and_the_service_is_back(
    client: httpx.AsyncClient, service: ToolService
) -> None:
    job = {"code": "import time\ntime.sleep(30)", "timeout_s": 30}
    flying = asyncio.create_task(client.post("/v1/execute", json=job))
    while service.sandbox.busy() == 0:
        await asyncio.sleep(0.01)
    (launcher,) = service.sandbox.processes()
    below = descendants(launcher)
    assert len(below) >= 4
    os.kill(launcher, signal.SIGKILL)
    killed = time.perf_counter()
    answer = (await flying).json()
    assert answer["status"] == "sandbox_error" and "died while the code ran" in answer["message"]
    back = await client.post("/v1/execute", json={"code": "print(1)"})
    assert back.json()["stdout"] == "1\n"
    while any(alive(pid) for pid in below):
        assert time.perf_counter() - killed < 5.0, "processes survived their launcher"
        await asyncio.sleep(0.01)


async def test_killing_a_zygote_is_noticed_and_repaired(
    client: httpx.AsyncClient, service: ToolService
) -> None:
    (launcher,) = service.sandbox.processes()
    before = service.sandbox.restarts
    (factory,) = psutil.Process(launcher).children()
    # Its other children hold rooms open and share its own, smaller memory.
    zygote = max(factory.children(), key=lambda child: child.memory_info().rss)
    zygote.kill()
    while service.sandbox.restarts == before:
        await asyncio.sleep(0.01)
    answer = await client.post("/v1/execute", json={"code": "print(2)"})
    assert answer.json()["stdout"] == "2\n"


async def test_a_launcher_that_cannot_be_started_is_tried_again_and_probes_say_so(
    client: httpx.AsyncClient, service: ToolService, monkeypatch: pytest.MonkeyPatch
) -> None:
    (launcher,) = service.sandbox.processes()
    monkeypatch.setattr("services.tool.sandbox.host.launcher_handle.sys.executable", "/bin/false")
    os.kill(launcher, signal.SIGKILL)
    while not service.sandbox.down:
        await asyncio.sleep(0.01)
    for _ in range(3):
        refused = await client.post("/v1/execute", json={"code": "print(1)"})
        assert refused.json()["status"] == "sandbox_error", refused.text
        assert refused.status_code < 500 or refused.status_code == 503
    for probe in ("/readyz", "/livez"):
        answer = await client.get(probe)
        assert answer.status_code == 503 and answer.json()["reason"]
    monkeypatch.undo()
    while not service.sandbox.healthy:
        await asyncio.sleep(0.05)
    answer = await client.post("/v1/execute", json={"code": "print(3)"})
    assert answer.json()["stdout"] == "3\n"
    assert (await client.get("/readyz")).status_code == 200
    assert (await client.get("/livez")).json() == {"status": "alive"}


async def test_a_service_without_descriptors_loses_no_launcher(
    client: httpx.AsyncClient, service: ToolService
) -> None:
    before = service.sandbox.restarts
    flying = asyncio.create_task(
        client.post("/v1/execute", json={"code": "import time\ntime.sleep(3)\nprint(5)"})
    )
    while service.sandbox.busy() == 0:
        await asyncio.sleep(0.01)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Room for two more: a slot needs five.
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 3, hard)
    )
    try:
        for _ in range(6):
            answer = await client.post("/v1/execute", json={"code": "print(4)"})
            assert answer.json()["status"] in ("ok", "sandbox_error"), answer.text
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (await flying).json()["stdout"] == "5\n"
    assert (await client.post("/v1/execute", json={"code": "print(6)"})).json()["stdout"] == "6\n"
    assert service.sandbox.restarts == before


async def test_a_flood_of_instant_timeouts_hurts_nobody_and_leaves_nothing(
    client: httpx.AsyncClient, service: ToolService
) -> None:
    """Threat row 82. The queue stays bounded, harmless programs in between end as always."""
    before = service.sandbox.restarts
    flood = {"code": "while True: pass", "timeout_s": 0.02, "deadline_s": 60}
    harmless = {"code": "print(6 * 7)", "timeout_s": 30, "deadline_s": 60}
    jobs = [harmless if index % 10 == 0 else flood for index in range(200)]
    answers = await asyncio.gather(*(client.post("/v1/execute", json=job) for job in jobs))
    for job, answer in zip(jobs, answers, strict=True):
        body = answer.json()
        if job is harmless:
            assert (body["status"], body["stdout"]) == ("ok", "42\n"), body
        else:
            assert body["status"] == "timeout" and body["usage"]["wall_ms"] >= 20, body
    give_up = time.monotonic() + 30
    while service.sandbox.busy() and time.monotonic() < give_up:
        await asyncio.sleep(0.01)
    admission = service.rules.admission
    assert (service.sandbox.busy(), admission.running, admission.waiting) == (0, 0, 0)
    assert service.sandbox.restarts == before


async def test_a_flood_beyond_the_queue_is_refused_at_once(client: httpx.AsyncClient) -> None:
    """2 slots run, 512 wait: of 600 callers at least 86 are told to come again."""
    job = {"code": "pass", "timeout_s": 30, "deadline_s": 250}
    answers = await asyncio.gather(*(client.post("/v1/execute", json=job) for _ in range(600)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert 600 - 2 - 512 <= len(refused) < 600
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert all(answer.json()["status"] == "ok" for answer in answers if answer not in refused)


async def test_a_session_that_lost_its_launcher_says_so(
    client: httpx.AsyncClient, service: ToolService
) -> None:
    session = (await client.post("/v1/sessions", json={})).json()["session_id"]
    url = f"/v1/sessions/{session}/execute"
    assert (await client.post(url, json={"code": "x = 1"})).json()["status"] == "ok"
    (launcher,) = service.sandbox.processes()
    os.kill(launcher, signal.SIGKILL)
    while service.sandbox.processes() == [launcher]:
        await asyncio.sleep(0.01)
    lost = await client.post(url, json={"code": "x"})
    assert lost.status_code in (200, 410)
    if lost.status_code == 200:
        assert (lost.json()["status"], lost.json()["state_lost"]) == ("sandbox_error", True)
    assert (await client.get(f"/v1/sessions/{session}")).status_code == 410


async def test_many_executions_leave_no_descriptor_and_no_process(
    client: httpx.AsyncClient, service: ToolService
) -> None:
    codes = [
        "print(1)",
        "1/0",
        "import os\nos.abort()",
        "print('x' * 10**7)",
        "import os\nos.fork()",
    ]

    async def settled() -> tuple[int, int]:
        while service.sandbox.busy() or service.sandbox.waiting() < 2:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.2)
        return len(os.listdir("/proc/self/fd")), len(descendants(service.sandbox.processes()[0]))

    await client.post("/v1/execute", json={"code": "1"})
    before = await settled()
    jobs = [client.post("/v1/execute", json={"code": codes[i % len(codes)]}) for i in range(100)]
    answers = [answer.json()["status"] for answer in await asyncio.gather(*jobs)]
    assert "sandbox_error" not in answers
    give_up = time.monotonic() + 30
    while (after := await settled()) != before and time.monotonic() < give_up:
        continue
    assert after == before
