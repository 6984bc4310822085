"""The HTTP face of the tool service: `create_app(service, api_key)` and the native routes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.auth import KeyGuard
from services.common.disconnect import while_connected
from services.common.errors import ErrorBody, install_error_handlers
from services.common.middleware import install_middleware
from services.tool.api import examples, fusion
from services.tool.api import mcp as mcp_server
from services.tool.api.sessions import build_session_router
from services.tool.errors import ERRORS
from services.tool.service import ToolService
from services.tool.wire.schemas import (
    BatchItem,
    BatchRequest,
    ExecuteRequest,
    ExecuteResult,
    IsolationReport,
)


def create_app(service: ToolService, api_key: str | None) -> FastAPI:
    """Build the app around a running service.

    Args:
        api_key: bearer key that every route but the probes requires; None for an open loopback.
    """
    tools = mcp_server.build(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with tools.session_manager.run():
            yield

    # FastAPI's pages for people load scripts from the Internet, which a server may not reach.
    app = FastAPI(
        title="Tool service", version="1", lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.service = service
    guarded = [Depends(KeyGuard(api_key))] if api_key is not None else []
    for router in (_execution_router(), build_session_router(), fusion.build_router()):
        app.include_router(router, dependencies=guarded, responses=_ERRORS)
    app.include_router(_probe_router())
    app.router.routes.append(mcp_server.mount(tools, api_key))
    install_error_handlers(app, ERRORS)
    install_middleware(app, max_body_bytes=service.settings.max_body_bytes)
    app.add_middleware(_LevelHeader, level=service.isolation.level)
    return app


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (401, 413, 422, 429, 503)
}


class _LevelHeader:
    """Say on every answer how isolated the code was."""

    def __init__(self, app: ASGIApp, *, level: str) -> None:
        self._app = app
        self._level = level

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_level(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Sandbox-Level"] = self._level
            await send(message)

        await self._app(scope, receive, send_with_level)


def get_service(request: Request) -> ToolService:
    """The running service, for routes."""
    service: ToolService = request.app.state.service
    return service


def _execution_router() -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["execution"])

    @router.post("/execute", responses=examples.EXECUTE_RESPONSES)
    async def execute(body: ExecuteRequest, request: Request) -> ExecuteResult:
        """Run one program in a fresh interpreter. Failing code is a 200 with its status."""
        return await while_connected(request, get_service(request).execute(body))

    @router.post("/execute/batch", response_class=StreamingResponse, responses=examples.BATCH)
    async def execute_batch(body: BatchRequest, request: Request) -> StreamingResponse:
        """Run several programs; one JSON line each, in the order they finish."""
        lines = _batch_lines(get_service(request), body.requests)
        return StreamingResponse(lines, media_type="application/x-ndjson")

    @router.get("/isolation")
    async def isolation(request: Request) -> IsolationReport:
        """What stands between a snippet and the machine, as tried out at start."""
        return get_service(request).isolation

    @router.get("/tools")
    async def tools() -> list[dict[str, Any]]:
        """The function schema for OpenAI-style function calling."""
        return [examples.FUNCTION_SCHEMA]

    return router


async def _batch_lines(service: ToolService, requests: list[ExecuteRequest]) -> AsyncIterator[str]:
    async def one(index: int, request: ExecuteRequest) -> str:
        result = await service.execute_to_the_end(request)
        return BatchItem(index=index, **result.model_dump()).model_dump_json() + "\n"

    tasks = [asyncio.ensure_future(one(i, request)) for i, request in enumerate(requests)]
    try:
        for finished in asyncio.as_completed(tasks):
            yield await finished
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _probe_router() -> APIRouter:
    router = APIRouter(tags=["probes"])

    @router.get("/livez")
    async def livez() -> dict[str, str]:
        return {"status": "alive"}

    @router.get("/readyz", responses={503: {"description": "a launcher is being replaced"}})
    async def readyz(request: Request) -> Response:
        service = get_service(request)
        layers = {name: layer.active for name, layer in service.isolation.layers.items()}
        ready = service.sandbox.healthy
        body = {"ready": ready, "isolation": service.isolation.level, "layers": layers}
        return JSONResponse(body, status_code=200 if ready else 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request) -> PlainTextResponse:
        text = get_service(request).metrics.render().decode()
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return router
