"""POST, GET and DELETE of one generate request. The ledger makes every one of them repeatable."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query
from starlette.requests import Request
from starlette.responses import Response

from services.common.disconnect import ClientGone, while_connected
from services.common.errors import ApiError, ErrorBody
from services.common.wire_routes import WireRoute, reply
from services.rollout.generator import check_request
from services.rollout.schemas import (
    VERSION_HEADER,
    ForgetReply,
    GenerateRequest,
    GenerateResponse,
    RequestId,
    RunningReply,
)
from services.rollout.service import RolloutService
from services.rollout.streaming import EVENT_STREAM, stream_events

# nginx's code for a client that closed the connection; nobody reads it but the log.
_CLIENT_CLOSED_REQUEST = 499

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (401, 404, 409, 410, 413, 422, 429, 500, 503, 504)
}
_RUNNING: dict[int | str, dict[str, Any]] = {202: {"model": RunningReply}}

_WaitS = Annotated[float, Query(ge=0.0, le=3600.0, allow_inf_nan=False)]
_Deadline = Annotated[float | None, Header(alias="x-request-deadline", gt=0.0, allow_inf_nan=False)]


def generate_routes(service: RolloutService) -> APIRouter:
    """Routes under /v1/generate."""
    router = APIRouter(prefix="/v1", route_class=WireRoute, responses=_ERRORS, tags=["data"])

    @router.post("/generate", response_model=GenerateResponse)
    async def generate(
        body: GenerateRequest, request: Request, deadline: _Deadline = None
    ) -> Response:
        """Sample n continuations of a prompt of token ids, each with log-probs and versions.

        Sending the same body again attaches to the run or returns its kept reply. The header
        x-request-deadline is an absolute time in Unix seconds. With Accept: text/event-stream the
        reply is a stream of `tokens` events, then one `done` or `error` event.
        """
        check_request(body, service.engine.info)
        require_weights(service)
        remaining_s = _remaining_s(deadline)
        if EVENT_STREAM in request.headers.get("accept", ""):
            return stream_events(service, body, remaining_s)
        service.ledger.submit(body, lambda: service.generator.run(body, remaining_s))
        return await _answer(request, body.request_id, None)

    @router.get("/generate/{request_id}", response_model=GenerateResponse, responses=_RUNNING)
    async def attach(
        request: Request, request_id: Annotated[RequestId, Path()], wait_s: _WaitS = 0.0
    ) -> Response:
        """The reply of a request sent before, or 202 while it still runs after `wait_s`."""
        return await _answer(request, request_id, wait_s)

    @router.delete("/generate/{request_id}", response_model=ForgetReply)
    async def forget(request: Request, request_id: Annotated[RequestId, Path()]) -> Response:
        """Cancel a running request, or drop its kept reply. The id is free afterwards."""
        state = service.ledger.forget(request_id)
        return reply(request, ForgetReply(request_id=request_id, state=state))

    async def _answer(request: Request, request_id: str, wait_s: float | None) -> Response:
        try:
            response = await while_connected(request, service.ledger.attach(request_id, wait_s))
        except ClientGone:
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        if response is None:
            return reply(request, RunningReply(request_id=request_id), status=202)
        result = reply(request, response)
        result.headers[VERSION_HEADER] = str(service.versions.current.number)
        return result

    return router


def require_weights(service: RolloutService) -> None:
    """Refuse work while the engine sleeps, or a failed update has left its weights unknown.

    Raises:
        ApiError: 503.
    """
    if service.weights.state == "sleeping":
        raise ApiError(
            503,
            "sleeping",
            "This server sleeps.",
            fix="Use another server, or POST /v1/wake_up with the admin key.",
            headers={"Retry-After": "1"},
        )
    if service.weights.state == "failed":
        raise ApiError(
            503,
            "weights_failed",
            str(service.weights.detail),
            fix="Use another server until this one has had a full update.",
        )


def _remaining_s(deadline: float | None) -> float | None:
    """Seconds until an absolute deadline in Unix seconds.

    Raises:
        ApiError: 504 when it has passed.
    """
    if deadline is None:
        return None
    remaining_s = deadline - time.time()
    if remaining_s <= 0.0:
        raise ApiError(
            504,
            "deadline_exceeded",
            "The deadline passed before the request arrived.",
            fix="Allow more time; check that the clocks of both machines agree.",
            field="x-request-deadline",
        )
    return remaining_s
