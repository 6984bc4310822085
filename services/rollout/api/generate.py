"""Generate requests: one at a time, as a stream of tokens, or as a batch.

The ledger owns every run. A connection, stream or batch that breaks off is picked up by sending the
same requests again.

    text/event-stream, in place of the reply of one request:
    event: tokens   data: {"index": 0, "token_ids": [...], "logprobs": [...]}     as they are drawn
    event: done     data: the whole reply, as without streaming                   last
    event: error    data: the error body                                          last, instead
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from services.common.errors import ApiError, ErrorBody, error_response, to_api_error
from services.common.idempotent import RequestIdError
from services.common.routes import ItemStream, WireRoute, reply, while_connected
from services.common.wire import media_type_of
from services.rollout.errors import ERRORS, RolloutError
from services.rollout.service import RolloutService
from services.rollout.wire.schemas import (
    VERSION_HEADER,
    BatchItem,
    BatchRequest,
    ForgetReply,
    GenerateRequest,
    GenerateResponse,
    ItemError,
    RequestId,
    RunningReply,
    TokensEvent,
)

logger = logging.getLogger(__name__)

EVENT_STREAM = "text/event-stream"

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody}
    for status in (400, 401, 404, 408, 409, 410, 413, 422, 429, 500, 503, 504)
}
_RUNNING: dict[int | str, dict[str, Any]] = {202: {"model": RunningReply}}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {EVENT_STREAM: {"schema": {"type": "string"}}}}
}
_BATCH: dict[int | str, dict[str, Any]] = {
    200: {"model": BatchItem, "description": "One for each request, in the order they finish."}
}

_WaitS = Annotated[float, Query(ge=0.0, le=3600.0, allow_inf_nan=False)]
_EXPECTED = (RolloutError, RequestIdError)  # what a caller can act on
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

        Sending the same body again joins the run or returns its stored reply. The header
        x-request-deadline is an absolute time in Unix seconds. With Accept: text/event-stream the
        reply is a stream of `tokens` events, then one `done` or `error` event; joining a run gives
        `done` alone.
        """
        remaining_s = _remaining_s(request)
        if EVENT_STREAM in request.headers.get("accept", ""):
            return _stream_tokens(service, body, remaining_s)
        service.start(body, remaining_s)
        return await _answer(service, request, body.request_id, None)

    @router.post(
        "/generate/batch",
        response_class=ItemStream,
        status_code=200,  # FastAPI cannot read it from the signature of an ItemStream
        responses=_BATCH,
        openapi_extra=_DEADLINE,
    )
    async def batch(body: BatchRequest, request: Request) -> ItemStream:
        """Many requests at once; each reply or error as it comes, one JSON line or msgpack object.

        Each request behaves as if it had been sent alone: the same ids, retries and limits. Only a
        body that does not match the schema is refused as a whole.
        """
        limit_s = _remaining_s(request)
        jobs = (_finish(service, index, one, limit_s) for index, one in enumerate(body.requests))
        return ItemStream(jobs, media_type_of(request.headers.get("accept")))

    @router.get("/generate/{request_id}", response_model=GenerateResponse, responses=_RUNNING)
    async def attach(
        request: Request, request_id: Annotated[RequestId, Path()], wait_s: _WaitS = 0.0
    ) -> Response:
        """The reply of a request sent before, or 202 if it is still running after `wait_s`."""
        return await _answer(service, request, request_id, wait_s)

    @router.delete("/generate/{request_id}", response_model=ForgetReply)
    async def forget(request: Request, request_id: Annotated[RequestId, Path()]) -> Response:
        """Cancel a running request, or drop its stored reply. The id is free afterwards."""
        state = service.ledger.forget(request_id)
        return reply(request, ForgetReply(request_id=request_id, state=state))

    return router


async def _answer(
    service: RolloutService, request: Request, request_id: str, wait_s: float | None
) -> Response:
    """The reply of a run; 202 if it is still running after `wait_s` (None: no limit)."""
    response = await while_connected(request, service.ledger.attach(request_id, wait_s))
    if response is None:
        return reply(request, RunningReply(request_id=request_id), status=202)
    result = reply(request, response)
    # The version serving now, and not when the reply was made: by this a client notices a server
    # that missed an update.
    result.headers[VERSION_HEADER] = str(service.versions.current.number)
    return result


def _remaining_s(request: Request) -> float | None:
    """Seconds until the absolute deadline in the caller's header; None without one.

    Raises:
        ApiError: 422 when it is not a time, 504 when it has passed.
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


def _stream_tokens(
    service: RolloutService, request: GenerateRequest, limit_s: float | None
) -> StreamingResponse:
    queue: asyncio.Queue[TokensEvent] = asyncio.Queue()

    def sink(index: int, token_ids: list[int], logprobs: list[float]) -> None:
        queue.put_nowait(TokensEvent(index=index, token_ids=token_ids, logprobs=logprobs))

    # Before the response starts, so that a refusal has its status; what fails later is an event.
    service.start(request, limit_s, sink)
    return StreamingResponse(_events(service, request.request_id, queue), media_type=EVENT_STREAM)


async def _events(
    service: RolloutService, request_id: str, queue: asyncio.Queue[TokensEvent]
) -> AsyncIterator[bytes]:
    result = asyncio.ensure_future(service.ledger.attach(request_id))
    try:
        # The run may end with tokens still queued; they are sent before the last event.
        while not result.done() or not queue.empty():
            token = asyncio.ensure_future(queue.get())
            await asyncio.wait({token, result}, return_when=asyncio.FIRST_COMPLETED)
            if token.done():
                yield _event("tokens", token.result())
            else:
                token.cancel()
        yield _last_event(result)
    finally:
        result.cancel()


def _last_event(result: asyncio.Future[GenerateResponse | None]) -> bytes:
    try:
        response = result.result()
    except _EXPECTED as error:
        body = error_response(to_api_error(error, ERRORS)).body
        return b"event: error\ndata: " + bytes(body) + b"\n\n"
    assert response is not None, "attach without a time limit waits for the reply"
    return _event("done", response)


def _event(name: str, model: BaseModel) -> bytes:
    return f"event: {name}\ndata: {model.model_dump_json()}\n\n".encode()


async def _finish(
    service: RolloutService, index: int, request: GenerateRequest, limit_s: float | None
) -> BatchItem:
    """One request of a batch: its reply or its error."""
    request_id = request.request_id
    try:
        service.start(request, limit_s)
        response = await service.ledger.attach(request_id)
        return BatchItem(index=index, request_id=request_id, status=200, response=response)
    except Exception as error:
        if not isinstance(error, _EXPECTED):
            logger.exception("request of a batch failed", extra={"generate_id": request_id})
        seen = to_api_error(error, ERRORS)
        failure = ItemError(code=seen.code, message=seen.message, fix=seen.fix, field=seen.field)
        return BatchItem(index=index, request_id=request_id, status=seen.status_code, error=failure)
