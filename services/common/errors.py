"""Every error leaves a service as one JSON shape, and never as a traceback.

    {"error": {"code": "...", "message": "...", "fix": "...", "field": "..." | null,
               "request_id": "..."}}

`code` is stable and for programs, `message` says the cause, `fix` says what to do, `field` names
the part of the request that is wrong (dots for nesting), or is null when no field is to blame. If
several fields are wrong, `field` is the first and `fix` names all of them.

The core of a service raises exceptions of its own. One table per service, its `errors.py`, says
what a caller sees of each: `install_error_handlers(app, table)`.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Match

from services.common.logging import current_request_id

logger = logging.getLogger(__name__)

_MAX_NAMED = 20
"""Wrong fields that an error names; a list of token ids may be wrong in every place."""


class ConfigError(ValueError):
    """The service cannot start as configured; the message says cause and fix. Exit code 2."""


class ClientGone(Exception):
    """The caller closed the connection before the reply."""


class ApiError(HTTPException):
    """An error that the caller can act on, in the terms of HTTP; routes raise it, cores do not.

    A subclass of Starlette's HTTPException so that it passes through FastAPI's body parsing
    unchanged instead of turning into a generic 400.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        fix: str,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status_code=status, detail=message, headers=dict(headers or {}))
        self.code = code
        self.message = message
        self.fix = fix
        self.field = field

    def __str__(self) -> str:
        return f"{self.code}: {self.message} Fix: {self.fix}"


@dataclass(frozen=True, slots=True)
class ErrorSpec:
    """What a caller sees of one class of the core's exceptions.

    All texts may use `{error}`, the message of the exception, and `{error.name}`, an attribute.
    """

    status: int
    code: str
    fix: str
    message: str = "{error}."
    field: str | None = None
    retry_after_s: str | None = None
    """Seconds for the Retry-After header, rounded up to at least 1."""

    def fill(self, error: Exception) -> ApiError:
        """The answer to `error`."""
        after = "" if self.retry_after_s is None else self.retry_after_s.format(error=error)
        return ApiError(
            self.status,
            self.code.format(error=error),
            self.message.format(error=error),
            fix=self.fix.format(error=error),
            field=None if self.field is None else self.field.format(error=error),
            headers={"Retry-After": str(max(1, math.ceil(float(after))))} if after else None,
        )


ErrorTable = Mapping[type[Exception], ErrorSpec | Callable[[Any], ErrorSpec]]
"""Exception class to its answer. Where one class has several, a function of the error chooses."""

_SHARED: ErrorTable = {
    # nginx's status for a client that closed the connection; nobody reads it but the log.
    ClientGone: ErrorSpec(499, "client_closed", message="The client hung up.", fix="None."),
}


class ErrorDetail(BaseModel):
    """What went wrong with a request."""

    code: str
    message: str
    fix: str
    field: str | None
    request_id: str


class ErrorBody(BaseModel):
    """The body of every reply with status 400 or above."""

    error: ErrorDetail


def to_api_error(error: Exception, table: ErrorTable) -> ApiError:
    """What the caller sees of `error`: itself, its entry in `table`, or an internal error."""
    if isinstance(error, ApiError):
        return error
    entries = {**_SHARED, **table}
    for kind in type(error).__mro__:  # the entry of the nearest base class, as Starlette chooses
        entry = entries.get(kind)
        if entry is not None:
            spec = entry if isinstance(entry, ErrorSpec) else entry(error)
            return spec.fill(error)
    return internal_error()


def internal_error() -> ApiError:
    """The reply to a bug of ours; the traceback stays in the log under the same request id."""
    return ApiError(
        500,
        "internal_error",
        "The service failed while handling this request.",
        fix="Report the request_id to the operator; the log has the details.",
    )


def error_response(error: ApiError) -> JSONResponse:
    """Build the one error shape, with the id of the current request in it."""
    detail = ErrorDetail(
        code=error.code,
        message=error.message,
        fix=error.fix,
        field=error.field,
        request_id=current_request_id(),
    )
    body = ErrorBody(error=detail).model_dump()
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


def install_error_handlers(app: FastAPI, table: ErrorTable) -> None:
    """Make every error of `app` leave in the one shape of this module.

    Args:
        table: what a caller sees of the exceptions of the service's core.
    """

    async def answer(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):
            return error_response(_of_validation_error(request, error))
        if isinstance(error, HTTPException) and not isinstance(error, ApiError):
            return error_response(_of_http_error(request, error))
        return error_response(to_api_error(error, table))

    answered: list[type[Exception]] = [RequestValidationError, HTTPException, *_SHARED, *table]
    for kind in answered:
        app.add_exception_handler(kind, answer)


def field_name(location: Sequence[str | int]) -> str:
    """`("body", "sampling", "top_p")` -> `"sampling.top_p"`; a bare place stays as it is."""
    parts = [str(part) for part in location if part != "[key]"]
    if len(parts) > 1 and parts[0] in {"body", "query", "path", "header"}:
        parts = parts[1:]
    return ".".join(parts) or "body"


def _of_validation_error(request: Request, error: RequestValidationError) -> ApiError:
    problems: Sequence[Any] = error.errors()
    given = request.headers.get("content-type", "")
    # Without a JSON type FastAPI hands the raw bytes to the model, which complains about those.
    if isinstance(error.body, bytes) and "json" not in given and "msgpack" not in given:
        return ApiError(
            422,
            "wrong_content_type",
            f"The body came as {given or 'no Content-Type'}, which is not read.",
            fix="Send 'Content-Type: application/json'.",
            field="Content-Type",
        )
    if problems[0]["type"] == "json_invalid":
        return ApiError(
            422,
            "invalid_json",
            f"The body is not JSON: {problems[0]['ctx']['error']} at character "
            f"{problems[0]['loc'][-1]}.",
            fix="Send one JSON object.",
            field="body",
        )
    fields = [field_name(problem["loc"]) for problem in problems]
    causes = [f"{name}: {p['msg']}" for name, p in zip(fields, problems, strict=True)]
    return ApiError(
        422,
        "invalid_request",
        f"The request does not match the schema: {_listed(causes, '; ')}.",
        fix=f"Correct {_listed(fields, ', ')}; the schema is served at /openapi.json.",
        field=fields[0],
    )


def _listed(items: Sequence[str], separator: str) -> str:
    num_more = len(items) - _MAX_NAMED
    more = [f"and {num_more} more"] if num_more > 0 else []
    return separator.join([*items[:_MAX_NAMED], *more])


_HTTP_FIXES = {
    404: ("not_found", "Check the path against /openapi.json."),
    405: ("method_not_allowed", "Use a method listed in the Allow header."),
    400: ("malformed_request", "Send a body that parses as the Content-Type says."),
}


def _of_http_error(request: Request, error: HTTPException) -> ApiError:
    code, fix = _HTTP_FIXES.get(error.status_code, ("http_error", "See /openapi.json."))
    return ApiError(
        error.status_code,
        code,
        str(error.detail),
        fix=fix,
        field="body" if error.status_code == 400 else None,
        headers={"Allow": _methods(request)} if error.status_code == 405 else error.headers,
    )


def _methods(request: Request) -> str:
    """All methods of a path; Starlette names those of the first route that has it."""
    methods: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= getattr(route, "methods", None) or set()
    return ", ".join(sorted(methods))
