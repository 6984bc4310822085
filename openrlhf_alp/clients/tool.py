"""Client of the tool service: run model-written code, in fresh interpreters or in sessions.

Several services share the load: a run goes to the least loaded one, and to another when that one
fails. A session stays where it was opened.

A failing program is an answer and not an exception. A request that was refused or whose reply was
lost is repeated within the time budget. Repeating is safe: a fresh interpreter keeps nothing, and
the step number of a session's cell makes the cell run once.
"""

import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Unpack

from pydantic import BaseModel

from openrlhf_alp.clients.channel import Reply
from openrlhf_alp.clients.errors import error_of
from openrlhf_alp.clients.fleet import Access, Fleet, Server
from services.tool.wire.schemas import (
    CellRequest,
    CellResult,
    ExecuteRequest,
    ExecuteResult,
    SessionInfo,
    SessionRequest,
)

_ENDED = (204, 404, 410)  # statuses of DELETE: ended now, never known here, ended before


class ToolClient(AbstractAsyncContextManager["ToolClient"]):
    """Connections to one or more tool services; use it as an async context manager.

    Args:
        urls: base URLs of the services.
        access: see `clients.fleet.Access`.
    """

    def __init__(self, urls: Sequence[str], **access: Unpack[Access]) -> None:
        self._fleet = Fleet("tool", urls, **access)

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection."""
        await self._fleet.aclose()

    async def execute(self, request: ExecuteRequest) -> ExecuteResult:
        """Run one program in a fresh interpreter.

        Raises:
            ServiceUnavailable: no service ran it within `total_s`.
            RequestRejected: the request asks for more than the service allows.
        """
        result, _ = await _post(self._fleet, "/v1/execute", request, ExecuteResult)
        return result

    async def open_session(self, request: SessionRequest) -> "ToolSession":
        """Open a persistent interpreter. A lost reply may leave another one open until its TTL."""
        info, server = await _post(self._fleet, "/v1/sessions", request, SessionInfo)
        return ToolSession(self._fleet, server, info.session_id)


class ToolSession:
    """One persistent interpreter; numbers its cells so that a repeat after a lost reply is safe."""

    def __init__(self, fleet: Fleet, server: Server, session_id: str) -> None:
        self._fleet = fleet
        self._server = server
        self._path = f"/v1/sessions/{session_id}"
        self._next_step = 0

    async def run(self, code: str, *, timeout_s: float | None = None) -> CellResult:
        """Run one cell, exactly once.

        Raises:
            RequestRejected: the session is gone (status 410), or the limits are exceeded.
            ServiceUnavailable: no answer within the time budget.
        """
        request = CellRequest(code=code, step=self._next_step, timeout_s=timeout_s)
        path = f"{self._path}/execute"
        # No other server knows the variables of this session.
        result, _ = await _post(self._fleet, path, request, CellResult, only=self._server)
        self._next_step += 1
        return result

    async def close(self) -> None:
        """End the session on the server; a session that has ended already is fine."""
        channel = self._server.channel
        give_up_s = time.monotonic() + self._fleet.timeouts.connect_s
        response = await channel.send("DELETE", self._path, give_up_s=give_up_s)
        if response.status_code not in _ENDED:
            raise error_of(response, channel.url)


async def _post(
    fleet: Fleet, path: str, body: BaseModel, model: type[Reply], *, only: Server | None = None
) -> tuple[Reply, Server]:
    """The reply and the server that gave it; `only` keeps all attempts on one server."""

    async def attempt(server: Server, give_up_s: float) -> tuple[Reply, Server]:
        return await server.channel.post(path, body, model, give_up_s=give_up_s), server

    within_s = fleet.timeouts.total_s
    return await fleet.call(attempt, what=f"POST {path}", within_s=within_s, load=1, only=only)
