"""The tool client against the real service, and against a network that loses replies."""

from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from fastapi import FastAPI

from openrlhf_alp.clients.channel import Timeouts, trace_headers
from openrlhf_alp.clients.errors import RequestRejected, ServiceUnavailable, Unauthorized
from openrlhf_alp.clients.fleet import Backoff
from openrlhf_alp.clients.tool import ToolClient
from services.tool.api.app import create_app
from services.tool.service import ToolService
from services.tool.settings import ToolSettings
from services.tool.wire.schemas import ExecuteRequest, IsolationReport, SessionRequest

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEY = "key-of-the-tests"
FAST = Backoff(first_s=0.001, largest_s=0.002)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app() -> AsyncIterator[FastAPI]:
    settings = ToolSettings(slots=1, presets="numpy")
    async with ToolService.running(settings) as service:
        yield create_app(service, settings, api_key=KEY)


class Lossy(httpx.AsyncBaseTransport):
    """Delivers every request and loses the next `losses` replies."""

    def __init__(self, app: FastAPI, losses: int) -> None:
        self._inner = httpx.ASGITransport(app=app)
        self.losses = losses

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        if self.losses > 0:
            self.losses -= 1
            raise httpx.ReadError("the reply was lost", request=request)
        return response


def connect(
    app: FastAPI, key: str = KEY, network: httpx.AsyncBaseTransport | None = None
) -> ToolClient:
    network = network or Lossy(app, 0)
    return ToolClient(["http://tool"], api_key=key, backoff=FAST, transport=network)


async def test_a_program_is_run_and_a_failing_one_is_an_answer(app: FastAPI) -> None:
    async with connect(app) as client:
        assert (await client.execute(ExecuteRequest(code="print(2)"))).stdout == "2\n"
        failed = await client.execute(ExecuteRequest(code="1/0"))
        assert failed.error is not None and failed.error.type == "ZeroDivisionError"


async def test_a_cell_whose_reply_is_lost_runs_once(app: FastAPI) -> None:
    network = Lossy(app, 0)
    async with connect(app, network=network) as client:
        session = await client.open_session(SessionRequest())
        await session.run("n = 1")
        network.losses = 2
        again = await session.run("n += 1\nn")
        assert (again.result, again.replayed) == ("2", True)
        assert (await session.run("n")).result == "2"
        await session.close()
        await session.close()
        with pytest.raises(RequestRejected, match="ended by its owner"):
            await session.run("n")


async def test_a_run_whose_reply_is_cut_short_is_repeated(app: FastAPI) -> None:
    class Cutting(Lossy):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            response = await self._inner.handle_async_request(request)
            if self.losses == 0:
                return response
            self.losses -= 1
            half = (await response.aread())[:-9]
            return httpx.Response(200, headers={"content-type": "application/json"}, content=half)

    network = Cutting(app, 1)
    async with connect(app, network=network) as client:
        assert (await client.execute(ExecuteRequest(code="print(2)"))).stdout == "2\n"
    assert network.losses == 0


async def test_a_request_above_the_limits_and_a_wrong_key_are_not_repeated(app: FastAPI) -> None:
    async with connect(app) as client:
        with pytest.raises(RequestRejected) as caught:
            await client.execute(ExecuteRequest(code="1", timeout_s=1e6))
        assert (caught.value.status, caught.value.field) == (422, "timeout_s")
    async with connect(app, key="not-the-key") as client:
        with pytest.raises(Unauthorized):
            await client.execute(ExecuteRequest(code="1"))


async def test_a_service_that_never_answers_is_given_up_in_time(app: FastAPI) -> None:
    client = ToolClient(
        ["http://tool"],
        api_key=KEY,
        timeouts=Timeouts(total_s=0.3),
        backoff=FAST,
        transport=Lossy(app, 10**6),
    )
    async with client:
        with pytest.raises(ServiceUnavailable, match="does not answer"):
            await client.execute(ExecuteRequest(code="1"))


class OneDown(httpx.AsyncBaseTransport):
    """Two services, of which one refuses connections."""

    def __init__(self, app: FastAPI) -> None:
        self._inner = httpx.ASGITransport(app=app)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.host == "down":
            raise httpx.ConnectError("refused", request=request)
        return await self._inner.handle_async_request(request)


async def test_another_service_runs_what_a_lost_one_cannot(app: FastAPI) -> None:
    urls = ["http://down", "http://up"]
    async with ToolClient(urls, api_key=KEY, backoff=FAST, transport=OneDown(app)) as client:
        for number in range(4):
            answer = await client.execute(ExecuteRequest(code=f"print({number})"))
            assert answer.stdout == f"{number}\n"
        session = await client.open_session(SessionRequest())
        assert (await session.run("6 * 7")).result == "42"
        await session.close()
    async with ToolClient(
        urls[:1],
        api_key=KEY,
        timeouts=Timeouts(total_s=0.05),
        backoff=FAST,
        transport=OneDown(app),
    ) as client:
        with pytest.raises(ServiceUnavailable, match="http://down does not answer"):
            await client.execute(ExecuteRequest(code="1"))


async def test_the_isolation_of_a_service_can_be_asked_for(app: FastAPI) -> None:
    transport = httpx.ASGITransport(app=app)
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://tool", headers=headers
    ) as http:
        report = IsolationReport.model_validate((await http.get("/v1/isolation")).json())
    assert report.level in ("full", "uid", "basic")


async def test_a_url_that_is_no_list_is_refused() -> None:
    with pytest.raises(ValueError, match="give a list"):
        ToolClient("http://tool", api_key=KEY)


async def test_code_belongs_to_the_trace_of_the_task_that_sends_it(app: FastAPI) -> None:
    replies = []

    class Keeping(Lossy):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            replies.append(await super().handle_async_request(request))
            return replies[-1]

    async with connect(app, network=Keeping(app, 0)) as client:
        session = await client.open_session(SessionRequest())
        await session.run("1")
        await session.close()
    assert {reply.headers["traceparent"] for reply in replies} == {trace_headers()["traceparent"]}
    assert len(replies) == 3
