"""Interpreters over the real tool service, sandbox and all, and over a network with faults."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI

from openrlhf_alp.clients.channel import Timeouts
from openrlhf_alp.clients.errors import RequestRejected
from openrlhf_alp.clients.fleet import Backoff
from openrlhf_alp.clients.tool import ToolClient
from openrlhf_alp.episodes.observation import CodeStatus
from openrlhf_alp.episodes.records import ToolLostError
from openrlhf_alp.rollouts.interpreter import ATTEMPTS, SessionInterpreter, StatelessInterpreter
from services.tool.api.app import create_app
from services.tool.service import ToolService
from services.tool.settings import ToolSettings

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = "key-of-the-tests"
Fault = Callable[[httpx.Response], httpx.Response]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app() -> AsyncIterator[FastAPI]:
    settings = ToolSettings(slots=1, presets="numpy")
    async with ToolService.running(settings) as service:
        yield create_app(service, settings, api_key=KEY)


class Network(httpx.AsyncBaseTransport):
    """Delivers everything; the next answers to a run pass through the faults in the list."""

    def __init__(self, app: FastAPI) -> None:
        self._inner = httpx.ASGITransport(app=app)
        self.faults: list[Fault] = []
        self.paths: list[str] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.paths.append(f"{request.method} {request.url.path}")
        response = await self._inner.handle_async_request(request)
        if self.faults and request.url.path.endswith("/execute"):
            await response.aread()
            return self.faults.pop(0)(response)
        return response


def sandbox_error(**changes: object) -> Fault:
    """The answer of a service whose sandbox failed after the run."""

    def fault(response: httpx.Response) -> httpx.Response:
        body = {**json.loads(response.content), "status": "sandbox_error", "message": "died"}
        return httpx.Response(200, json={**body, **changes})

    return fault


def overloaded(response: httpx.Response) -> httpx.Response:
    error = {"code": "overloaded", "message": "full", "fix": "wait", "field": None}
    return httpx.Response(503, json={"error": error}, headers={"retry-after": "0"})


def lost(response: httpx.Response) -> httpx.Response:
    raise httpx.ReadError("the reply was lost")


@pytest_asyncio.fixture(loop_scope="module")
async def network(app: FastAPI) -> Network:
    return Network(app)


@pytest_asyncio.fixture(loop_scope="module")
async def client(network: Network) -> AsyncIterator[ToolClient]:
    async with ToolClient(
        ["http://tool"],
        api_key=KEY,
        timeouts=Timeouts(total_s=20.0),
        backoff=Backoff(first_s=0.001, largest_s=0.002),
        transport=network,
    ) as client:
        yield client


async def test_a_program_is_run_in_a_fresh_interpreter(client: ToolClient) -> None:
    interpreter = StatelessInterpreter(client, timeout_s=5.0)
    first = await interpreter.run("x = 3\nprint(x)")
    assert (first.status, first.stdout, first.result) == (CodeStatus.OK, "3\n", None)
    second = await interpreter.run("print(x)")
    assert second.status is CodeStatus.ERROR and "NameError" in second.stderr
    assert first.run_s > 0


async def test_a_limit_is_a_result_that_the_policy_can_read(client: ToolClient) -> None:
    interpreter = StatelessInterpreter(client, timeout_s=0.3)
    stopped = await interpreter.run("print('half', flush=True)\nwhile True: pass")
    assert (stopped.status, stopped.stdout) == (CodeStatus.TIMEOUT, "half\n")
    assert stopped.message


async def test_faults_of_the_service_are_tried_again_and_never_shown(
    client: ToolClient, network: Network
) -> None:
    interpreter = StatelessInterpreter(client, timeout_s=5.0)
    network.faults = [sandbox_error(), overloaded, lost, sandbox_error()]
    answer = await interpreter.run("print(7)")
    assert (answer.status, answer.stdout, network.faults) == (CodeStatus.OK, "7\n", [])


async def test_a_sandbox_that_keeps_failing_loses_the_episode_by_name(
    client: ToolClient, network: Network
) -> None:
    for interpreter in (
        StatelessInterpreter(client, timeout_s=5.0),
        SessionInterpreter(client, timeout_s=5.0),
    ):
        network.faults = [sandbox_error()] * ATTEMPTS
        with pytest.raises(ToolLostError) as caught:
            await interpreter.run("print(7)")
        assert caught.value.reason == "tool_sandbox_error" and network.faults == []
        await interpreter.close()


async def test_a_service_that_cannot_be_reached_loses_the_episode_by_name(app: FastAPI) -> None:
    network = Network(app)
    network.faults = [overloaded] * 10_000
    async with ToolClient(
        ["http://tool"],
        api_key=KEY,
        timeouts=Timeouts(total_s=0.2),
        backoff=Backoff(first_s=0.001, largest_s=0.002),
        transport=network,
    ) as client:
        for interpreter in (
            StatelessInterpreter(client, timeout_s=5.0),
            SessionInterpreter(client, timeout_s=5.0),
        ):
            with pytest.raises(ToolLostError) as caught:
                await interpreter.run("print(7)")
            assert caught.value.reason == "tool_unavailable"


async def test_a_program_too_long_for_the_service_is_the_policys_doing(client: ToolClient) -> None:
    answer = await StatelessInterpreter(client, timeout_s=5.0).run("#" * 3_000_000)
    assert answer.status is CodeStatus.REJECTED


async def test_a_time_limit_above_the_services_is_our_doing(client: ToolClient) -> None:
    with pytest.raises(RequestRejected, match="timeout_s"):
        await StatelessInterpreter(client, timeout_s=1e6).run("print(1)")


async def test_a_session_keeps_state_and_is_opened_by_its_first_program(
    client: ToolClient, network: Network
) -> None:
    interpreter = SessionInterpreter(client, timeout_s=5.0)
    assert network.paths == []
    await interpreter.run("x = 20")
    assert (await interpreter.run("x + 1")).result == "21"
    await interpreter.close()
    assert network.paths.count("POST /v1/sessions") == 1
    assert network.paths[-1].startswith("DELETE /v1/sessions/")
    await interpreter.close()


async def test_a_cell_runs_once_however_often_its_reply_is_lost(
    client: ToolClient, network: Network
) -> None:
    interpreter = SessionInterpreter(client, timeout_s=5.0)
    await interpreter.run("n = 0")
    network.faults = [lost, overloaded, lost]
    assert (await interpreter.run("n += 1\nn")).result == "1"
    await interpreter.close()


async def test_a_lost_session_is_restored_by_running_its_cells_again(
    client: ToolClient, network: Network
) -> None:
    interpreter = SessionInterpreter(client, timeout_s=5.0)
    await interpreter.run("x = 20")
    await interpreter.run("x += 1\nprint(x)")
    session = interpreter._session
    assert session is not None
    await session.close()
    assert (await interpreter.run("x")).result == "21"
    network.faults = [sandbox_error(state_lost=True), sandbox_error()]  # the second in the replay
    assert (await interpreter.run("x")).result == "21"
    await interpreter.close()


async def test_a_session_whose_cells_do_not_repeat_loses_the_episode(client: ToolClient) -> None:
    interpreter = SessionInterpreter(client, timeout_s=5.0)
    await interpreter.run("import os\nprint(os.urandom(8))")
    session = interpreter._session
    assert session is not None
    await session.close()
    with pytest.raises(ToolLostError) as caught:
        await interpreter.run("1")
    assert caught.value.reason == "tool_state_lost"
    await interpreter.close()
