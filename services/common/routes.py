"""What routes of both services are made of.

KeyGuard, KeyedApp   bearer keys, checked before a body is read
WireRoute, reply     JSON and msgpack alike, in both directions
while_connected      work that stops when nobody is there to receive its result
answer_patiently     the same, for clients with a read timeout that is shorter than the work
ItemStream           many results in one reply, each as soon as it is ready
BoundedItemStream    the same, with a limit on results that nobody has read
"""

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from services.common.errors import ApiError, ClientGone
from services.common.json_body import check_containers
from services.common.wire import JSON_TYPE, MSGPACK_TYPE, NDJSON_TYPE, decode, encode, media_type_of

Result = TypeVar("Result")

_BLANK_EVERY_S = 5.0


def check_key(scope: Scope, accepted: Sequence[str]) -> None:
    """Let a request pass only with one of the bearer keys.

    Raises:
        ApiError: 401.
    """
    scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
    # Every key is compared in full, so the time that this takes tells nothing about any of them.
    matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in accepted]
    if scheme.lower() != "bearer" or not any(matches):
        raise ApiError(
            401,
            "unauthorized",
            "The bearer key is missing or wrong.",
            fix="Send 'Authorization: Bearer <key>' with the key given at start; control routes of "
            "a rollout service take its admin key only.",
            field="Authorization",
            headers={"WWW-Authenticate": "Bearer"},
        )


class KeyGuard(HTTPBearer):
    """A FastAPI dependency that answers 401 without one of the `accepted` bearer keys.

    A WireRoute checks it before the body is read.
    """

    def __init__(self, *accepted: str) -> None:
        super().__init__()
        self.scheme_name = HTTPBearer.__name__  # one scheme in the OpenAPI document, not one a key
        self.accepted = accepted

    # A coroutine function: FastAPI runs a plain one in a thread, which costs more than the request.
    async def __call__(self, request: Request) -> None:
        check_key(request.scope, self.accepted)


class KeyedApp:
    """An ASGI app that is reached only with one of the `accepted` bearer keys."""

    def __init__(self, app: ASGIApp, *accepted: str) -> None:
        self._app = app
        self._accepted = accepted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        check_key(scope, self._accepted)
        await self._app(scope, receive, send)


def reply(request: Request, model: BaseModel, *, status: int = 200) -> Response:
    """Answer in the form the caller's Accept header asks for."""
    media_type = media_type_of(request.headers.get("accept"))
    return Response(encode(model, media_type), status_code=status, media_type=media_type)


class _WireRequest(Request):
    """A request whose msgpack body FastAPI sees as JSON, and whose JSON is parsed by orjson."""

    def __init__(self, scope: Any, receive: Any) -> None:
        self._wire_type = media_type_of(Headers(scope=scope).get("content-type"))
        if self._wire_type == MSGPACK_TYPE:
            # FastAPI calls json() only for a body that is declared as JSON.
            kept = [(k, v) for k, v in scope["headers"] if k != b"content-type"]
            scope = {**scope, "headers": [*kept, (b"content-type", JSON_TYPE.encode())]}
        super().__init__(scope, receive)

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            if self._wire_type == JSON_TYPE:
                check_containers(body)
            try:
                self._json = decode(body, self._wire_type)
            except ValueError as error:
                raise ApiError(
                    422,
                    "malformed_body",
                    f"The body does not parse: {error}.",
                    fix=f"Send a body that is valid {self._wire_type}.",
                    field="body",
                ) from error
        return self._json


