"""SandboxFusion's contract: what its SDK and verl's client send and what they rely on."""

import asyncio
import base64
import time

import httpx
import pytest
from tool_server import KEY, served

from services.common import routes
from services.tool.api import fusion
from services.tool.service import ToolService

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS = {"status", "message", "compile_result", "run_result", "executor_pod_name", "files"}
RUN_KEYS = {"status", "execution_time", "return_code", "stdout", "stderr"}


async def run_code(client: httpx.AsyncClient, code: str, **fields: object) -> dict[str, object]:
    """The request verl builds: every field but files present, stdin possibly null."""
    body = {
        "compile_timeout": 10,
        "run_timeout": 10,
        "code": code,
        "stdin": None,
        "memory_limit_MB": 512,
        "language": "python",
        "files": {},
        "fetch_files": [],
    }
    answer = await client.post("/run_code", json=body | fields)
    assert answer.status_code == 200, answer.text
    parsed: dict[str, object] = answer.json()
    assert set(parsed) == KEYS
    return parsed


@pytest.mark.parametrize(
    ("code", "fields", "status", "run_status", "return_code"),
    [
        ("print('hi')", {}, "Success", "Finished", 0),
        ("1/0", {}, "Failed", "Finished", 1),
        ("import sys\nsys.exit(3)", {}, "Failed", "Finished", 3),
        ("import ctypes\nctypes.string_at(0)", {}, "Failed", "Finished", -11),
        (
            "import time\nprint('x')\ntime.sleep(9)",
            {"run_timeout": 0.5},
            "Failed",
            "TimeLimitExceeded",
            None,
        ),
        ("b'x' * (1 << 33)", {}, "Failed", "Finished", 1),
        ("print('y' * 10**8)", {}, "Failed", "Finished", -9),
    ],
)
async def test_status_and_return_code(
    client: httpx.AsyncClient,
    code: str,
    fields: dict[str, object],
    status: str,
    run_status: str,
    return_code: int | None,
) -> None:
    answer = await run_code(client, code, **fields)
    run = answer["run_result"]
    assert isinstance(run, dict) and set(run) == RUN_KEYS
    assert (answer["status"], run["status"], run["return_code"]) == (
        status,
        run_status,
        return_code,
    )
    assert isinstance(run["stdout"], str) and isinstance(run["stderr"], str)
    assert answer["compile_result"] is None


async def test_a_limit_is_explained_in_the_last_line_of_stderr(client: httpx.AsyncClient) -> None:
    answer = await run_code(client, "import time\ntime.sleep(9)", run_timeout=0.3)
    assert answer["run_result"]["stderr"].splitlines()[-1].startswith("sandbox: ")  # type: ignore[index]


async def test_stdin_and_failing_code_give_the_traceback(client: httpx.AsyncClient) -> None:
    """verl-project/verl#4074: stdin that nobody reads must not hide the error."""
    answer = await run_code(client, "raise KeyError('k')", stdin="x" * 300_000)
    assert "KeyError: 'k'" in answer["run_result"]["stderr"]  # type: ignore[index]


async def test_files_are_written_and_fetched_also_below_mnt(client: httpx.AsyncClient) -> None:
    data = base64.b64encode(b"abc").decode()
    code = "print(open('a').read(), open('/mnt/b').read())\nopen('/mnt/c', 'w').write('c')"
    answer = await run_code(
        client, code, files={"a": data, "/mnt/b": data, "none": None}, fetch_files=["/mnt/c", "zz"]
    )
    assert answer["run_result"]["stdout"] == "abc abc\n"  # type: ignore[index]
    assert answer["files"] == {"/mnt/c": base64.b64encode(b"c").decode()}


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd", "/mnt/../etc/passwd"])
async def test_files_outside_are_refused(client: httpx.AsyncClient, path: str) -> None:
    fetched = await run_code(client, "1", fetch_files=[path])
    written = await run_code(client, "1", files={path: ""})
    assert (fetched["status"], written["status"]) == ("SandboxError", "SandboxError")
    assert fetched["files"] == {}


async def test_other_languages_are_not_enabled_and_unknown_ones_are_invalid(
    client: httpx.AsyncClient,
) -> None:
    answer = await run_code(client, "1", language="cpp")
    assert answer["status"] == "SandboxError" and "not enabled" in str(answer["message"])
    unknown = await client.post("/run_code", json={"code": "1", "language": "klingon"})
    assert unknown.status_code == 422
    assert (await client.post("/run_code", json={"language": "python"})).status_code == 422


async def test_fields_of_other_versions_are_ignored(client: httpx.AsyncClient) -> None:
    assert (await run_code(client, "1", args=["-v"], later=1))["status"] == "Success"


async def test_a_full_queue_answers_504_which_clients_retry(
    client: httpx.AsyncClient, service: ToolService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.rules.admission, "max_queue", 0)
    sleep = {"code": "import time\ntime.sleep(1.5)", "language": "python"}
    busy = [asyncio.create_task(client.post("/run_code", json=sleep)) for _ in range(2)]
    while service.rules.admission.running < service.settings.slots:
        await asyncio.sleep(0.01)
    refused = await client.post("/run_code", json={"code": "1", "language": "python"})
    assert refused.status_code == 504
    assert [a.json()["status"] for a in await asyncio.gather(*busy)] == ["Success", "Success"]


