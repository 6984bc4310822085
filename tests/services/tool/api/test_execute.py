"""The native routes against a real sandbox."""

import asyncio
import base64
import json

import httpx
import pytest
from prometheus_client import REGISTRY

from services.tool.rules import Admission, OverloadedError
from services.tool.sandbox.host.pool import preset_for
from services.tool.sandbox.plan import PRESETS
from services.tool.service import ToolService

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def execute(client: httpx.AsyncClient, code: str, **fields: object) -> dict[str, object]:
    answer = await client.post("/v1/execute", json={"code": code, **fields})
    assert answer.status_code == 200, answer.text
    body: dict[str, object] = answer.json()
    return body


async def test_a_program_prints_and_the_level_is_on_the_answer(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/execute", json={"code": "print(1 + 1)", "request_id": "a"})
    body = answer.json()
    assert (body["status"], body["stdout"], body["exit_code"]) == ("ok", "2\n", 0)
    assert (body["request_id"], body["isolation"]) == ("a", answer.headers["x-sandbox-level"])
    assert body["usage"]["wall_ms"] > 0 and body["usage"]["peak_mb"] > 10


async def test_an_exception_is_a_200_with_type_message_and_line(client: httpx.AsyncClient) -> None:
    body = await execute(client, "x = 1\nraise ValueError('no')")
    assert body["status"] == "error"
    assert body["error"] == {"type": "ValueError", "message": "no", "line": 2}
    assert str(body["stderr"]).endswith("ValueError: no\n")
    assert "sandbox/inside" not in str(body["stderr"])


async def test_a_syntax_error_names_its_line(client: httpx.AsyncClient) -> None:
    body = await execute(client, "x = 1\ny = (")
    assert body["error"] == {"type": "SyntaxError", "message": "'(' was never closed (main.py, line 2)", "line": 2}  # fmt: skip # noqa: E501


async def test_files_go_in_and_only_regular_files_come_out(client: httpx.AsyncClient) -> None:
    code = (
        "import os\nos.makedirs('out')\nopen('out/b', 'w').write(open('in/a').read() * 2)\n"
        "os.symlink('/etc/passwd', 'link')\nos.symlink('out', 'folder')\nos.mkfifo('pipe')"
    )
    fetch = ["out/b", "link", "folder/b", "pipe", "out", "absent"]
    files = {"in/a": base64.b64encode(b"xy").decode()}
    body = await execute(client, code, files=files, fetch=fetch)
    assert body["status"] == "ok"
    assert body["files"] == {"out/b": base64.b64encode(b"xyxy").decode()}
    assert set(body["missing"]) == set(fetch) - {"out/b"}  # type: ignore[call-overload]


async def test_fetching_keeps_the_class_of_the_program(client: httpx.AsyncClient) -> None:
    body = await execute(client, "open('a', 'w').write('1')\n1/0", fetch=["a"])
    assert (body["status"], body["exit_code"]) == ("error", 1)
    assert body["error"]["type"] == "ZeroDivisionError"  # type: ignore[index]
    assert body["files"] == {"a": base64.b64encode(b"1").decode()}
    crashed = await execute(client, "import os\nos.abort()", fetch=["a"])
    assert (crashed["status"], crashed["signal"]) == ("crashed", "SIGABRT")


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../b", "a//b", "", "a\x00b", "x" * 300])
async def test_a_path_that_leaves_the_folder_is_rejected(
    client: httpx.AsyncClient, path: str
) -> None:
    answer = await client.post("/v1/execute", json={"code": "1", "files": {path: ""}})
    assert answer.status_code == 422
    fetched = await client.post("/v1/execute", json={"code": "1", "fetch": [path]})
    assert fetched.status_code == 422


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"timeout_s": 1e6}, "timeout_s"),
        ({"memory_mb": 10**6}, "memory_mb"),
        ({"output_bytes": 10**9}, "output_bytes"),
        ({"code": "x" * (1 << 20) + "x"}, "code"),
        ({"surprise": 1}, "surprise"),
        ({"timeout_s": -1}, "timeout_s"),
    ],
)
async def test_asking_for_too_much_names_the_field(
    client: httpx.AsyncClient, fields: dict[str, object], field: str
) -> None:
    answer = await client.post("/v1/execute", json={"code": "1", **fields})
    assert answer.status_code == 422
    assert answer.json()["error"]["field"] == field


async def test_what_is_not_preloaded_can_be_imported(client: httpx.AsyncClient) -> None:
    code = (
        "import bz2, csv, hashlib, lzma, numpy.fft, secrets, shutil, unicodedata, zlib\n"
        "data = zlib.decompress(zlib.compress(b'a'))\n"
        "print(hashlib.sha256(data).hexdigest()[:4], len(secrets.token_hex(4)))"
    )
    body = await execute(client, code)
    assert (body["status"], body["stdout"]) == ("ok", "ca97 8\n"), body


@pytest.mark.parametrize(
    ("code", "presets", "chosen"),
    [
        ("print(1)", PRESETS, "numpy"),
        ("from sympy import solve", PRESETS, "sympy"),
        ("import sympy\nsympy.lambdify(x, y)", PRESETS, "scipy"),
        ("import sympy\nsympy.lambdify(x, y)", ("numpy", "sympy"), "sympy"),
        ("import scipy", ("numpy",), "numpy"),
    ],
)
async def test_a_program_goes_to_the_zygote_that_has_its_libraries(
    code: str, presets: tuple[str, ...], chosen: str
) -> None:
    assert preset_for(code, presets) == chosen


