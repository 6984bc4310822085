"""Routes of sessions: open, run cells, files up and down, end."""

from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from services.common.errors import ErrorBody
from services.common.json_body import JsonRoute
from services.common.routes import while_connected
from services.tool.service import ToolService
from services.tool.wire.schemas import (
    CellRequest,
    CellResult,
    FileList,
    SafePath,
    SessionInfo,
    SessionRequest,
)

# 16 random bytes, as Sessions makes them; anything else is a 422 before a look-up.
SessionId = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
_GONE: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (404, 409, 410)
}


def session_routes(service: ToolService) -> APIRouter:
    """Routes under /v1/sessions."""
    router = APIRouter(prefix="/v1/sessions", route_class=JsonRoute, tags=["sessions"])
    sessions = service.sessions

    @router.post("", status_code=201)
    async def open_session(body: SessionRequest | None = None) -> SessionInfo:
        """Open a persistent interpreter; without a body, one with the server's limits."""
        return sessions.info(await sessions.open(body or SessionRequest()))

    @router.get("/{session_id}", responses=_GONE)
    async def get_session(session_id: SessionId) -> SessionInfo:
        """Look at a session; its idle clock starts again."""
        return sessions.info(sessions.get(session_id))

    @router.delete("/{session_id}", status_code=204, responses=_GONE)
    async def end_session(session_id: SessionId) -> None:
        """End a session and everything in it."""
        sessions.end(session_id, "ended by its owner")

    @router.post("/{session_id}/execute", responses=_GONE)
    async def execute_cell(
        session_id: SessionId, body: CellRequest, request: Request
    ) -> CellResult:
        """Run one cell. A cell that is killed leaves the state as it was before."""
        return await while_connected(request, sessions.run_cell(session_id, body))

    @router.get("/{session_id}/files", responses=_GONE)
    async def list_files(session_id: SessionId) -> FileList:
        """Files below the session's working folder."""
        return FileList(files=await sessions.list_files(session_id))

    @router.get("/{session_id}/files/{path:path}", responses=_GONE, response_class=Response)
    async def get_file(session_id: SessionId, path: SafePath) -> Response:
        """The content of a regular file."""
        content = await sessions.read_file(session_id, path)
        return Response(content, media_type="application/octet-stream")

    @router.put("/{session_id}/files/{path:path}", status_code=204, responses=_GONE)
    async def put_file(session_id: SessionId, path: SafePath, request: Request) -> None:
        """Write a file; the body is its content."""
        await sessions.write_file(session_id, path, await request.body())

    return router
