"""The native routes against a real sandbox."""

import asyncio
import base64
import json

import httpx
import pytest
from fastapi import FastAPI
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


@pytest.mark.parametrize("fetch", [[], ["a"]])
@pytest.mark.parametrize(
    ("end", "signal", "status"),
    [
        ("while True: pass", "SIGKILL", "cpu_limit"),
        ("os.kill(os.getpid(), 9)", "SIGKILL", "crashed"),
    ],
)
async def test_a_program_that_survives_the_cpu_signal_is_killed_or_kills_itself(
    client: httpx.AsyncClient, fetch: list[str], end: str, signal: str, status: str
) -> None:
    """The kernel's SIGKILL comes at 3 s."""
    code = (
        "import os, signal, time\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
        f"while time.process_time() < 1.3: pass\n{end}"
    )
    body = await execute(client, code, cpu_s=1, timeout_s=60, fetch=fetch)
    assert (body["status"], body["signal"]) == (status, signal)


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


async def test_a_full_queue_refuses_at_once_and_a_free_slot_is_always_given() -> None:
    admission = Admission(slots=1, max_queue=0)
    async with admission.slot(-100.0):  # as /run_code with compile_timeout -100 asks for
        with pytest.raises(OverloadedError, match="already waiting"):
            async with admission.slot(1.0):
                pass
        assert admission.running == 1


async def test_nobody_is_refused_for_what_programs_took_before() -> None:
    admission = Admission(slots=2, max_queue=1000)

    async def program(run_s: float) -> float:
        async with admission.slot(5.0) as waited_s:
            await asyncio.sleep(run_s)
        return waited_s

    await asyncio.gather(*(program(0.4) for _ in range(6)))
    assert admission.expected_wait_s() == 0.0
    # 500 of 1 ms on two slots take a quarter of a second; 0.4 s each would be 100 s.
    waits = await asyncio.gather(*(program(0.001) for _ in range(500)))
    assert max(waits) < 5.0
    # The next one, told to come back, is told what the latest 16 took.
    busy = [asyncio.create_task(program(0.2)) for _ in range(2)]
    await asyncio.sleep(0)
    assert admission.expected_wait_s() < 0.1
    await asyncio.gather(*busy)


async def test_a_batch_after_long_programs_is_not_refused(client: httpx.AsyncClient) -> None:
    long = {"code": "import time\ntime.sleep(1)"}
    await asyncio.gather(*(client.post("/v1/execute", json=long) for _ in range(4)))
    requests = [{"code": f"print({n})", "deadline_s": 60} for n in range(200)]
    answer = await client.post("/v1/execute/batch", json={"requests": requests})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert {(line["index"], line["stdout"]) for line in lines} == {
        (n, f"{n}\n") for n in range(200)
    }


async def test_a_deadline_counts_from_the_arrival_of_its_batch(
    client: httpx.AsyncClient, service: ToolService
) -> None:
    job = {"code": "import time\ntime.sleep(1)", "deadline_s": 0.5}
    count = 4 * service.settings.slots
    answer = await client.post("/v1/execute/batch", json={"requests": [job] * count})
    statuses = [json.loads(line)["status"] for line in answer.text.splitlines()]
    assert statuses.count("ok") == service.settings.slots
    assert statuses.count("overloaded") == count - service.settings.slots


CLOCK = {"code": "import time\ntime.sleep(0.3)\nprint(time.time_ns())"}


async def test_a_request_id_that_comes_again_gets_the_kept_answer(
    client: httpx.AsyncClient,
) -> None:
    first = (await client.post("/v1/execute", json={**CLOCK, "request_id": "kept"})).json()
    again = (await client.post("/v1/execute", json={**CLOCK, "request_id": "kept"})).json()
    assert first["status"] == "ok" and again == first
    for change in ({"code": "1"}, {"stdin": "x"}, {"timeout_s": 3}):
        other = await client.post("/v1/execute", json={**CLOCK, **change, "request_id": "kept"})
        assert other.status_code == 409
        assert other.json()["error"]["code"] == "request_id_reused"


