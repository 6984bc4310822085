import logging
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import APIRouter, Depends, FastAPI
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from services.common.errors import ApiError, ErrorSpec, install_error_handlers
from services.common.middleware import install_middleware
from services.common.routes import KeyGuard, WireRoute, reply

# importlib mode adds no folder to the path by itself.
sys.path.insert(0, str(Path(__file__).parent))

KEY = "a-key-for-tests"


class FullError(Exception):
    """An exception of a service's core, which knows nothing of HTTP."""

    wait_s = 1.2


class VeryFullError(FullError):
    """Has no entry of its own in the table."""


TABLE = {
    FullError: ErrorSpec(
        429,
        "full",
        message="Full: {error}.",
        fix="Wait {error.wait_s} s.",
        field="{error.wait_s}",
        retry_after_s="{error.wait_s}",
    )
}


class Inner(BaseModel, extra="forbid"):
    top_p: float = Field(gt=0.0, le=1.0)


class Numbers(BaseModel, extra="forbid"):
    token_ids: list[int]
    logprobs: list[float]
    inner: Inner


def build_app() -> FastAPI:
    app = FastAPI()
    install_error_handlers(app, TABLE)
    install_middleware(app, keys=(), max_body_bytes=10_000)
    router = APIRouter(route_class=WireRoute)

    @router.post("/echo")
    async def echo(body: Numbers, request: Request) -> Response:
        return reply(request, body)

    @router.get("/locked", dependencies=[Depends(KeyGuard(KEY))])
    async def locked() -> dict[str, bool]:
        return {"open": True}

    @router.post("/locked", dependencies=[Depends(KeyGuard(KEY))])
    async def locked_echo(body: Numbers, request: Request) -> Response:
        return reply(request, body)

    @router.get("/api-error")
    async def api_error() -> None:
        raise ApiError(
            429, "overloaded", "Full.", fix="Wait.", field=None, headers={"Retry-After": "2"}
        )

    @router.get("/full")
    async def full() -> None:
        raise VeryFullError("{braces} stay")

    @router.get("/bug")
    async def bug() -> None:
        raise RuntimeError("a secret detail")

    app.include_router(router)
    return app


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=build_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
        yield client


@pytest.fixture(autouse=True)
def _restore_logging() -> object:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
