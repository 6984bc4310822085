"""Routes that speak JSON and msgpack alike, in both directions."""

from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from services.common.auth import KeyGuard
from services.common.errors import ApiError
from services.common.wire import JSON_TYPE, MSGPACK_TYPE, NDJSON_TYPE, decode, encode, media_type_of


def reply(request: Request, model: BaseModel, *, status: int = 200) -> Response:
    """Answer in the form the caller's Accept header asks for."""
    media_type = media_type_of(request.headers.get("accept"))
    return Response(encode(model, media_type), status_code=status, media_type=media_type)


class _WireRequest(Request):
    """A request whose msgpack body FastAPI sees as JSON, and whose JSON is parsed by orjson."""

    def __init__(self, scope: Any, receive: Any) -> None:
        self._wire_type = media_type_of(Headers(scope=scope).get("content-type"))
        if self._wire_type == MSGPACK_TYPE:
            kept = [(k, v) for k, v in scope["headers"] if k != b"content-type"]
            scope = {**scope, "headers": [*kept, (b"content-type", JSON_TYPE.encode())]}
        super().__init__(scope, receive)

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            try:
                self._json = decode(await self.body(), self._wire_type)
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

    Keys are checked first: FastAPI alone would read and parse a stranger's body before.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        whole = self.dependant
        guards = [d.call for d in whole.dependencies if isinstance(d.call, KeyGuard)]
        rest = [d for d in whole.dependencies if not isinstance(d.call, KeyGuard)]
        self.dependant = replace(whole, dependencies=rest)
        handler = super().get_route_handler()
        self.dependant = whole  # what the OpenAPI document is made from

        async def wire_handler(request: Request) -> Response:
            for guard in guards:
                guard.check(request.scope)
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
