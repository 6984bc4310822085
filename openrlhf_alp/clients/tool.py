"""Client of the tool service: run model-written code, in fresh interpreters or in sessions.

Several services share the load: a run goes to the least loaded one, and to another when that one
fails; a session stays where it was opened.

A failing program is an answer, not an exception. Refusals that say "never ran" (429, 502, 503) are
repeated within the time budget. A reply that is lost on the way is repeated only where that is
safe: in sessions, where the step number makes a cell run once. A stateless run is repeated as well,
since a fresh interpreter keeps nothing.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar

import httpx
from pydantic import BaseModel

from openrlhf_alp.clients.errors import InvalidReply, ServiceUnavailable
from openrlhf_alp.clients.http import LIMITS, RETRYABLE, Backoff, Timeouts, error_of
from openrlhf_alp.clients.trace import trace_headers
from services.tool.wire.schemas import (
    CellRequest,
    CellResult,
    ExecuteRequest,
    ExecuteResult,
    IsolationReport,
    SessionInfo,
    SessionRequest,
)

Reply = TypeVar("Reply", bound=BaseModel)


@dataclass(slots=True, kw_only=True)
class _Server:
    """One tool service and what is known about it."""

    url: str
    http: httpx.AsyncClient
    num_running: int = 0
    avoid_until_s: float = 0.0  # monotonic


class ToolClient:
    """Connections to one or more tool services; use it as an async context manager.

    Args:
        urls: base URLs of the services.
        api_key: their bearer key.
        timeouts: limits of every call; `total_s` covers all attempts of one.
        backoff: waiting between attempts.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        api_key: str,
        timeouts: Timeouts | None = None,
        backoff: Backoff | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if not urls or isinstance(urls, str):
            raise ValueError(f"urls={urls!r}: give a list with at least one tool service URL")
        self._timeouts = timeouts or Timeouts()
        self._backoff = backoff or Backoff()
        self._servers = [
            _Server(
                url=url.rstrip("/"),
                http=httpx.AsyncClient(
                    base_url=url.rstrip("/"),
                    timeout=self._timeouts.httpx(),
                    limits=LIMITS,
                    transport=transport,
                    headers={"authorization": f"Bearer {api_key}"},
                ),
            )
            for url in urls
        ]

    async def __aenter__(self) -> "ToolClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection."""
        await asyncio.gather(*(server.http.aclose() for server in self._servers))

    async def isolation(self) -> list[IsolationReport]:
        """What each service's sandbox stands on, in the order of the URLs.

        Raises:
            ServiceUnavailable: a service does not answer.
            Unauthorized: the key is wrong.
        """
        give_up_s = time.monotonic() + self._timeouts.connect_s
        reports = []
        for server in self._servers:
            response = await self._send(server, "GET", "/v1/isolation", "", give_up_s)
            reports.append(self._parse(response, server, IsolationReport))
        return reports

    async def execute(self, request: ExecuteRequest) -> ExecuteResult:
        """Run one program in a fresh interpreter.

        Raises:
            ServiceUnavailable: nobody ran it within `total_s`.
            RequestRejected: the request asks for more than the service allows.
        """
        result, _ = await self._post("/v1/execute", request, ExecuteResult)
        return result

    async def open_session(self, request: SessionRequest) -> "ToolSession":
        """Open a persistent interpreter. A lost reply may leave one behind until its TTL."""
        info, server = await self._post("/v1/sessions", request, SessionInfo)
        return ToolSession(self, server, info.session_id)

    async def _post(
        self, path: str, body: BaseModel, model: type[Reply], *, only: _Server | None = None
    ) -> tuple[Reply, _Server]:
        """The reply and the server that gave it; `only` keeps all attempts on one server."""
        content = body.model_dump_json()
        give_up_s = time.monotonic() + self._timeouts.total_s
        attempt = 0
        while True:
            server = only or self._best()
            retry_after = None
            try:
                response = await self._send(server, "POST", path, content, give_up_s)
                if response.status_code not in RETRYABLE:
                    return self._parse(response, server, model), server
                retry_after = response.headers.get("retry-after")
                failure = error_of(response, server.url)
            except ServiceUnavailable as error:
                failure = error
            attempt += 1
            delay_s = self._backoff.delay_s(attempt, retry_after)
            server.avoid_until_s = time.monotonic() + delay_s
            if server.avoid_until_s >= give_up_s:
                raise failure
            if only or self._best().avoid_until_s > time.monotonic():
                await asyncio.sleep(delay_s)

    def _best(self) -> _Server:
        now_s = time.monotonic()
        return min(self._servers, key=lambda s: (s.avoid_until_s > now_s, s.num_running))

    async def _send(
        self, server: _Server, method: str, path: str, content: str, give_up_s: float
    ) -> httpx.Response:
        headers = {"content-type": "application/json", **trace_headers()}
        server.num_running += 1
        try:
            async with asyncio.timeout(max(0.001, give_up_s - time.monotonic())):
                return await server.http.request(method, path, content=content, headers=headers)
        except (httpx.TransportError, TimeoutError) as error:
            raise ServiceUnavailable(
                f"{server.url} does not answer ({type(error).__name__} {error}). Fix: check that "
                "the tool service runs there; its log says why it stopped."
            ) from error
        finally:
            server.num_running -= 1

    def _parse(self, response: httpx.Response, server: _Server, model: type[Reply]) -> Reply:
        if response.status_code >= 400:
            raise error_of(response, server.url)
        try:
            return model.model_validate_json(response.content)
        except ValueError as error:
            raise InvalidReply(
                f"{server.url} sent a reply that does not parse ({error}). Fix: install the same "
                "release of services and learner."
            ) from error


class ToolSession:
    """One persistent interpreter; numbers its cells so that a repeat after a lost reply is safe."""

    def __init__(self, client: ToolClient, server: _Server, session_id: str) -> None:
        self._client = client
        self._server = server
        self.session_id = session_id
        self._next_step = 0

    async def run(self, code: str, *, timeout_s: float | None = None) -> CellResult:
        """Run one cell, exactly once.

        Raises:
            RequestRejected: the session is gone (status 410), or the limits are exceeded.
            ServiceUnavailable: no answer within the time budget.
        """
        request = CellRequest(code=code, step=self._next_step, timeout_s=timeout_s)
        path = f"/v1/sessions/{self.session_id}/execute"
        result, _ = await self._client._post(path, request, CellResult, only=self._server)
        self._next_step += 1
        return result

    async def close(self) -> None:
        """End the session on the server; a session that is gone already is fine."""
        path = f"/v1/sessions/{self.session_id}"
        give_up_s = time.monotonic() + self._client._timeouts.connect_s
        response = await self._client._send(self._server, "DELETE", path, "", give_up_s)
        if response.status_code not in (204, 404, 410):
            raise error_of(response, self._server.url)
