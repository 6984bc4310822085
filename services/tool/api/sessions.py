"""Routes of sessions: open, run cells, files up and down, end."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Request, Response

from services.common.disconnect import while_connected
from services.common.errors import ErrorBody
from services.tool.service import ToolService
from services.tool.wire.schemas import (
    CellRequest,
    CellResult,
    FileInfo,
    FileList,
    SafePath,
    SessionInfo,
    SessionRequest,
)

SessionId = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
_GONE: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (404, 409, 410)
}


def _service(request: Request) -> ToolService:
    service: ToolService = request.app.state.service
    return service


def build_session_router() -> APIRouter:
    """Routes below /v1/sessions."""
    router = APIRouter(prefix="/v1/sessions", tags=["sessions"])

    @router.post("", status_code=201)
    async def open_session(
        request: Request, body: Annotated[SessionRequest, Body(default_factory=SessionRequest)]
    ) -> SessionInfo:
        """Open a persistent interpreter."""
        sessions = _service(request).sessions
        return sessions.info(await sessions.open(body))

    @router.get("/{session_id}", responses=_GONE)
    async def get_session(session_id: SessionId, request: Request) -> SessionInfo:
        """Look at a session; its idle clock starts again."""
        sessions = _service(request).sessions
        return sessions.info(sessions.get(session_id))

    @router.delete("/{session_id}", status_code=204, responses=_GONE)
    async def end_session(session_id: SessionId, request: Request) -> None:
        """End a session and everything in it."""
        _service(request).sessions.end(session_id, "ended by its owner")

    @router.post("/{session_id}/execute", responses=_GONE)
    async def execute_cell(
        session_id: SessionId, body: CellRequest, request: Request
    ) -> CellResult:
        """Run one cell. A cell that is killed leaves the state as it was before."""
        sessions = _service(request).sessions
        return await while_connected(request, sessions.run_cell(session_id, body))

    @router.get("/{session_id}/files", responses=_GONE)
    async def list_files(session_id: SessionId, request: Request) -> FileList:
        """Files below the session's working folder."""
        session = _service(request).sessions.get(session_id)
        async with session.lock:
            listed = await session.sandbox.list_files()
        return FileList(files=[FileInfo.model_validate(item) for item in listed])

    @router.get("/{session_id}/files/{path:path}", responses=_GONE, response_class=Response)
    async def get_file(session_id: SessionId, path: SafePath, request: Request) -> Response:
        """The content of a regular file."""
        session = _service(request).sessions.get(session_id)
        async with session.lock:
            content = await session.sandbox.read_file(path)
        return Response(content, media_type="application/octet-stream")

    @router.put("/{session_id}/files/{path:path}", status_code=204, responses=_GONE)
    async def put_file(session_id: SessionId, path: SafePath, request: Request) -> None:
        """Write a file; the body is its content."""
        service = _service(request)
        session = service.sessions.get(session_id)
        content = await request.body()
        service.check("files", len(content), service.settings.max_file_bytes)
        async with session.lock:
            await session.sandbox.write_file(path, content)

    return router