class WireRoute(APIRoute):
    """A route that accepts JSON and msgpack bodies alike; set as `route_class` of a router.

    Keys are checked first: FastAPI alone would read and parse the body of an unauthorized caller.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        whole = self.dependant
        guards = [d.call for d in whole.dependencies if isinstance(d.call, KeyGuard)]
        rest = [d for d in whole.dependencies if not isinstance(d.call, KeyGuard)]
        # The handler is built without the guards, which have run before it.
        self.dependant = replace(whole, dependencies=rest)
        handler = super().get_route_handler()
        self.dependant = whole  # what the OpenAPI document is made from

        async def wire_handler(request: Request) -> Response:
            for guard in guards:
                check_key(request.scope, guard.accepted)
            return await handler(_WireRequest(request.scope, request.receive))

        return wire_handler


def document_msgpack(app: FastAPI) -> None:
    """List msgpack beside JSON in the OpenAPI document, wherever a WireRoute speaks both."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for route in app.routes:
            if isinstance(route, WireRoute) and route.include_in_schema:
                for method in route.methods:
                    _add_msgpack(document["paths"][route.path_format][method.lower()])
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _add_msgpack(operation: dict[str, Any]) -> None:
    """Errors stay JSON: a caller that cannot parse msgpack has to be able to read them."""
    replies = [reply for status, reply in operation["responses"].items() if status.startswith("2")]
    for body in [operation.get("requestBody", {}), *replies]:
        content = body.get("content", {})
        for media_type in (JSON_TYPE, NDJSON_TYPE):
            if media_type in content:
                content[MSGPACK_TYPE] = content[media_type]


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Await `work`, or cancel it when the client disconnects. Call after the body was read.

    Raises:
        ClientGone: the client disconnected; `work` has been cancelled.
    """
    job = asyncio.ensure_future(work)
    try:
        await _wait_while_connected(request, job)
        return job.result()
    finally:
        # Also reached when this coroutine is cancelled itself, for example at the end of drain_s.
        job.cancel()


async def answer_patiently(
    request: Request,
    work: Coroutine[Any, Any, BaseModel],
    *,
    after_s: float,
    failed: Callable[[Exception], BaseModel],
) -> BaseModel | Response:
    """Await `work` as `while_connected` does; keep the client waiting if that takes long.

    The read timeout of a client counts from the last byte. So after `after_s` the reply begins, and
    it has a blank, which JSON allows before a value, every few seconds until `work` is done.

    Args:
        failed: makes the reply of an error that comes too late for a status of its own.

    Raises:
        ClientGone: the client disconnected within `after_s`; `work` has been cancelled.
    """
    job = asyncio.ensure_future(work)
    try:
        async with asyncio.timeout(after_s):
            await _wait_while_connected(request, job)
    except TimeoutError:
        return StreamingResponse(_blanks_until(job, failed), media_type=JSON_TYPE)
    except BaseException:
        job.cancel()
        raise
    return job.result()


async def _blanks_until(
    job: asyncio.Future[BaseModel], failed: Callable[[Exception], BaseModel]
) -> AsyncIterator[bytes]:
    try:
        while not job.done():
            yield b" "
            await asyncio.wait({job}, timeout=_BLANK_EVERY_S)
        try:
            result = job.result()
        except Exception as error:
            result = failed(error)
        yield encode(result, JSON_TYPE)
    finally:
        job.cancel()


async def _wait_while_connected(request: Request, job: asyncio.Future[Any]) -> None:
    """Wait until `job` is done. Raises ClientGone."""
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done():
            raise ClientGone
    finally:
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class ItemStream(StreamingResponse):
    """Runs jobs side by side and sends each result when it is ready, in the order they finish.

    When the caller goes away, every job that still runs is cancelled.

    Args:
        jobs: coroutines that catch their own errors; read when the reply starts.
        accept: MSGPACK_TYPE for one msgpack object after the other; otherwise JSON lines.
    """

    media_type = NDJSON_TYPE

    def __init__(
        self, jobs: Iterable[Coroutine[Any, Any, BaseModel]], accept: str = JSON_TYPE
    ) -> None:
        media_type = MSGPACK_TYPE if accept == MSGPACK_TYPE else None
        super().__init__(_items(jobs, accept), media_type=media_type)


async def _items(
    jobs: Iterable[Coroutine[Any, Any, BaseModel]], media_type: str
) -> AsyncIterator[bytes]:
    end = b"" if media_type == MSGPACK_TYPE else b"\n"
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        for finished in asyncio.as_completed(tasks):
            yield encode(await finished, media_type) + end
    finally:
        for task in tasks:
            task.cancel()
        # Cancelled jobs still clean up; the reply ends after them, with their slots free again.
        await asyncio.gather(*tasks, return_exceptions=True)


Job = tuple[int, Callable[[], Coroutine[Any, Any, BaseModel]]]
"""Largest size of a result in bytes, and what makes it."""


class SendBudget:
    """Bytes of results that callers have not read yet, over all replies of a service.

    Args:
        limit_bytes: largest sum; a result that is larger on its own waits until nothing is held.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._waiters: list[asyncio.Future[None]] = []
        self.held_bytes = 0

    async def reserve(self, size_bytes: int) -> None:
        """Wait until `size_bytes` more fit."""
        while self.held_bytes and self.held_bytes + size_bytes > self._limit_bytes:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        self.held_bytes += size_bytes

    def release(self, size_bytes: int) -> None:
        """Give back what was reserved."""
        self.held_bytes -= size_bytes
        for waiter in self._waiters:
            if not waiter.done():  # it is when its reply was cancelled
                waiter.set_result(None)
        self._waiters.clear()


class BoundedItemStream(StreamingResponse):
    """Like an ItemStream of JSON lines, but what its caller has not read holds up what follows.

    Args:
        jobs: started in this order, each when its result fits; they catch their own errors.
        window: results that are made or wait to be read at a time.
        budget: bytes of such results, over all streams.
    """

    media_type = NDJSON_TYPE

    def __init__(self, jobs: Sequence[Job], *, window: int, budget: SendBudget) -> None:
        super().__init__(_bounded_items(jobs, window, budget))


async def _bounded_items(
    jobs: Sequence[Job], window: int, budget: SendBudget
) -> AsyncIterator[bytes]:
    ready: asyncio.Queue[tuple[bytes | Exception, asyncio.Event]] = asyncio.Queue()
    left = iter(jobs)

    async def work() -> None:
        for size_bytes, job in left:
            await budget.reserve(size_bytes)
            sent = asyncio.Event()
            try:
                ready.put_nowait((await _line(job), sent))
                await sent.wait()
            finally:
                budget.release(size_bytes)

    workers = [asyncio.ensure_future(work()) for _ in range(min(window, len(jobs)))]
    try:
        for _ in jobs:
            line, sent = await ready.get()
            if isinstance(line, Exception):
                raise line
            yield line
            sent.set()
    finally:
        for worker in workers:
            worker.cancel()
        # Cancelled jobs still clean up; the reply ends after them, with their slots free again.
        await asyncio.gather(*workers, return_exceptions=True)


async def _line(job: Callable[[], Coroutine[Any, Any, BaseModel]]) -> bytes | Exception:
    try:
        return encode(await job(), JSON_TYPE) + b"\n"
    except Exception as error:  # raised where the reply is made, which ends it
        return error
