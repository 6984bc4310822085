"""Three plain ASGI layers around every service, outermost first.

RequestContext   request identity, one log line, 500 for a bug of ours
KeyGate          the bearer key, before a byte of the body is read
BodyLimit        size and time of a body

They are plain ASGI (no BaseHTTPMiddleware) because that class adds a task and a queue to each
request and hides client disconnects from the handler.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common.connections import authenticate_connection
from services.common.errors import ApiError, error_response, internal_error
from services.common.logging import enter_request
from services.common.routes import check_key

logger = logging.getLogger(__name__)

BODY_WITHIN_S = 60.0
"""Seconds in which a body has to arrive."""
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


class KeyGate:
    """Let only callers with one of the `accepted` bearer keys reach any route but the probes.

    Without accepted keys every caller passes. Routes that ask for one certain key check it
    themselves.
    """

    def __init__(self, app: ASGIApp, *, accepted: Sequence[str]) -> None:
        self._app = app
        self._accepted = accepted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _PROBES:
            if self._accepted:
                try:
                    check_key(scope, self._accepted)
                except ApiError as error:
                    await error_response(error)(scope, receive, send)
                    return
            authenticate_connection(scope)
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuse a body above `max_bytes` with 413, whether or not Content-Length is right.

    A body that takes longer than `within_s` is a 408. Paths that start with a prefix in `exempt`
    stream bodies of any length and guard themselves; for them `within_s` is the longest pause.
    """

    def __init__(
        self, app: ASGIApp, *, max_bytes: int, within_s: float, exempt: tuple[str, ...] = ()
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._within_s = within_s
        self._exempt = exempt

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        streams = bool(self._exempt) and scope["path"].startswith(self._exempt)
        # A declared length is refused before a byte is read; a chunked body has none to check.
        declared = Headers(scope=scope).get("content-length", "")
        if not streams and declared.isdigit() and int(declared) > self._max_bytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._within_s
        seen_bytes = 0
        complete = False

        async def limited_receive() -> Message:
            nonlocal seen_bytes, complete
            if complete:  # what comes now is the end of the connection, for which no limit holds
                return await receive()
            try:
                async with asyncio.timeout_at(
                    loop.time() + self._within_s if streams else deadline_s
                ):
                    message = await receive()
            except TimeoutError:
                raise self._too_slow() from None
            if message["type"] == "http.request":
                complete = not message.get("more_body", False)
                seen_bytes += len(message.get("body", b""))
                if not streams and seen_bytes > self._max_bytes:
                    raise self._too_large()
            return message

        await self._app(scope, limited_receive, send)

    def _too_slow(self) -> ApiError:
        return ApiError(
            408,
            "body_too_slow",
            f"The request body did not arrive within {self._within_s:g} s.",
            fix="Send the body at once, and check the connection.",
            field="body",
        )

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
    keys: Sequence[str],
    max_body_bytes: int,
    body_within_s: float = BODY_WITHIN_S,
    body_limit_exempt: tuple[str, ...] = (),
    headers: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Wrap `app` in all layers.

    Args:
        keys: bearer keys, one of which every route but the probes requires; none for an open app.
        headers: what every reply carries.
    """
    # The layer added last is the outer one, so what is refused has a request id and a log line too.
    app.add_middleware(
        BodyLimit, max_bytes=max_body_bytes, within_s=body_within_s, exempt=body_limit_exempt
    )
    app.add_middleware(KeyGate, accepted=keys)
    app.add_middleware(RequestContext, headers=headers)
