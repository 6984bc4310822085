"""JSON and msgpack for the same pydantic models; float32 survives both bit for bit.

JSON carries a float32 as the decimal of the equal float64, which parses back to the same float32.
msgpack carries a list of numbers as one little-endian block: extension 1 holds float32, extension 2
int32. A list nested deeper, or one that does not fit, stays an ordinary msgpack array.
"""

import array
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import msgpack
import orjson
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response

from services.common.errors import ApiError

JSON_TYPE = "application/json"
MSGPACK_TYPE = "application/msgpack"

_FLOAT32_CODE = 1
_INT32_CODE = 2
_TYPECODES = {_FLOAT32_CODE: "f", _INT32_CODE: "i"}
_BIG_ENDIAN = sys.byteorder == "big"

FLOAT32_FIELDS = frozenset({"logprobs"})
INT32_FIELDS = frozenset({"token_ids"})


def _pack_array(code: int, values: list[Any]) -> msgpack.ExtType:
    block = array.array(_TYPECODES[code], values)
    if _BIG_ENDIAN:
        block.byteswap()
    return msgpack.ExtType(code, block.tobytes())


def _unpack_array(code: int, data: bytes) -> object:
    typecode = _TYPECODES.get(code)
    if typecode is None:
        raise ValueError(f"unknown msgpack extension {code}")
    block = array.array(typecode)
    block.frombytes(data)
    if _BIG_ENDIAN:
        block.byteswap()
    return block.tolist()


def _compact(value: Any) -> Any:
    """Replace the number lists of known fields by blocks, in a tree fresh from `model_dump`."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in FLOAT32_FIELDS and isinstance(item, list):
                value[key] = _pack_array(_FLOAT32_CODE, item)
            elif key in INT32_FIELDS and isinstance(item, list):
                value[key] = _pack_array(_INT32_CODE, item)
            elif isinstance(item, dict | list):
                _compact(item)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for item in value:
            _compact(item)
    return value


def encode(model: BaseModel, media_type: str) -> bytes:
    """Serialise `model` as `media_type` (JSON_TYPE or MSGPACK_TYPE)."""
    if media_type == MSGPACK_TYPE:
        packed: bytes = msgpack.packb(_compact(model.model_dump()))
        return packed
    return model.model_dump_json().encode()


def decode(body: bytes, media_type: str) -> Any:
    """Parse `body` into plain Python values.

    Raises:
        ValueError: the body is not valid `media_type`.
    """
    if media_type == MSGPACK_TYPE:
        try:
            return msgpack.unpackb(body, ext_hook=_unpack_array, strict_map_key=True)
        except (msgpack.UnpackException, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"not valid msgpack: {error or type(error).__name__}") from error
    return orjson.loads(body)


def media_type_of(header: str | None) -> str:
    """The media type named by a Content-Type or Accept header; JSON when it names no msgpack."""
    return MSGPACK_TYPE if header is not None and MSGPACK_TYPE in header.lower() else JSON_TYPE


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
    """A route that accepts JSON and msgpack bodies alike; set as `route_class` of a router."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def wire_handler(request: Request) -> Response:
            return await handler(_WireRequest(request.scope, request.receive))

        return wire_handler
