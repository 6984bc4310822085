"""What a caller sees of each exception of the tool service, over REST and MCP alike."""

from services.common.errors import ErrorSpec, ErrorTable
from services.common.idempotent import RequestCancelledError, RequestConflictError
from services.tool.rules import LimitError, OverloadedError
from services.tool.sandbox.host.session import SessionFileError
from services.tool.sessions import (
    OPENING_ERRORS,
    SessionExpiredError,
    SessionsFullError,
    SessionUnknownError,
    StepConflictError,
)

_FILE_FIX = (
    "Only regular files below the working folder are served (GET .../files lists them). When no "
    "space is left, remove some in a cell."
)
_FILE_MISSING = ErrorSpec(404, "file_not_found", fix=_FILE_FIX, field="path")
_FILE_REFUSED = ErrorSpec(409, "file_refused", fix=_FILE_FIX, field="path")
_SESSION_FIX = "Open a new session and send its state again."
_SANDBOX_FAILED = ErrorSpec(
    503,
    "sandbox_error",
    message="{error}; the code never ran.",
    fix="Retry; if it persists, see /v1/isolation and the log.",
)

ERRORS: ErrorTable = {
    OverloadedError: ErrorSpec(
        429,
        "overloaded",
        message="The code never ran: {error}.",
        fix="Retry after the given seconds, with a longer deadline_s, or add --slots.",
        retry_after_s="{error.retry_after_s}",
    ),
    SessionsFullError: ErrorSpec(
        429,
        "sessions_full",
        fix="End a session, retry later, or raise --max-sessions.",
        retry_after_s="{error.retry_after_s}",
    ),
    LimitError: ErrorSpec(
        422,
        "rejected",
        fix="Ask for less, or start the service with a larger {error.flag}.",
        field="{error.field}",
    ),
    SessionExpiredError: ErrorSpec(
        410, "session_expired", message="The session is gone: {error}.", fix=_SESSION_FIX
    ),
    SessionUnknownError: ErrorSpec(
        404, "session_unknown", message="No such session: {error}.", fix=_SESSION_FIX
    ),
    StepConflictError: ErrorSpec(
        409, "step_conflict", fix="GET the session for the number of the next step.", field="step"
    ),
    RequestConflictError: ErrorSpec(
        409,
        "request_id_reused",
        fix="Use a new request_id for every program.",
        field="request_id",
    ),
    RequestCancelledError: ErrorSpec(
        503, "stopping", fix="Send it again to another server; this one stops."
    ),
    SessionFileError: lambda error: _FILE_MISSING if error.missing else _FILE_REFUSED,
    **dict.fromkeys(OPENING_ERRORS, _SANDBOX_FAILED),
}
