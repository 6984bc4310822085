"""Client of the tool service: run model-written code, in fresh interpreters or in sessions.

A failing program is an answer, not an exception. Refusals that say "never ran" (429, 502, 503) are
repeated within the time budget. A reply that is lost on the way is repeated only where that is
safe: in sessions, where the step number makes a cell run once. A stateless run is repeated as well,
since a fresh interpreter keeps nothing.
"""

import asyncio
import time
from types import TracebackType
from typing import TypeVar

import httpx
from pydantic import BaseModel

from openrlhf_alp.clients.errors import InvalidReply, ServiceUnavailable
from openrlhf_alp.clients.http import RETRYABLE, Backoff, Timeouts, error_of
from services.tool.schemas import (
    CellRequest,
    CellResult,
    ExecuteRequest,
    ExecuteResult,
    SessionInfo,
    SessionRequest,
)

Reply = TypeVar("Reply", bound=BaseModel)


class ToolClient:
    """Connections to one tool service; use it as an async context manager.

    Args:
        url: base URL of the service.
        api_key: its bearer key.
        timeouts: limits of every call; `total_s` covers all attempts of one.
        backoff: waiting between attempts.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str,
        timeouts: Timeouts | None = None,
        backoff: Backoff | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._timeouts = timeouts or Timeouts()
        self._backoff = backoff or Backoff()
        self._http = httpx.AsyncClient(
            base_url=self.url,
            timeout=self._timeouts.httpx(),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=256),
            transport=transport,
            headers={"authorization": f"Bearer {api_key}"},
        )

    async def __aenter__(self) -> "ToolClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def execute(self, request: ExecuteRequest) -> ExecuteResult:
        """Run one program in a fresh interpreter.

        Raises:
            ServiceUnavailable: nobody ran it within `total_s`.
            RequestRejected: the request asks for more than the service allows.
        """
        return await self._post("/v1/execute", request, ExecuteResult)

    async def open_session(self, request: SessionRequest) -> "ToolSession":
        """Open a persistent interpreter. A lost reply may leave one behind until its TTL."""
        info = await self._post("/v1/sessions", request, SessionInfo)
        return ToolSession(self, info.session_id)

    async def _post(self, path: str, body: BaseModel, model: type[Reply]) -> Reply:
        content = body.model_dump_json()
        give_up_s = time.monotonic() + self._timeouts.total_s
        attempt = 0
        while True:
            retry_after = None
            try:
                response = await self._send(path, content, give_up_s)
                if response.status_code not in RETRYABLE:
                    return self._parse(response, model)
                retry_after = response.headers.get("retry-after")
                failure = error_of(response, self.url)
            except ServiceUnavailable as error:
                failure = error
            attempt += 1
            delay_s = self._backoff.delay_s(attempt, retry_after)
            if time.monotonic() + delay_s >= give_up_s:
                raise failure
            await asyncio.sleep(delay_s)

    async def _send(self, path: str, content: str, give_up_s: float) -> httpx.Response:
        headers = {"content-type": "application/json"}
        try:
            async with asyncio.timeout(max(0.001, give_up_s - time.monotonic())):
                return await self._http.post(path, content=content, headers=headers)
        except (httpx.TransportError, TimeoutError) as error:
            raise ServiceUnavailable(
                f"{self.url} does not answer ({type(error).__name__} {error}). Fix: check that "
                "the tool service runs there; its log says why it stopped."
            ) from error

    def _parse(self, response: httpx.Response, model: type[Reply]) -> Reply:
        if response.status_code >= 400:
            raise error_of(response, self.url)
        try:
            return model.model_validate_json(response.content)
        except ValueError as error:
            raise InvalidReply(
                f"{self.url} sent a reply that does not parse ({error}). Fix: install the same "
                "release of services and learner."
            ) from error


class ToolSession:
    """One persistent interpreter; numbers its cells so that a repeat after a lost reply is safe."""

    def __init__(self, client: ToolClient, session_id: str) -> None:
        self._client = client
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
        result = await self._client._post(path, request, CellResult)
        self._next_step += 1
        return result

    async def close(self) -> None:
        """End the session on the server; a session that is gone already is fine."""
        response = await self._client._http.delete(f"/v1/sessions/{self.session_id}")
        if response.status_code not in (204, 404, 410):
            raise error_of(response, self._client.url)
