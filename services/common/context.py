"""What is known about the request being handled, visible to logs, errors and onward calls."""

import re
import secrets
from contextvars import ContextVar

REQUEST_ID_HEADER = "x-request-id"
TRACEPARENT_HEADER = "traceparent"

_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# W3C Trace Context: version, trace id, the caller's span id, flags; an id of zeros is none.
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_request_id: ContextVar[str] = ContextVar("request_id", default="-")
_traceparent: ContextVar[str | None] = ContextVar("traceparent", default=None)


def current_request_id() -> str:
    """The id of the request being handled, or "-" outside one."""
    return _request_id.get()


def current_traceparent() -> str | None:
    """The W3C traceparent header of the request being handled, when it had a valid one."""
    return _traceparent.get()


def current_trace_id() -> str | None:
    """The trace that the request being handled belongs to: 32 hex digits."""
    traceparent = _traceparent.get()
    return None if traceparent is None else traceparent.split("-")[1]


def enter_request(request_id: str | None, traceparent: str | None) -> str:
    """Adopt the caller's ids when they are safe to log and echo; otherwise make an id.

    Returns:
        The id now in force.
    """
    if request_id is None or not _SAFE_ID.fullmatch(request_id):
        request_id = secrets.token_hex(8)
    _request_id.set(request_id)
    valid = traceparent is not None and _TRACEPARENT.fullmatch(traceparent) is not None
    _traceparent.set(traceparent if valid else None)
    return request_id