async def test_repeats_of_a_running_request_join_it(client: httpx.AsyncClient) -> None:
    job = {**CLOCK, "request_id": "joined"}
    answers = await asyncio.gather(*(client.post("/v1/execute", json=job) for _ in range(5)))
    assert len({answer.json()["stdout"] for answer in answers}) == 1


async def test_a_retry_after_a_lost_connection_joins_the_same_run(
    client: httpx.AsyncClient, service: ToolService
) -> None:
    job = {**CLOCK, "request_id": "lost"}
    ran = len(service.runs)
    task = asyncio.create_task(client.post("/v1/execute", json=job))
    while len(service.runs) == ran:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(service.runs) == ran + 1
    answer = (await client.post("/v1/execute", json=job)).json()
    assert answer["status"] == "ok"
    assert len(service.runs) == ran


async def test_a_failing_program_is_kept_and_a_refusal_is_not(client: httpx.AsyncClient) -> None:
    failing = {
        "code": "import os\nraise ValueError(os.getpid(), id(object()))",
        "request_id": "bad",
    }
    first = (await client.post("/v1/execute", json=failing)).json()
    assert first["status"] == "error"
    assert (await client.post("/v1/execute", json=failing)).json() == first
    refused = {"code": "1", "timeout_s": 9999, "request_id": "refused"}
    assert (await client.post("/v1/execute", json=refused)).status_code == 422
    right = {"code": "1", "request_id": "refused"}
    assert (await client.post("/v1/execute", json=right)).json()["status"] == "ok"


async def test_a_batch_numbers_its_programs_as_it_likes(client: httpx.AsyncClient) -> None:
    for text in ("a", "b"):
        requests = [{"code": f"print('{text}')", "request_id": "0"}] * 2
        answer = await client.post("/v1/execute/batch", json={"requests": requests})
        assert [json.loads(line)["stdout"] for line in answer.text.splitlines()] == [
            f"{text}\n"
        ] * 2


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/execute", {"code": "1", "timeout_s": True}),
        ("/v1/execute", {"code": "1", "memory_mb": True}),
        ("/v1/execute", {"code": "1", "seed": False}),
        ("/v1/execute", {"code": "1", "memory_mb": 10**400}),
        ("/v1/execute", {"code": "1", "output_bytes": 10**400}),
        ("/v1/sessions", {"memory_mb": 10**400}),
        ("/v1/sessions", {"ttl_s": True}),
        ("/run_code", {"code": "1", "language": "python", "run_timeout": True}),
        ("/run_jupyter", {"cells": ["1"], "total_timeout": True}),
    ],
)
async def test_booleans_and_huge_numbers_are_refused(
    client: httpx.AsyncClient, path: str, body: object
) -> None:
    assert (await client.post(path, json=body)).status_code == 422


async def test_a_session_needs_no_body(client: httpx.AsyncClient) -> None:
    for body in (None, b"null", b"{}"):
        json_type = {"content-type": "application/json"}
        answer = await client.post("/v1/sessions", content=body, headers=json_type)
        assert answer.status_code == 201, answer.text
        await client.delete(f"/v1/sessions/{answer.json()['session_id']}")


async def test_a_trailing_slash_leads_nowhere(client: httpx.AsyncClient) -> None:
    evil = {"host": "evil.example"}
    for path in ("/v1/execute/", "/v1/sessions/", "/mcp/", "//evil.example/"):
        answer = await client.post(path, json={"code": "1"}, headers=evil)
        assert answer.status_code in (404, 405) and "location" not in answer.headers


async def test_a_405_names_every_method_of_its_path(client: httpx.AsyncClient) -> None:
    answer = await client.post(f"/v1/sessions/{'0' * 32}")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET")


async def test_strangers_read_probes_only(app: FastAPI) -> None:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://tool") as stranger:
        for path in ("/livez", "/readyz", "/metrics"):
            assert (await stranger.get(path)).status_code == 200
        for path in ("/openapi.json", "/docs", "/v1/ping", "/nowhere", "/livez/", "/mcp"):
            assert (await stranger.get(path)).status_code == 401


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
