"""Every error leaves a service as one JSON shape, and never as a traceback.

    {"error": {"code": "...", "message": "...", "fix": "...", "field": "..." | null,
               "request_id": "..."}}

`code` is stable and for programs, `message` says the cause, `fix` says what to do, `field` names
the part of the request that is wrong (dots for nesting), or is null when no field is to blame. Of
several wrong fields it is the first; `fix` names all.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request

from services.common.context import current_request_id

logger = logging.getLogger(__name__)

_MAX_NAMED = 20
"""Wrong fields that an error names; a list of token ids may be wrong in every place."""


class ConfigError(ValueError):
    """The service cannot start as configured; the message says cause and fix. Exit code 2."""


class ApiError(HTTPException):
    """An error that the caller can act on.

    A subclass of Starlette's HTTPException so that it passes through FastAPI's body parsing
    unchanged instead of turning into a generic 400.

    Args:
        status: HTTP status, 4xx or 503/504.
        code: stable machine-readable name, snake_case.
        message: the cause, one sentence.
        fix: what the caller should do, one sentence.
        field: dotted name of the wrong request field, or None.
        headers: extra response headers, for example Retry-After.
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


def error_response(
    status: int,
    code: str,
    message: str,
    *,
    fix: str,
    field: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """Build the one error shape, with the id of the current request in it."""
    detail = ErrorDetail(
        code=code, message=message, fix=fix, field=field, request_id=current_request_id()
    )
    body = ErrorBody(error=detail).model_dump()
    return JSONResponse(body, status_code=status, headers=dict(headers or {}))


def field_name(location: Sequence[str | int]) -> str:
    """`("body", "sampling", "top_p")` -> `"sampling.top_p"`; a bare place stays as it is."""
    parts = [str(part) for part in location if part != "[key]"]
    if len(parts) > 1 and parts[0] in {"body", "query", "path", "header"}:
        parts = parts[1:]
    return ".".join(parts) or "body"


async def _on_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error_response(
        error.status_code,
        error.code,
        error.message,
        fix=error.fix,
        field=error.field,
        headers=error.headers,
    )


async def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problems: Sequence[Any] = error.errors()
    given = request.headers.get("content-type", "")
    if isinstance(error.body, bytes) and "json" not in given and "msgpack" not in given:
        return error_response(
            422,
            "wrong_content_type",
            f"The body came as {given or 'no Content-Type'}, which is not read.",
            fix="Send 'Content-Type: application/json'.",
            field="Content-Type",
        )
    if problems[0]["type"] == "json_invalid":
        return error_response(
            422,
            "invalid_json",
            f"The body is not JSON: {problems[0]['ctx']['error']} at character "
            f"{problems[0]['loc'][-1]}.",
            fix="Send one JSON object.",
            field="body",
        )
    fields = [field_name(problem["loc"]) for problem in problems]
    causes = [f"{name}: {p['msg']}" for name, p in zip(fields, problems, strict=True)]
    return error_response(
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


async def _on_http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    code, fix = _HTTP_FIXES.get(error.status_code, ("http_error", "See /openapi.json."))
    return error_response(
        error.status_code,
        code,
        str(error.detail),
        fix=fix,
        field="body" if error.status_code == 400 else None,
        headers=error.headers,
    )


def internal_error_response() -> JSONResponse:
    """The reply to a bug of ours; the traceback stays in the log under the same request id."""
    return error_response(
        500,
        "internal_error",
        "The service failed while handling this request.",
        fix="Report the request_id to the operator; the log has the details.",
    )


def install_error_handlers(app: FastAPI) -> None:
    """Make every error of `app` leave in the one shape of this module."""
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
