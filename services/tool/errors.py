"""One table from what the service raises to what a caller sees, over REST and MCP alike."""

import math
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response

from services.common.disconnect import ClientGone
from services.common.errors import ApiError
from services.tool.admission import OverloadedError
from services.tool.sandbox.host.session import SessionFileError
from services.tool.service import LimitError
from services.tool.sessions import (
    OPENING_ERRORS,
    SessionGoneError,
    SessionsFullError,
    StepConflictError,
)

_CLIENT_CLOSED = 499

KNOWN: tuple[type[Exception], ...] = (
    OverloadedError, SessionsFullError, LimitError, SessionGoneError, StepConflictError,
    SessionFileError, ClientGone, *OPENING_ERRORS,
)  # fmt: skip
"""Errors that are no fault of the service's code."""


def install(app: FastAPI) -> None:
    """Answer `KNOWN` errors in the one shape of all errors."""
    for kind in KNOWN:
        app.add_exception_handler(kind, _handler(app))


def _handler(app: FastAPI) -> Callable[[Request, Exception], Awaitable[Response]]:
    handle: Any = app.exception_handlers[ApiError]

    async def respond(request: Request, error: Exception) -> Response:
        response: Response = await handle(request, to_api_error(error))
        return response

    return respond


def to_api_error(error: Exception) -> ApiError:
    """What the caller sees of one of `KNOWN`: cause, fix and the field to blame."""
    if isinstance(error, OverloadedError):
        after = str(max(1, math.ceil(error.retry_after_s)))
        fix = "Retry after the given seconds, with a longer deadline_s, or add --slots."
        message = f"The code never ran: {error}."
        return ApiError(503, "overloaded", message, fix=fix, headers={"Retry-After": after})
    if isinstance(error, SessionsFullError):
        fix = "End a session, retry later, or raise --max-sessions."
        return ApiError(503, "sessions_full", f"{error}.", fix=fix, headers={"Retry-After": "1"})
    if isinstance(error, LimitError):
        fix = f"Ask for less, or start the service with a larger {error.flag}."
        return ApiError(422, "rejected", f"{error}.", fix=fix, field=error.field)
    if isinstance(error, SessionGoneError):
        fix = "Open a new session and send its state again."
        if error.known:
            return ApiError(410, "session_expired", f"The session is gone: {error}.", fix=fix)
        return ApiError(404, "session_unknown", f"No such session: {error}.", fix=fix)
    if isinstance(error, StepConflictError):
        fix = "GET the session for the number of the next step."
        return ApiError(409, "step_conflict", f"{error}.", fix=fix, field="step")
    if isinstance(error, SessionFileError):
        return _file_error(error)
    if isinstance(error, ClientGone):
        return ApiError(_CLIENT_CLOSED, "client_closed", "The client hung up.", fix="None.")
    fix = "Retry; if it persists, see /v1/isolation and the log."
    return ApiError(503, "sandbox_error", f"{error}; the code never ran.", fix=fix)


def _file_error(error: SessionFileError) -> ApiError:
    status, code = (404, "file_not_found") if error.missing else (409, "file_refused")
    fix = (
        "Only regular files below the working folder are served (GET .../files lists them). When "
        "no space is left, remove some in a cell."
    )
    return ApiError(status, code, f"{error}.", fix=fix, field="path")
