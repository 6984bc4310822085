"""The service as MCP tools over streamable HTTP at /mcp, one interpreter session per MCP
connection.

From version 2026-07-28 on the protocol has no connections: there a caller continues a session by
the id that every answer of run_python carries.
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

from services.common.errors import to_api_error
from services.tool.errors import ERRORS
from services.tool.rules import utf8
from services.tool.service import ToolService
from services.tool.sessions import Sessions
from services.tool.wire.schemas import CellRequest, CellResult, FileInfo, SafePath, SessionRequest

_SESSION_HEADER = "mcp-session-id"
_MAX_CONNECTIONS = 1024
"""Connections of protocol versions that have them; each holds 33 KB until it is idle too long."""
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

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._by_connection: dict[str, str] = {}

    async def session_id(
        self, context: Context[Any, Any], wanted: str | None, *, answers_id: bool = False
    ) -> str:
        """The session asked for, or the connection's own, opened when it is needed.

        Args:
            answers_id: whether the caller learns the session's id. If not, one that belongs to no
                connection could never be found again.

        Raises:
            ToolError: no session is named, and there is no connection that could have one.
            SessionGoneError: the session asked for ended.
        """
        if wanted is not None:
            self._sessions.get(wanted).unclaimed = False
            return wanted
        connection = (context.headers or {}).get(_SESSION_HEADER)
        if not connection and not answers_id:
            raise ToolError(_NO_SESSION)
        known = self._by_connection.get(connection) if connection else None
        if known is not None and known in self._sessions:
            return known
        opened = await self._sessions.open(SessionRequest(), unclaimed=not connection)
        if connection:
            # Sessions end by themselves; their connections are forgotten here.
            self._by_connection = {
                key: known for key, known in self._by_connection.items() if known in self._sessions
            }
            self._by_connection[connection] = opened.session_id
        return opened.session_id


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Tell the model cause and fix; of an unexpected error the SDK names only the tool."""
    try:
        yield
    except tuple(ERRORS) as error:
        raise ToolError(str(to_api_error(error, ERRORS))) from error


def build_mcp_server(service: ToolService) -> MCPServer:
    """The MCP server with its four tools."""
    server = MCPServer("tool-service", instructions=_INSTRUCTIONS)
    connections = _Connections(service.sessions)
    sessions = service.sessions
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
        figures: bool = False,
    ) -> CellResult:
        """Run Python code. Print what you need, or end with an expression. Variables and files
        persist in the session of the answer: name it by session_id to continue. `figures` returns
        matplotlib's figures as PNG files in base64."""
        with _explained():
            found = await connections.session_id(ctx, session_id, answers_id=True)
            cell = CellRequest(code=code, timeout_s=timeout_s, figures=figures)
            return await sessions.run_cell(found, cell)

    @server.tool()
    async def list_files(ctx: Context[Any, Any], session_id: SessionId = None) -> list[FileInfo]:
        """List the files of the working folder."""
        with _explained():
            return await sessions.list_files(await connections.session_id(ctx, session_id))

    @server.tool()
    async def read_file(
        path: SafePath, ctx: Context[Any, Any], session_id: SessionId = None
    ) -> str:
        """Read a file of the working folder as base64."""
        with _explained():
            found = await connections.session_id(ctx, session_id)
            content = await sessions.read_file(found, path)
        return base64.b64encode(content).decode("ascii")

    @server.tool()
    async def write_file(
        path: SafePath, text: str, ctx: Context[Any, Any], session_id: SessionId = None
    ) -> str:
        """Write a text file in the working folder."""
        content = utf8(text)
        with _explained():
            found = await connections.session_id(ctx, session_id)
            await sessions.write_file(found, path, content)
        return f"wrote {len(content)} bytes to {path}"

    return server


def mcp_route(server: MCPServer, api_key: str | None, idle_s: float) -> Route:
    """The route /mcp.

    Args:
        api_key: what the app's KeyGate asks for; None for an open loopback.
        idle_s: seconds without a request after which a connection is forgotten.
    """
    # The SDK's check of the Host header guards an open loopback server against DNS rebinding.
    # Behind a key it would only refuse the names of a service that is bound to a real address.
    security = TransportSecuritySettings(
        enable_dns_rebinding_protection=api_key is None,
        allowed_hosts=["127.0.0.1:*", "localhost:*", "[::1]:*"],
        allowed_origins=["http://127.0.0.1:*", "http://localhost:*", "http://[::1]:*"],
    )
    inner = server.streamable_http_app(
        transport_security=security,
        session_idle_timeout=idle_s,
        max_sessions=_MAX_CONNECTIONS,
    )
    return Route("/mcp", endpoint=inner, include_in_schema=False)
