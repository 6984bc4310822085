"""The service as MCP tools over streamable HTTP at /mcp, one interpreter session per MCP
connection.

The protocol has no connections from version 2026-07-28 on: there a session is continued by the id
that every answer of run_python carries.
"""

import base64
import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import Field
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from services.common.auth import key_is_accepted, unauthorized
from services.common.errors import to_api_error
from services.tool.errors import ERRORS
from services.tool.service import ToolService
from services.tool.sessions import Session, SessionGoneError
from services.tool.wire.schemas import CellRequest, CellResult, FileInfo, SafePath, SessionRequest

_SESSION_HEADER = "mcp-session-id"
_INSTRUCTIONS = (
    "Run Python in a sandbox with numpy, sympy and scipy. To keep variables and files, pass the "
    "session_id of an earlier answer. There is no network. Code that exceeds a limit is killed and "
    "the state from before it is kept."
)
_NO_SESSION = (
    "No session is named, and this version of the protocol has no connection that could have one. "
    "Pass the session_id of an answer of run_python."
)


class _Connections:
    """Which interpreter session belongs to which MCP connection."""

    def __init__(self, service: ToolService) -> None:
        self._service = service
        self._by_connection: dict[str, str] = {}

    async def session(
        self, context: Context[Any, Any], wanted: str | None, *, answers_id: bool = False
    ) -> Session:
        """The session asked for, or the connection's own, opened when it is needed.

        Args:
            answers_id: whether the caller learns the session's id. If not, one that belongs to no
                connection could never be found again.
        """
        sessions = self._service.sessions
        if wanted is not None:
            session = sessions.get(wanted)
            session.unclaimed = False
            return session
        connection = (context.headers or {}).get(_SESSION_HEADER)
        known = self._by_connection.get(connection) if connection else None
        if known is not None:
            try:
                return sessions.get(known)
            except SessionGoneError:
                self._by_connection.pop(connection or "", None)
        if not connection and not answers_id:
            raise ToolError(_NO_SESSION)
        session = await sessions.open(SessionRequest(), unclaimed=not connection)
        if connection:
            self._by_connection[connection] = session.session_id
        return session


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Tell the model cause and fix; of an unexpected error the SDK names only the tool."""
    try:
        yield
    except tuple(ERRORS) as error:
        raise ToolError(str(to_api_error(error, ERRORS))) from error


def build(service: ToolService) -> MCPServer:
    """The MCP server with its four tools."""
    server = MCPServer("tool-service", instructions=_INSTRUCTIONS)
    connections = _Connections(service)
    SessionId = Annotated[
        str | None,
        Field(description="session_id of an earlier answer of run_python; needed to continue it"),
    ]

    @server.tool()
    async def run_python(
        code: str,
        ctx: Context[Any, Any],
        timeout_s: Annotated[float | None, Field(gt=0)] = None,
        session_id: SessionId = None,
    ) -> CellResult:
        """Run Python code. Print what you need, or end with an expression. Variables and files
        persist in the session of the answer: name it by session_id to go on."""
        with _told():
            session = await connections.session(ctx, session_id, answers_id=True)
            request = CellRequest(code=code, timeout_s=timeout_s)
            return await service.sessions.run_cell(session.session_id, request)

    @server.tool()
    async def list_files(ctx: Context[Any, Any], session_id: SessionId = None) -> list[FileInfo]:
        """List the files of the working folder."""
        with _told():
            session = await connections.session(ctx, session_id)
            async with session.lock:
                files = await session.sandbox.list_files()
        return [FileInfo.model_validate(item) for item in files]

    @server.tool()
    async def read_file(
        path: SafePath, ctx: Context[Any, Any], session_id: SessionId = None
    ) -> str:
        """Read a file of the working folder as base64."""
        with _told():
            session = await connections.session(ctx, session_id)
            async with session.lock:
                content = await session.sandbox.read_file(path)
        return base64.b64encode(content).decode("ascii")

    @server.tool()
    async def write_file(
        path: SafePath, text: str, ctx: Context[Any, Any], session_id: SessionId = None
    ) -> str:
        """Write a text file in the working folder."""
        content = text.encode("utf-8", "surrogatepass")
        with _told():
            session = await connections.session(ctx, session_id)
            service.check("files", len(content), service.settings.max_file_bytes)
            async with session.lock:
                await session.sandbox.write_file(path, content)
        return f"wrote {len(content)} bytes to {path}"

    return server


def mount(server: MCPServer, api_key: str | None) -> Route:
    """The route /mcp with the key check in front."""
    # Host checks of the SDK guard open loopback servers against DNS rebinding. Behind a key they
    # would only get in the way of a service that is bound to a real address.
    security = TransportSecuritySettings(
        enable_dns_rebinding_protection=api_key is None,
        allowed_hosts=["127.0.0.1:*", "localhost:*", "[::1]:*"],
        allowed_origins=["http://127.0.0.1:*", "http://localhost:*", "http://[::1]:*"],
    )
    inner = server.streamable_http_app(transport_security=security)
    return Route("/mcp", endpoint=_Guard(inner, api_key), include_in_schema=False)


class _Guard:
    """Require the bearer key before anything of the inner app is reached."""

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._api_key is not None and not key_is_accepted(scope, [self._api_key]):
            raise unauthorized()
        await self._app(scope, receive, send)
