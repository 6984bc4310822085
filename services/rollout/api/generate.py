"""POST, GET and DELETE of one generate request. The ledger makes every one of them repeatable."""

import math
import time
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from starlette.requests import Request
from starlette.responses import Response

from services.common.disconnect import while_connected
from services.common.errors import ApiError, ClientGone, ErrorBody
from services.common.wire import media_type_of
from services.common.wire_routes import WireRoute, reply
from services.rollout.api.batch import ItemStream, stream_batch
from services.rollout.api.streaming import EVENT_STREAM, stream_events
from services.rollout.service import RolloutService
from services.rollout.wire.schemas import (
    VERSION_HEADER,
    BatchItem,
    BatchRequest,
    ForgetReply,
    GenerateRequest,
    GenerateResponse,
    RequestId,
    RunningReply,
)

# nginx's code for a client that closed the connection; nobody reads it but the log.
_CLIENT_CLOSED_REQUEST = 499

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody} for status in (401, 404, 409, 410, 413, 422, 429, 500, 503, 504)
}
_RUNNING: dict[int | str, dict[str, Any]] = {202: {"model": RunningReply}}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}}
}
_BATCH: dict[int | str, dict[str, Any]] = {
    200: {"model": BatchItem, "description": "One for each request, in the order they finish."}
}

_WaitS = Annotated[float, Query(ge=0.0, le=3600.0, allow_inf_nan=False)]
_DEADLINE_HEADER = "x-request-deadline"
# Read by hand: as a Header parameter it would be a fifth of the CPU of a request.
_DEADLINE = {
    "parameters": [
        {
            "name": _DEADLINE_HEADER,
            "in": "header",
            "required": False,
            "description": "Absolute time in Unix seconds after which the work is cancelled.",
            "schema": {"type": "number", "exclusiveMinimum": 0},
        }
    ]
}


def generate_routes(service: RolloutService) -> APIRouter:
    """Routes under /v1/generate."""
    router = APIRouter(prefix="/v1", route_class=WireRoute, responses=_ERRORS, tags=["data"])

    @router.post(
        "/generate", response_model=GenerateResponse, responses=_STREAM, openapi_extra=_DEADLINE
    )
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Sample n continuations of a prompt of token ids, each with log-probs and versions.

        Sending the same body again attaches to the run or returns its kept reply. The header
        x-request-deadline is an absolute time in Unix seconds. With Accept: text/event-stream the
        reply is a stream of `tokens` events, then one `done` or `error` event.
        """
        remaining_s = _remaining_s(request)
        if EVENT_STREAM in request.headers.get("accept", ""):
            return stream_events(service, body, remaining_s)
        service.start(body, remaining_s)
        return await _answer(request, body.request_id, None)

    @router.post(
        "/generate/batch", response_class=ItemStream, responses=_BATCH, openapi_extra=_DEADLINE
    )
    async def batch(body: BatchRequest, request: Request) -> ItemStream:
        """Many requests at once; each reply or error as it comes, one JSON line or msgpack object.

        Each request behaves as if it had been sent alone: the same ids, retries and limits. Only a
        body that does not match the schema is refused as a whole.
        """
        media_type = media_type_of(request.headers.get("accept"))
        return stream_batch(service, body, _remaining_s(request), media_type)

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


def _remaining_s(request: Request) -> float | None:
    """Seconds until the absolute deadline that the caller's header names in Unix seconds.

    Raises:
        ApiError: 422 when it is no time, 504 when it has passed.
    """
    header = request.headers.get(_DEADLINE_HEADER)
    if header is None:
        return None
    try:
        remaining_s = float(header) - time.time()
    except ValueError:
        remaining_s = math.nan
    if not math.isfinite(remaining_s):
        raise ApiError(
            422,
            "invalid_deadline",
            f"{_DEADLINE_HEADER} is not a number of seconds.",
            fix="Send an absolute time in Unix seconds, for example 1790000000.5.",
            field=_DEADLINE_HEADER,
        )
    if remaining_s <= 0.0:
        raise ApiError(
            504,
            "deadline_exceeded",
            "The deadline passed before the request arrived.",
            fix="Allow more time; check that the clocks of both machines agree.",
            field=_DEADLINE_HEADER,
        )
    return remaining_s
