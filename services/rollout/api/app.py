"""The HTTP application. Routes parse, call and answer; decisions are made below them."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from services.common.errors import ApiError, ErrorBody, install_error_handlers
from services.common.middleware import install_middleware
from services.common.routes import KeyGuard, WireRoute, document_msgpack, reply
from services.common.serve import watch_loop_lag
from services.rollout import metrics
from services.rollout.api.control import UPLOAD_PATH, control_routes, ok
from services.rollout.api.generate import generate_routes
from services.rollout.api.workers import worker_routes
from services.rollout.engines.protocol import EngineDeadError
from services.rollout.errors import ERRORS
from services.rollout.service import RolloutService
from services.rollout.settings import RolloutSettings
from services.rollout.wire.schemas import Contract, Health, WeightsStatus

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 408, 413, 422, 503)
}


def create_app(
    service: RolloutService, settings: RolloutSettings, *, api_key: str, admin_key: str
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

    app = FastAPI(
        title="openrlhf-alp rollout service",
        version="1",
        lifespan=lifespan,
        # A redirect would name whatever host the request named.
        redirect_slashes=False,
        # FastAPI's documentation pages load scripts from the Internet, which may be out of reach.
        docs_url=None,
        redoc_url=None,
    )
    install_error_handlers(app, ERRORS)
    install_middleware(
        app,
        keys=(api_key, admin_key),
        max_body_bytes=settings.max_body_bytes,
        body_limit_exempt=(UPLOAD_PATH,),
    )
    data_key, control_key = KeyGuard(api_key, admin_key), KeyGuard(admin_key)
    app.include_router(generate_routes(service), dependencies=[Depends(data_key)])
    app.include_router(_data_routes(service), dependencies=[Depends(data_key)])
    control = control_routes(service)
    app.include_router(control, dependencies=[Depends(control_key)])
    paths = [route.path for route in control.routes if isinstance(route, APIRoute)]
    app.include_router(worker_routes(service, paths), dependencies=[Depends(data_key)])
    app.include_router(_probe_routes(service))
    document_msgpack(app)
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


def _probe_routes(service: RolloutService) -> APIRouter:
    router = APIRouter(tags=["probes"])

    @router.get("/livez", responses={503: {"model": ErrorBody}})
    async def livez() -> Health:
        """Whether the engine process answers."""
        try:
            await service.engine.check()
        except EngineDeadError as error:
            raise ApiError(503, "engine_dead", f"{error}.", fix="Restart this service.") from error
        return ok(service)

    @router.get("/readyz", responses={503: {"model": ErrorBody}})
    async def readyz() -> Health:
        """Whether requests would be served: the engine answers and holds one whole version."""
        service.weights.state.require_serving()
        health = await livez()
        if await service.engine.is_paused():
            # Ready all the same: a push pauses each server, and requests wait instead of failing.
            return health.model_copy(update={"detail": "paused: requests wait for /v1/resume"})
        return health

    @router.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Prometheus metrics of the engine and of this service."""
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return router
