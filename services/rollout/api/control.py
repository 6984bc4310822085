"""Routes that change what is served, or whether tokens are drawn. Admin key only."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Path, Query
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from services.common.errors import ErrorBody
from services.common.routes import WireRoute, reply
from services.rollout.service import RolloutService
from services.rollout.wire.schemas import (
    CommitRequest,
    CommitResponse,
    FileName,
    Health,
    PauseRequest,
    PrepareRequest,
    SleepRequest,
    UploadStatus,
    WeightsStatus,
)
from services.rollout.wire.transfer import LinkStatus, OpenRequest, ReceiveRequest

UPLOAD_PATH = "/v1/weights/files/"

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (400, 401, 408, 409, 413, 422, 501, 503, 504, 507)
}
_RAW_BODY = {
    "requestBody": {
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    }
}
_Name = Annotated[FileName, Path()]
_Offset = Annotated[int, Query(ge=0, le=2**62)]


def control_routes(service: RolloutService) -> APIRouter:
    """Weights, transfers, pause and resume, sleep and wake-up, under /v1."""
    router = APIRouter(prefix="/v1", route_class=WireRoute, responses=_ERRORS, tags=["control"])
    _add_updates(router, service)
    _add_uploads(router, service)
    _add_transfers(router, service)
    _add_switches(router, service)
    return router


def _add_updates(router: APIRouter, service: RolloutService) -> None:
    @router.post("/weights/prepare", response_model=WeightsStatus)
    async def prepare(body: PrepareRequest, request: Request) -> Response:
        """Stage an update and verify its digest; the old version keeps serving."""
        return reply(request, await service.weights.prepare(body))

    @router.post("/weights/commit", response_model=CommitResponse)
    async def commit(body: CommitRequest, request: Request) -> Response:
        """Swap to the staged update; the reply comes once it is loaded and serving."""
        return reply(request, await service.weights.commit(body))

    @router.post("/weights/abort", response_model=WeightsStatus)
    async def abort(request: Request) -> Response:
        """Forget the staged update and the uploads."""
        return reply(request, await service.weights.abort())


def _add_uploads(router: APIRouter, service: RolloutService) -> None:
    @router.get("/weights/files/{name}", response_model=UploadStatus)
    async def upload_status(name: _Name, request: Request) -> Response:
        """How much of a file has arrived, so that the rest can be sent after a lost connection."""
        size = service.uploads.size(name)
        return reply(request, UploadStatus(name=name, num_bytes=size))

    @router.put("/weights/files/{name}", response_model=UploadStatus, openapi_extra=_RAW_BODY)
    async def upload(name: _Name, request: Request, offset: _Offset = 0) -> Response:
        """Append the raw body at `offset`. Prepare then takes the file as `uploads/<name>`."""
        try:
            size = await service.uploads.append(name, offset, request.stream())
        except ClientDisconnect:
            return Response(status_code=400)  # for the log; the bytes that arrived are kept
        return reply(request, UploadStatus(name=name, num_bytes=size))


def _add_transfers(router: APIRouter, service: RolloutService) -> None:
    @router.post("/weights/transfer/open", response_model=LinkStatus)
    async def open_link(body: OpenRequest, request: Request) -> Response:
        """Join the learner's NCCL group, or agree on CUDA IPC, after closing the link open before.

        Never run on a GPU.
        """
        return reply(request, await service.transfer.open(body))

    @router.post("/weights/transfer/receive", response_model=UploadStatus)
    async def receive(body: ReceiveRequest, request: Request) -> Response:
        """Receive one bucket while the learner sends it; prepare takes it as `uploads/<name>`."""
        return reply(request, await service.transfer.receive(body))

    @router.post("/weights/transfer/close", response_model=LinkStatus)
    async def close_link(request: Request) -> Response:
        """Leave the learner's group."""
        return reply(request, await service.transfer.close())


def _add_switches(router: APIRouter, service: RolloutService) -> None:
    @router.post("/pause", response_model=Health)
    async def pause(
        request: Request, body: Annotated[PauseRequest, Body(default_factory=PauseRequest)]
    ) -> Response:
        """Stop drawing tokens; returns when none is being drawn."""
        service.weights.state.require_awake()
        await service.engine.pause(body.mode)
        return reply(request, ok(service))

    @router.post("/resume", response_model=Health)
    async def resume(request: Request) -> Response:
        """Draw tokens again."""
        service.weights.state.require_awake()
        await service.engine.resume()
        return reply(request, ok(service))

    @router.post("/sleep", response_model=Health)
    async def sleep(
        request: Request, body: Annotated[SleepRequest, Body(default_factory=SleepRequest)]
    ) -> Response:
        """Free the accelerator's memory; generate answers 503 until wake_up."""
        await service.sleep_switch.sleep(body)
        return reply(request, ok(service))

    @router.post("/wake_up", response_model=Health)
    async def wake_up(request: Request) -> Response:
        """Allocate the memory again and serve the version that was serving."""
        await service.sleep_switch.wake_up()
        return reply(request, ok(service))


def ok(service: RolloutService) -> Health:
    """The answer of a probe or a switch that succeeded."""
    return Health(status="ok", version=service.versions.current.number)