async def test_a_seed_makes_draws_equal_and_none_makes_them_differ(
    client: httpx.AsyncClient,
) -> None:
    code = "import random, numpy\nprint(random.random(), numpy.random.rand())"
    seeded = [(await execute(client, code, seed=7))["stdout"] for _ in range(2)]
    free = [(await execute(client, code))["stdout"] for _ in range(2)]
    assert seeded[0] == seeded[1] and free[0] != free[1]


async def test_cpu_time_is_limited_apart_from_wall_time(client: httpx.AsyncClient) -> None:
    body = await execute(client, "while True: pass", cpu_s=1, timeout_s=30)
    assert (body["status"], body["signal"]) == ("cpu_limit", "SIGXCPU")


async def test_output_is_cut_at_the_limit_and_kept(client: httpx.AsyncClient) -> None:
    body = await execute(client, "while True: print('x' * 99)", output_bytes=1000)
    assert body["status"] == "output_limit" and body["stdout_truncated"] is True
    assert len(str(body["stdout"])) == 1000


async def test_a_batch_answers_in_the_order_of_completion(client: httpx.AsyncClient) -> None:
    codes = ["import time\ntime.sleep(1)\nprint('slow')", "print('fast')", "1/0"]
    requests = [{"code": code, "request_id": str(i)} for i, code in enumerate(codes)]
    answer = await client.post("/v1/execute/batch", json={"requests": requests})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert sorted(line["index"] for line in lines) == [0, 1, 2]
    assert lines[-1]["index"] == 0 and lines[-1]["request_id"] == "0"
    assert {line["index"]: line["status"] for line in lines} == {0: "ok", 1: "ok", 2: "error"}


async def test_a_missing_or_wrong_key_is_refused_everywhere_but_on_probes(
    client: httpx.AsyncClient,
) -> None:
    for path in ("/v1/execute", "/run_code", "/v1/sessions", "/mcp"):
        answer = await client.post(path, json={}, headers={"Authorization": "Bearer wrong-key"})
        assert answer.status_code == 401, path
    for path in ("/livez", "/readyz", "/metrics"):
        assert (await client.get(path, headers={"Authorization": ""})).status_code == 200


async def test_the_report_says_which_layers_were_tried(client: httpx.AsyncClient) -> None:
    report = (await client.get("/v1/isolation")).json()
    required = [name for name, layer in report["layers"].items() if layer["required"]]
    assert required and all(report["layers"][name]["active"] for name in required)


async def test_text_that_cannot_be_sent_is_replaced_and_ends_no_batch(
    client: httpx.AsyncClient,
) -> None:
    requests = [{"code": "raise ValueError('\\ud800')"}, {"code": "print(2)"}]
    answer = await client.post("/v1/execute/batch", json={"requests": requests})
    items = sorted(
        (json.loads(line) for line in answer.text.splitlines()), key=lambda i: i["index"]
    )
    assert [item["status"] for item in items] == ["error", "ok"]
    assert items[0]["error"]["message"] == "?"


async def test_what_is_refused_is_counted(client: httpx.AsyncClient, service: ToolService) -> None:
    def refused() -> float:
        name = "openrlhf_alp_tool_executions_total"
        return REGISTRY.get_sample_value(name, {"status": "rejected"}) or 0.0

    before = refused()
    answer = await client.post("/v1/execute", json={"code": "1", "timeout_s": 9999})
    assert answer.status_code == 422 and "--max-timeout-s" in answer.json()["error"]["fix"]
    assert refused() == before + 1


async def test_the_function_schema_has_the_name_agents_expect(client: httpx.AsyncClient) -> None:
    (tool,) = (await client.get("/v1/tools")).json()
    assert tool["function"]["name"] == "code_interpreter"
    assert tool["function"]["parameters"]["required"] == ["code"]


async def test_a_deadline_that_cannot_be_met_is_refused_with_retry_after(
    client: httpx.AsyncClient, service: ToolService
) -> None:
    long = {"code": "import time\ntime.sleep(2)"}
    busy = [asyncio.create_task(client.post("/v1/execute", json=long)) for _ in range(2)]
    while service.rules.admission.running < service.settings.slots:
        await asyncio.sleep(0.01)
    refused = await client.post("/v1/execute", json={"code": "1", "deadline_s": 0.05})
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    assert [answer.json()["status"] for answer in await asyncio.gather(*busy)] == ["ok", "ok"]


async def test_a_full_queue_refuses_at_once() -> None:
    admission = Admission(slots=1, max_queue=0)
    with pytest.raises(OverloadedError, match="already waiting"):
        async with admission.slot(1.0):
            pass


async def test_a_cancelled_caller_frees_its_slot(
    client: httpx.AsyncClient, service: ToolService
) -> None:
    job = {"code": "import time\ntime.sleep(60)", "timeout_s": 60}
    task = asyncio.create_task(client.post("/v1/execute", json=job))
    while service.sandbox.busy() == 0:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    while service.rules.admission.running:  # until the program is dead, long before its own end
        await asyncio.sleep(0.01)
    assert (await execute(client, "print(3)"))["stdout"] == "3\n"


async def test_metrics_count_by_status(client: httpx.AsyncClient) -> None:
    await execute(client, "1/0")
    text = (await client.get("/metrics")).text
    assert 'openrlhf_alp_tool_executions_total{status="error"}' in text
    assert "openrlhf_alp_tool_running 0.0" in text
