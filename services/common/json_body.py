"""JSON bodies with limits of depth and of number of values, checked before they are parsed.

A parser holds Python's lock from beginning to end, in a thread too: 16 MB of `[],[],[],...` make
five million lists and stop the event loop for seconds. Therefore the values are counted first, in
a thread that lets the loop run between them, and counting stops at the limit.
"""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from services.common.errors import ApiError

MAX_DEPTH = 64
"""Lists and objects inside each other."""
MAX_CONTAINERS = 200_000
"""Lists and objects in all."""
MAX_VALUES = 400_000
"""Items of lists and objects in all; a batch of 4096 programs has 50,000."""
MAX_ITEMS = 4096
"""Items of one list or object, as many as a batch may have. Without it a body could be wrong in
400,000 places, and to list them all stops the event loop for seconds."""
_INLINE_BYTES = 64 * 1024
"""Bodies up to here are checked and parsed in the event loop, which takes milliseconds."""

_BOM = b"\xef\xbb\xbf"

# A string to its end (or to the end of the body, so that no tail is scanned twice), or one of the
# characters that make values. Possessive: a string is never tried again in a second way.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{},]', re.DOTALL)


async def parse_json(body: bytes) -> Any:
    """Parse a JSON body.

    Raises:
        ApiError: 422 when it has too many values, in all or in one place, or is nested too deep.
        json.JSONDecodeError: it is not JSON.
    """
    if len(body) <= _INLINE_BYTES:
        return _parse(body)
    return await asyncio.to_thread(_parse, body)


def check_containers(body: bytes) -> None:
    """Refuse a JSON body with too many lists and objects; brackets in strings count too.

    Raises:
        ApiError: 422.
    """
    if _num_openers(body) > MAX_CONTAINERS:
        raise _too_complex(f"has more than {MAX_CONTAINERS} lists and objects")


def _parse(body: bytes) -> Any:
    # These counts take no time. They include what stands inside of strings, so a body below the
    # limits by them is below the limits.
    if _num_openers(body) > MAX_DEPTH or body.count(b",") > MAX_VALUES:
        _check(body)
    # Not orjson, which refuses the half surrogate pairs that programs may hold. Decoded here, since
    # the parser would take UTF-16 too, in which other characters contain the byte of a quote.
    value = json.loads(body.removeprefix(_BOM).decode("utf-8", "surrogatepass"))
    if body.count(b",") >= MAX_ITEMS:
        _check_items(value)
    return value


def _num_openers(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


def _check(body: bytes) -> None:
    depth = num_containers = num_values = 0
    for num_tokens, token in enumerate(_TOKEN.finditer(body)):
        first = body[token.start()]
        depth += (first in b"[{") - (first in b"]}")
        num_containers += first in b"[{"
        num_values += first in b","
        if depth > MAX_DEPTH:
            raise _too_complex(f"is nested deeper than {MAX_DEPTH}")
        if num_containers > MAX_CONTAINERS:
            raise _too_complex(f"has more than {MAX_CONTAINERS} lists and objects")
        # In JSON each value has one comma, and two strings at most; this bounds other bodies.
        if num_values > MAX_VALUES or num_tokens > 5 * MAX_VALUES:
            raise _too_complex(f"has more than {MAX_VALUES} values")


def _check_items(value: Any) -> None:
    waiting = [value] if isinstance(value, (dict, list)) else []
    while waiting:
        container = waiting.pop()
        if len(container) > MAX_ITEMS:
            raise _too_complex(f"has a list or object of more than {MAX_ITEMS} items")
        inner = container.values() if isinstance(container, dict) else container
        waiting += [each for each in inner if isinstance(each, (dict, list))]


def _too_complex(cause: str) -> ApiError:
    return ApiError(
        422,
        "body_too_complex",
        f"The JSON body {cause}.",
        fix="Send it in several requests, with flatter values.",
        field="body",
    )


class _JsonRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = await parse_json(await self.body())
        return self._json


class JsonRoute(APIRoute):
    """A route whose JSON body is parsed within limits; set as `route_class` of a router."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def limited_handler(request: Request) -> Response:
            return await handler(_JsonRequest(request.scope, request.receive))

        return limited_handler
