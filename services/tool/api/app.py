"""The HTTP side of the tool service: the app, executions, probes."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from services.common.errors import ErrorBody, install_error_handlers
from services.common.json_body import JsonRoute
from services.common.middleware import install_middleware
from services.common.routes import BoundedItemStream, KeyGuard, SendBudget, while_connected
from services.tool.api.fusion import fusion_routes
from services.tool.api.mcp import build_mcp_server, mcp_route
from services.tool.api.sessions import session_routes
from services.tool.errors import ERRORS
from services.tool.service import ToolService
from services.tool.settings import ToolSettings
from services.tool.wire.schemas import (
    BatchItem,
    BatchRequest,
    ExecuteRequest,
    ExecuteResult,
    IsolationReport,
)

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 408, 413, 422, 429, 503)
}
FUNCTION_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "code_interpreter",
        "description": "Run Python code in a fresh sandbox and return what it prints. numpy, sympy "
        "and scipy are available; there is no network and no state between calls.",
        "parameters": {
            "type": "object",
            "properties": {
                "code": {"type": "string", "description": "Python code; print what you need"}
            },
            "required": ["code"],
        },
    },
}


def _result(status: str, **fields: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "status": status,
        "exit_code": None,
        "signal": None,
        "error": None,
        "message": "",
        "stdout": "",
        "stderr": "",
        "stdout_truncated": False,
        "stderr_truncated": False,
        "files": {},
        "missing": {},
        "usage": {"wall_ms": 2.1, "cpu_ms": 1.8, "peak_mb": 33.0, "queue_ms": 0.0},
        "isolation": "full",
        "request_id": None,
    }
    return {"summary": status, "value": base | fields}


_ERROR = {"type": "ZeroDivisionError", "message": "division by zero", "line": 1}
_KILLED = {"signal": "SIGKILL"}
_BY_STATUS = {
    "ok": _result("ok", exit_code=0, stdout="2\n"),
    "error": _result("error", exit_code=1, error=_ERROR, stderr="Traceback ..."),
    "exit": _result("exit", exit_code=3),
    "timeout": _result("timeout", message="timeout exceeded", stdout="so far\n", **_KILLED),
    "cpu_limit": _result("cpu_limit", signal="SIGXCPU", message="cpu limit of 2 s exceeded"),
    "memory_limit": _result("memory_limit", message="memory limit exceeded", **_KILLED),
    "output_limit": _result(
        "output_limit", message="output_limit exceeded", stdout_truncated=True, **_KILLED
    ),
    "crashed": _result("crashed", signal="SIGSEGV", message="killed by SIGSEGV"),
    "rejected": _result("rejected", message="files: File name too long"),
    "sandbox_error": _result(
        "sandbox_error",
        message="the sandbox process died while the code ran; a retry runs it again",
    ),
    "overloaded": _result("overloaded", message="512 executions are already waiting"),
}
EXECUTE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {"examples": _BY_STATUS}}}
}
_BATCH_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One JSON object per line (BatchItem), in the order they finish",
        "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
    }
}


def create_app(service: ToolService, settings: ToolSettings, *, api_key: str | None) -> FastAPI:
    """Build the app around a running service.

    Args:
        api_key: bearer key that every route but the probes requires; None for an open loopback.
    """
    tools = build_mcp_server(service)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with tools.session_manager.run():
            yield

    app = FastAPI(
        title="openrlhf-alp tool service",
        version="1",
        lifespan=lifespan,
        # A redirect would name whatever host the request named.
        redirect_slashes=False,
        # FastAPI's pages for people load scripts from the Internet, which a server may not reach.
        docs_url=None,
        redoc_url=None,
    )
    install_error_handlers(app, ERRORS)
    level = {"X-Sandbox-Level": service.isolation.level}
    keys = () if api_key is None else (api_key,)
    install_middleware(app, keys=keys, max_body_bytes=settings.max_body_bytes, headers=level)
    guarded = [] if api_key is None else [Depends(KeyGuard(api_key))]
    # Probes stay open: an orchestrator has no key.
    for router in (_execution_routes(service), session_routes(service), fusion_routes(service)):
        app.include_router(router, dependencies=guarded, responses=_ERRORS)
    app.include_router(_probe_routes(service))
    app.router.routes.append(mcp_route(tools, api_key, settings.session_ttl_s))
    return app


def _execution_routes(service: ToolService) -> APIRouter:
    router = APIRouter(prefix="/v1", route_class=JsonRoute, tags=["execution"])
    unsent = SendBudget(round(service.settings.unsent_mb * 2**20))

    @router.post("/execute", responses={**EXECUTE_RESPONSES, 409: {"model": ErrorBody}})
    async def execute(body: ExecuteRequest, request: Request) -> ExecuteResult:
        """Run one program in a fresh interpreter. Failing code is a 200 with its status."""
        return await while_connected(request, service.execute(body))

    # As response_class the stream would document its errors as NDJSON, too; they are JSON.
    @router.post("/execute/batch", response_class=StreamingResponse, responses=_BATCH_RESPONSES)
    async def execute_batch(body: BatchRequest) -> BoundedItemStream:
        """Run several programs; one JSON line each, in the order they finish."""
        arrived_s = time.monotonic()

        async def one(index: int, request: ExecuteRequest) -> BatchItem:
            result = await service.execute_in_batch(request, arrived_s)
            return BatchItem(index=index, **result.model_dump())

        jobs = [
            (service.rules.largest_result_bytes(request), partial(one, index, request))
            for index, request in enumerate(body.requests)
        ]
        # Twice the slots keeps them busy, and leaves the queue to others.
        return BoundedItemStream(jobs, window=2 * service.settings.slots, budget=unsent)

    @router.get("/isolation")
    async def isolation() -> IsolationReport:
        """Which layers isolate a program, as tested at start."""
        return service.isolation

    @router.get("/tools")
    async def tools() -> list[dict[str, Any]]:
        """The function schema for OpenAI-style function calling."""
        return [FUNCTION_SCHEMA]

    return router


def _probe_routes(service: ToolService) -> APIRouter:
    router = APIRouter(tags=["probes"])

    @router.get("/livez", responses={503: {"description": "no launcher can be started"}})
    async def livez() -> Response:
        """Whether the service answers and could run a program, now or soon."""
        if service.sandbox.down:
            body = {"status": "down", "reason": service.sandbox.failure}
            return JSONResponse(body, status_code=503)
        return JSONResponse({"status": "alive"})

    @router.get("/readyz", responses={503: {"description": "a launcher is being replaced"}})
    async def readyz() -> Response:
        """Whether programs would run, and which layers of isolation are active."""
        layers = {name: layer.active for name, layer in service.isolation.layers.items()}
        ready = service.sandbox.healthy
        body = {
            "ready": ready,
            "reason": service.sandbox.failure,
            "isolation": service.isolation.level,
            "layers": layers,
        }
        return JSONResponse(body, status_code=200 if ready else 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Prometheus metrics of this service and its process."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return router