async def test_more_callers_than_slots_all_get_their_timeout(
    service: ToolService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As verl's test of 100 programs that all time out: its client reads for at most compile, run
    and 10 more seconds, here 1.5 s in all, and 504 is retried twice. 2 slots need 4 s for 16."""
    monkeypatch.setattr(routes, "_BLANK_EVERY_S", 0.3)
    monkeypatch.setattr(fusion, "_PATIENCE_S", 0.3)
    body = {
        "code": "while True: pass",
        "language": "python",
        "compile_timeout": 0.5,
        "run_timeout": 0.5,
        "memory_limit_MB": 1024,
    }
    timeout = httpx.Timeout(60.0, read=1.5)
    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with (
        served(service) as url,
        httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, limits=limits) as client,
    ):
        started = time.monotonic()
        answers = await asyncio.gather(*(client.post("/run_code", json=body) for _ in range(16)))
        assert time.monotonic() - started > 1.5
    runs = [answer.json()["run_result"]["status"] for answer in answers]
    assert runs == ["TimeLimitExceeded"] * 16


async def test_a_wait_that_ends_in_a_refusal_is_a_sandbox_error(
    service: ToolService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fusion, "_PATIENCE_S", 0.1)
    monkeypatch.setattr(service.settings, "run_code_wait_s", 0.5)
    sleep = {"code": "import time\ntime.sleep(3)", "language": "python"}
    hasty = {"code": "1", "language": "python", "compile_timeout": 0, "run_timeout": 0.1}
    headers = {"Authorization": f"Bearer {KEY}"}
    async with (
        served(service) as url,
        httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client,
    ):
        busy = [asyncio.create_task(client.post("/run_code", json=sleep)) for _ in range(2)]
        while service.rules.admission.running < service.settings.slots:
            await asyncio.sleep(0.01)
        refused = (await client.post("/run_code", json=hasty)).json()
        assert refused["status"] == "SandboxError" and "never ran" in refused["message"]
        await asyncio.gather(*busy)


async def test_ping(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/ping")).json() == "pong"


async def test_jupyter_cells_share_state_and_report_each(client: httpx.AsyncClient) -> None:
    cells = ["x = 2", "print(x)\nx * 3", "1/0", "open('f', 'w').write('z')", "x"]
    answer = (await client.post("/run_jupyter", json={"cells": cells, "fetch_files": ["f"]})).json()
    assert answer["status"] == "Success" and answer["driver"]["status"] == "Finished"
    assert [cell["stdout"] for cell in answer["cells"]] == ["", "2\n", "", "", ""]
    assert answer["cells"][1]["display"] == [{"text/plain": "6"}]
    assert answer["cells"][2]["error"][0]["ename"] == "ZeroDivisionError"
    assert answer["cells"][4]["display"] == [{"text/plain": "2"}]
    assert answer["files"] == {"f": base64.b64encode(b"z").decode()}


async def test_jupyter_has_await_the_last_result_and_the_semicolon(
    client: httpx.AsyncClient,
) -> None:
    cells = [
        "import asyncio\nasync def f(): return 5\ntask = asyncio.create_task(f())\nawait f()",
        "_ + await task",
        "__, _",
        "x = 5;\n(x);",
        "x  # ;",
        "async with asyncio.timeout(9):\n    y = [i async for i in _agen()] if 0 else 3\ny",
    ]
    body = {"cells": cells, "cell_timeout": -1}
    answer = (await client.post("/run_jupyter", json=body)).json()
    assert [cell["error"] for cell in answer["cells"]] == [[]] * len(cells)
    shown = [cell["display"] and cell["display"][0]["text/plain"] for cell in answer["cells"]]
    assert shown == ["5", "10", "(5, 10)", [], "5", "3"]


@pytest.mark.parametrize(
    ("code", "command"),
    [
        ("%matplotlib inline", "%matplotlib"),
        ("x = 1\n%timeit x", "%timeit"),
        ("%%writefile a.txt\n((", "%%writefile"),
        ("!pip install x", "!pip"),
        ("names = !ls", "!ls"),
        ("print?", "print?"),
    ],
)
async def test_jupyter_refuses_commands_of_ipython_by_name(
    client: httpx.AsyncClient, code: str, command: str
) -> None:
    answer = (await client.post("/run_jupyter", json={"cells": [code, "1"]})).json()
    refused, after = answer["cells"]
    assert refused["error"][0]["ename"] == "SyntaxError"
    assert f"{command} is a command of IPython" in refused["error"][0]["evalue"]
    assert after["display"] == [{"text/plain": "1"}]


async def test_jupyter_stops_at_the_time_limit(
    client: httpx.AsyncClient, service: ToolService
) -> None:
    cells = ["print(1)", "import time\ntime.sleep(60)", "print(2)"]
    body = {"cells": cells, "total_timeout": 30, "cell_timeout": 3}
    answer = (await client.post("/run_jupyter", json=body)).json()
    assert (answer["status"], answer["driver"]["status"]) == ("Failed", "TimeLimitExceeded")
    assert len(answer["cells"]) == 2
    assert len(service.sessions) == 0
