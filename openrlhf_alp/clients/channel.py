"""HTTP to one server: keys, time limits, both wire formats, trace headers, typed replies.

Every call carries a W3C `traceparent` header. Inside an OpenTelemetry span of the caller, the calls
belong to that span. Elsewhere each asyncio task starts a trace with its first call. An episode runs
as one task, so its turns and its code share one trace, whichever servers they went to.
"""

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, TypeVar

import httpx
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pydantic import BaseModel

from openrlhf_alp.clients.errors import (
    IncompleteReply,
    InvalidReply,
    ServiceUnavailable,
    error_of,
)
from services.common.wire import JSON_TYPE, MSGPACK_TYPE, decode, encode, media_type_of

ServiceKind = Literal["rollout", "tool"]
Reply = TypeVar("Reply", bound=BaseModel)

_MEDIA_TYPES: dict[ServiceKind, str] = {"rollout": MSGPACK_TYPE, "tool": JSON_TYPE}
# With the slash after weights: GET /v1/weights itself takes the data key.
_CONTROL_PATHS = ("/v1/weights/", "/v1/pause", "/v1/resume", "/v1/sleep", "/v1/wake_up")

# httpx polls every idle connection on each request; with 256 kept alive this took most of the
# learner's time at 64 concurrent episodes. Opening a new connection costs less.
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=8)

_propagator = TraceContextTextMapPropagator()
_trace_of_this_task: ContextVar[Context | None] = ContextVar("trace_of_this_task", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Time limits in seconds. Every call is bounded by them; none can wait forever."""

    connect_s: float = 5.0
    """To open a connection."""

    read_s: float = 600.0
    """Without a byte from the server; at least the longest generation."""

    total_s: float = 1800.0
    """For one generate call or tool run with all its attempts."""

    control_s: float = 600.0
    """For one prepare, commit or status call."""

    transfer_s: float = 60.0
    """For a group of nccl or ipc to meet, and for each of its buckets. If the learner dies during a
    bucket, the server pauses generation for this long."""

    def httpx(self) -> httpx.Timeout:
        return httpx.Timeout(
            connect=self.connect_s, read=self.read_s, write=self.read_s, pool=self.total_s
        )


class Channel:
    """A pool of connections to one base URL.

    Args:
        url: base URL of the server.
        kind: which service runs there; it decides the wire format of requests.
        api_key: bearer key of the data routes.
        admin_key: bearer key of the control routes; None: the api key is sent.
        timeouts: limits of every call.
        transport: replaces the network, for tests.
    """

    def __init__(
        self,
        url: str,
        *,
        kind: ServiceKind,
        api_key: str,
        admin_key: str | None,
        timeouts: Timeouts,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        self.url = url.rstrip("/")
        self.timeouts = timeouts
        self._kind = kind
        self._media_type = _MEDIA_TYPES[kind]
        self._data_key = api_key
        self._control_key = admin_key or api_key
        self._http = httpx.AsyncClient(
            base_url=self.url,
            timeout=timeouts.httpx(),
            limits=_LIMITS,
            transport=transport,
            headers={"accept": self._media_type},
        )

    async def aclose(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def send(
        self,
        method: str,
        path: str,
        content: bytes | AsyncIterator[bytes] | None = None,
        *,
        give_up_s: float | None = None,
        params: dict[str, int] | None = None,
    ) -> httpx.Response:
        """Make one attempt and return its reply, whatever the status.

        Args:
            content: an encoded model, or the pieces of a file.
            give_up_s: monotonic time after which the attempt counts as failed; None: `control_s`
                from now; infinite: only `read_s` bounds it.
            params: the query of the URL.

        Raises:
            ServiceUnavailable: no reply came.
        """
        key = self._control_key if path.startswith(_CONTROL_PATHS) else self._data_key
        headers = trace_headers()
        if key:
            # Without one no header: an empty key is no legal header, and the service's own error
            # says what is missing.
            headers["authorization"] = f"Bearer {key}"
        if isinstance(content, bytes):
            headers["content-type"] = self._media_type
        limit_s = self.timeouts.control_s
        if give_up_s is not None:
            limit_s = max(0.001, give_up_s - time.monotonic())
        try:
            async with asyncio.timeout(limit_s if math.isfinite(limit_s) else None):
                return await self._http.request(
                    method, path, content=content, params=params, headers=headers
                )
        except (httpx.TransportError, TimeoutError) as error:
            raise ServiceUnavailable(
                f"{self.url} does not answer ({type(error).__name__} {error}). Fix: check that "
                f"the {self._kind} service runs there; its log says why it stopped.",
                # A refused connection leaves no run behind, and a server that has timed out is not
                # worth another wait.
                may_be_running=isinstance(error, httpx.ReadError | httpx.RemoteProtocolError),
            ) from error

    def parse(self, response: httpx.Response, model: type[Reply]) -> Reply:
        """The reply as a model, from JSON or msgpack as its content type says.

        Raises:
            ServiceError: the exception that the status and the error body stand for.
            InvalidReply: the body does not parse.
        """
        if response.status_code >= 400:
            raise error_of(response, self.url)
        try:
            content = decode(response.content, media_type_of(response.headers.get("content-type")))
        except ValueError as error:
            raise IncompleteReply(
                f"The reply of {self.url} was cut short or garbled ({error}). Fix: ask again; if "
                "it happens again, look for a proxy that changes bodies."
            ) from error
        try:
            return model.model_validate(content)
        except ValueError as error:
            raise InvalidReply(
                f"{self.url} sent a reply that does not parse ({error}). Fix: install the same "
                "release of services and learner."
            ) from error

    async def get(self, path: str, model: type[Reply]) -> Reply:
        """GET within `control_s`."""
        return self.parse(await self.send("GET", path), model)

    async def post(
        self,
        path: str,
        body: BaseModel | None,
        model: type[Reply],
        *,
        give_up_s: float | None = None,
    ) -> Reply:
        """POST; `give_up_s` as for `send`."""
        content = None if body is None else encode(body, self._media_type)
        return self.parse(await self.send("POST", path, content, give_up_s=give_up_s), model)


def trace_headers() -> dict[str, str]:
    """The headers that put a call into the current trace; starts one where there is none."""
    headers: dict[str, str] = {}
    _propagator.inject(headers)
    if not headers:
        context = _trace_of_this_task.get() or _new_trace()
        _trace_of_this_task.set(context)
        _propagator.inject(headers, context)
    return headers


def _new_trace() -> Context:
    span = SpanContext(
        trace_id=int.from_bytes(secrets.token_bytes(16)),
        span_id=int.from_bytes(secrets.token_bytes(8)),
        is_remote=False,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )
    return set_span_in_context(NonRecordingSpan(span), Context())
