"""A generate reply as server-sent events.

    event: tokens   data: {"index": 0, "token_ids": [...], "logprobs": [...]}     as they are drawn
    event: done     data: the whole reply, as without streaming                   last
    event: error    data: the error body                                          last, instead

The run belongs to the ledger as any other: a stream that breaks can be picked up by id. One that
attaches to a running or finished request gets `done` only.
"""

import asyncio
from collections.abc import AsyncIterator

from pydantic import BaseModel
from starlette.responses import StreamingResponse

from services.common.errors import ApiError, error_response
from services.rollout.service import RolloutService
from services.rollout.wire.schemas import GenerateRequest, GenerateResponse, TokensEvent

EVENT_STREAM = "text/event-stream"


def stream_events(
    service: RolloutService, request: GenerateRequest, deadline_s: float | None
) -> StreamingResponse:
    """Start or attach to a run and stream it.

    Raises:
        ApiError: as `RolloutService.start`; what fails later becomes an `error` event.
    """
    queue: asyncio.Queue[TokensEvent] = asyncio.Queue()

    def sink(index: int, token_ids: list[int], logprobs: list[float]) -> None:
        queue.put_nowait(TokensEvent(index=index, token_ids=token_ids, logprobs=logprobs))

    service.start(request, deadline_s, sink)
    return StreamingResponse(_events(service, request.request_id, queue), media_type=EVENT_STREAM)


async def _events(
    service: RolloutService, request_id: str, queue: asyncio.Queue[TokensEvent]
) -> AsyncIterator[bytes]:
    result = asyncio.ensure_future(service.ledger.attach(request_id))
    try:
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
    except ApiError as error:
        body = error_response(error).body
        return b"event: error\ndata: " + bytes(body) + b"\n\n"
    assert response is not None, "attach without a time limit waits for the reply"
    return _event("done", response)


def _event(name: str, model: BaseModel) -> bytes:
    return f"event: {name}\ndata: {model.model_dump_json()}\n\n".encode()
