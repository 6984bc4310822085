"""Two plain ASGI layers around every service: request identity and a body size limit.

They are plain ASGI (no BaseHTTPMiddleware) because that class adds a task and a queue to each
request and hides client disconnects from the handler.
"""

import logging
import time
from collections.abc import Mapping
from types import MappingProxyType

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.errors import ApiError, error_response, internal_error
from services.common.logging import enter_request

logger = logging.getLogger(__name__)

_PROBES = frozenset({"/livez", "/readyz", "/metrics"})


class RequestContext:
    """Give each request an id, echo it and the trace, log one line, answer 500 to a bug of ours."""

    def __init__(self, app: ASGIApp, *, headers: Mapping[str, str]) -> None:
        self._app = app
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        echoed = Headers({**enter_request(Headers(scope=scope)), **self._headers}).raw
        started_s = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *echoed]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request failed", extra={"path": scope["path"]})
            # A reply that has begun cannot become a 500 any more; the client sees it cut short.
            if status == 0:
                await error_response(internal_error())(scope, receive, send_with_id)
        # Probes come every few seconds and would fill the log.
        level = logging.DEBUG if scope["path"] in _PROBES else logging.INFO
        if logger.isEnabledFor(level):
            fields = {
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "elapsed_ms": round((time.perf_counter() - started_s) * 1e3, 2),
            }
            logger.log(level, "request", extra=fields)


class BodyLimit:
    """Refuse a body above `max_bytes` with 413, whether or not Content-Length is right.

    Paths that start with a prefix in `exempt` stream bodies of any length and guard themselves.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, exempt: tuple[str, ...] = ()) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._exempt = exempt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (self._exempt and scope["path"].startswith(self._exempt)):
            await self._app(scope, receive, send)
            return
        # A declared length is refused before a byte is read; a chunked body has none to check.
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        seen_bytes = 0

        async def limited_receive() -> Message:
            nonlocal seen_bytes
            message = await receive()
            if message["type"] == "http.request":
                seen_bytes += len(message.get("body", b""))
                if seen_bytes > self._max_bytes:
                    raise self._too_large()
            return message

        await self._app(scope, limited_receive, send)

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            "body_too_large",
            f"The request body is larger than this service accepts ({self._max_bytes} bytes).",
            fix="Send less per request, or start the service with a larger --max-body-bytes.",
            field="body",
        )


def install_middleware(
    app: FastAPI,
    *,
    max_body_bytes: int,
    body_limit_exempt: tuple[str, ...] = (),
    headers: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Wrap `app` in both layers; every reply carries `headers`."""
    # The layer added last is the outer one, so a refused body has a request id and a log line too.
    app.add_middleware(BodyLimit, max_bytes=max_body_bytes, exempt=body_limit_exempt)
    app.add_middleware(RequestContext, headers=headers)
