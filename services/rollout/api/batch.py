"""Many generate requests in one call, answered in the order in which they finish.

The ledger owns the runs, as it does those of single requests: a stream that breaks is picked up by
sending the batch, or any of its requests, again.
"""

import asyncio
import logging
from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse

from services.common.errors import ApiError
from services.common.wire import MSGPACK_TYPE, NDJSON_TYPE, encode
from services.rollout.service import RolloutService
from services.rollout.wire.schemas import BatchItem, BatchRequest, GenerateRequest, ItemError

logger = logging.getLogger(__name__)


class ItemStream(StreamingResponse):
    """BatchItems, one JSON line each; or msgpack objects one after the other."""

    media_type = NDJSON_TYPE


def stream_batch(
    service: RolloutService, batch: BatchRequest, limit_s: float | None, media_type: str
) -> ItemStream:
    """Start all requests of a batch and stream their BatchItems.

    Args:
        limit_s: seconds from now, for each request; the tighter of this and its own holds.
        media_type: MSGPACK_TYPE for msgpack objects one after the other, otherwise JSON lines.
    """
    is_msgpack = media_type == MSGPACK_TYPE
    end = b"" if is_msgpack else b"\n"

    async def items() -> AsyncIterator[bytes]:
        tasks = [
            asyncio.create_task(_finish(service, index, request, limit_s))
            for index, request in enumerate(batch.requests)
        ]
        try:
            for finished in asyncio.as_completed(tasks):
                yield encode(await finished, media_type) + end
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    return ItemStream(items(), media_type=MSGPACK_TYPE if is_msgpack else None)


async def _finish(
    service: RolloutService, index: int, request: GenerateRequest, limit_s: float | None
) -> BatchItem:
    """One request to its end, whatever the end."""
    request_id = request.request_id
    try:
        service.start(request, limit_s)
        response = await service.ledger.attach(request_id)
        return BatchItem(index=index, request_id=request_id, status=200, response=response)
    except ApiError as error:
        failure = error
    except Exception:
        logger.exception("request of a batch failed", extra={"generate_id": request_id})
        failure = ApiError(
            500,
            "internal_error",
            "The service failed while handling this request.",
            fix="Report it to the operator; the log has the details.",
        )
    return BatchItem(
        index=index,
        request_id=request_id,
        status=failure.status_code,
        error=ItemError(
            code=failure.code, message=failure.message, fix=failure.fix, field=failure.field
        ),
    )
