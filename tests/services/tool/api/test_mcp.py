"""A real MCP client over a real connection."""

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client
from tool_server import KEY, served

from services.tool.service import ToolService
from services.tool.wire.schemas import SessionRequest

PAGE = Path(__file__).resolve().parents[4] / "docs" / "tool_service.md"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@contextlib.asynccontextmanager
async def connected(url: str, mode: str = "auto") -> AsyncIterator[Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=30) as http,
        Client(streamable_http_client(f"{url}/mcp", http_client=http), mode=mode) as client,
    ):
        yield client


async def run_python(client: Client, code: str, **fields: object) -> dict[str, object]:
    answer = await client.call_tool("run_python", {"code": code, **fields})
    assert not answer.is_error, answer
    assert isinstance(answer.structured_content, dict)
    return answer.structured_content


async def test_tools_are_listed_and_run_with_structured_answers(service: ToolService) -> None:
    async with served(service) as url, connected(url) as client:
        names = {tool.name for tool in (await client.list_tools()).tools}
        assert names == {"run_python", "list_files", "read_file", "write_file"}
        answer = await run_python(client, "print(6 * 7)")
        assert (answer["status"], answer["stdout"]) == ("ok", "42\n")
        failed = await run_python(client, "1/0")
        assert failed["error"]["type"] == "ZeroDivisionError"  # type: ignore[index]


async def test_a_session_is_continued_by_its_id_and_files_are_shared(service: ToolService) -> None:
    async with served(service) as url, connected(url) as client:
        session = (await run_python(client, "x = 5"))["session_id"]
        assert (await run_python(client, "x", session_id=session))["result"] == "5"
        written = {"path": "a.txt", "text": "hello", "session_id": session}
        assert not (await client.call_tool("write_file", written)).is_error
        shown = await run_python(client, "open('a.txt').read()", session_id=session)
        assert shown["result"] == "'hello'"
        listed = await client.call_tool("list_files", {"session_id": session})
        assert listed.structured_content == {"result": [{"path": "a.txt", "size_bytes": 5}]}
        escape = {"path": "../../etc/passwd", "session_id": session}
        assert (await client.call_tool("read_file", escape)).is_error


async def test_a_connection_keeps_its_own_state(service: ToolService) -> None:
    """With the protocol versions that have connections at all."""
    async with (
        served(service) as url,
        connected(url, "legacy") as one,
        connected(url, "legacy") as two,
    ):
        await run_python(one, "x = 'one'")
        await run_python(two, "x = 'two'")
        assert (await run_python(one, "x"))["result"] == "'one'"
        assert (await run_python(two, "x"))["result"] == "'two'"


async def test_a_mistake_is_explained_to_the_model(service: ToolService) -> None:
    async with served(service) as url, connected(url) as client:
        for tool, arguments, told in (
            ("run_python", {"code": "1", "timeout_s": 9999}, "--max-timeout-s"),
            ("run_python", {"code": "1", "session_id": "bogus"}, "No such session"),
            ("read_file", {"path": "nope", "session_id": "bogus"}, "No such session"),
            ("write_file", {"path": "a", "text": "b"}, "Pass the session_id"),
        ):
            answer = await client.call_tool(tool, arguments)
            assert answer.is_error and told in answer.content[0].text, answer


async def test_a_session_nobody_named_goes_first_when_room_is_needed(service: ToolService) -> None:
    kept = (await service.sessions.open(SessionRequest())).session_id
    async with served(service) as url, connected(url) as client:
        for _ in range(service.settings.max_sessions + 1):
            await run_python(client, "1")
    assert kept in service.sessions
    service.sessions.end(kept, "the test is over")


async def initialize(http: httpx2.AsyncClient, url: str) -> httpx2.Response:
    hello = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "test", "version": "1"},
        },
    }
    accept = {"Accept": "application/json, text/event-stream", "Authorization": f"Bearer {KEY}"}
    return await http.post(f"{url}/mcp", json=hello, headers=accept)


async def test_connections_that_are_left_alone_are_forgotten(
    service: ToolService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.settings, "session_ttl_s", 0.3)
    async with served(service) as url, httpx2.AsyncClient(timeout=30) as http:
        first = await initialize(http, url)
        assert first.status_code == 200
        known = {"mcp-session-id": first.headers["mcp-session-id"]}
        accept = {"Accept": "application/json, text/event-stream", "Authorization": f"Bearer {KEY}"}
        ping = {"jsonrpc": "2.0", "id": 2, "method": "ping"}
        again = await http.post(f"{url}/mcp", json=ping, headers={**accept, **known})
        assert again.status_code == 200
        await asyncio.sleep(1.0)  # more than the time to live, with nothing to wait for
        gone = await http.post(f"{url}/mcp", json=ping, headers={**accept, **known})
        assert gone.status_code == 404


async def test_connections_are_limited_in_number(
    service: ToolService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.tool.api.mcp._MAX_CONNECTIONS", 3)
    async with served(service) as url, httpx2.AsyncClient(timeout=30) as http:
        statuses = [(await initialize(http, url)).status_code for _ in range(5)]
    assert statuses == [200, 200, 200, 503, 503]


async def test_a_wrong_key_gets_nowhere(service: ToolService) -> None:
    async with served(service) as url, httpx2.AsyncClient() as http:
        answer = await http.post(f"{url}/mcp", json={})
    assert answer.status_code == 401


async def test_the_client_in_the_readme_runs_as_it_stands(service: ToolService) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    async with served(service) as url:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            example.replace("http://localhost:8090", url),
            env={**os.environ, "KEY": KEY},
            stdout=asyncio.subprocess.PIPE,
        )
        printed, _ = await process.communicate()
    assert (process.returncode, printed) == (0, b"1024\n")
