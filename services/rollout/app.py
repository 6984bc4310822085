"""The HTTP face of the rollout service. Routes parse, call and answer; nothing is decided here."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from services.common.auth import require_key
from services.common.errors import ApiError, ErrorBody, install_error_handlers
from services.common.looplag import watch_loop_lag
from services.common.middleware import install_middleware
from services.common.wire import WireRoute, reply
from services.rollout import metrics
from services.rollout.engine import EngineDeadError
from services.rollout.routes_generate import generate_routes, require_weights
from services.rollout.schemas import (
    CommitRequest,
    CommitResponse,
    Contract,
    Health,
    PauseRequest,
    PrepareRequest,
    WeightsStatus,
)
from services.rollout.service import RolloutService
from services.rollout.settings import RolloutSettings

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (401, 413, 422, 503)
}


def create_app(
    settings: RolloutSettings, service: RolloutService, *, api_key: str, admin_key: str
) -> FastAPI:
    """Build the app. The caller owns `service` and closes it.

    Args:
        api_key: bearer key of the data routes; the admin key opens them too.
        admin_key: bearer key of the control routes.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with watch_loop_lag(metrics.LOOP_LAG_SECONDS.observe):
            yield

    app = FastAPI(title="openrlhf-alp rollout service", version="1", lifespan=lifespan)
    install_error_handlers(app)
    install_middleware(app, max_body_bytes=settings.max_body_bytes)
    data_key, control_key = require_key(api_key, admin_key), require_key(admin_key)
    app.include_router(generate_routes(service), dependencies=[Depends(data_key)])
    app.include_router(_data_routes(service), dependencies=[Depends(data_key)])
    app.include_router(_control_routes(service), dependencies=[Depends(control_key)])
    app.include_router(_probe_routes(service))
    return app


def _data_routes(service: RolloutService) -> APIRouter:
    router = APIRouter(prefix="/v1", route_class=WireRoute, responses=_ERRORS, tags=["data"])

    @router.get("/contract", response_model=Contract)
    async def contract(request: Request) -> Response:
        """What a learner has to agree with, and the version that is serving."""
        return reply(request, service.contract())

    @router.get("/weights", response_model=WeightsStatus)
    async def weights(request: Request) -> Response:
        """The serving version, what is staged, and what an update must carry."""
        return reply(request, service.weights.status())

    return router


def _control_routes(service: RolloutService) -> APIRouter:
    router = APIRouter(
        prefix="/v1",
        route_class=WireRoute,
        responses={**_ERRORS, 409: {"model": ErrorBody}},
        tags=["control"],
    )

    @router.post(
        "/weights/prepare", response_model=WeightsStatus, responses={507: {"model": ErrorBody}}
    )
    async def prepare(body: PrepareRequest, request: Request) -> Response:
        """Stage an update and prove it; the old version goes on serving."""
        return reply(request, await service.weights.prepare(body))

    @router.post("/weights/commit", response_model=CommitResponse)
    async def commit(body: CommitRequest, request: Request) -> Response:
        """Swap to the staged update; answers after it is loaded and serving."""
        return reply(request, await service.weights.commit(body))

    @router.post("/weights/abort", response_model=WeightsStatus)
    async def abort(request: Request) -> Response:
        """Forget the staged update."""
        return reply(request, await service.weights.abort())

    @router.post("/pause", response_model=Health)
    async def pause(body: PauseRequest, request: Request) -> Response:
        """Stop drawing tokens; returns when none is being drawn."""
        await service.engine.pause(body.mode)
        return reply(request, _ok(service))

    @router.post("/resume", response_model=Health)
    async def resume(request: Request) -> Response:
        """Draw tokens again."""
        await service.engine.resume()
        return reply(request, _ok(service))

    return router


def _probe_routes(service: RolloutService) -> APIRouter:
    router = APIRouter(tags=["probes"])

    @router.get("/livez", responses={503: {"model": ErrorBody}})
    async def livez() -> Health:
        """Whether the engine process answers."""
        try:
            await service.engine.check()
        except EngineDeadError as error:
            raise ApiError(503, "engine_dead", f"{error}.", fix="Restart this service.") from error
        return _ok(service)

    @router.get("/readyz", responses={503: {"model": ErrorBody}})
    async def readyz() -> Health:
        """Whether requests would be served: a live engine and whole weights."""
        require_weights(service)
        return await livez()

    @router.get("/metrics")
    async def prometheus() -> Response:
        """Prometheus metrics of the engine and of this service."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return router


def _ok(service: RolloutService) -> Health:
    return Health(status="ok", version=service.versions.current.number)
