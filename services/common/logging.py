"""The ids of the request being handled, and log lines of JSON on stderr that carry them."""

import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar

from opentelemetry.trace import INVALID_SPAN_CONTEXT, format_trace_id, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

REQUEST_ID_HEADER = "x-request-id"
TRACEPARENT_HEADER = "traceparent"

_SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

_propagator = TraceContextTextMapPropagator()
_request_id: ContextVar[str] = ContextVar("request_id", default="-")
_span = ContextVar("span", default=INVALID_SPAN_CONTEXT)


def current_request_id() -> str:
    """The id of the request being handled, or "-" outside one."""
    return _request_id.get()


def enter_request(headers: Mapping[str, str]) -> dict[str, str]:
    """Adopt the caller's request id and W3C trace; make an id where it is missing or unsafe.

    Returns:
        The headers that the reply repeats: the request id and, if it was valid, the traceparent.
    """
    request_id = headers.get(REQUEST_ID_HEADER, "")
    # Ids are written into logs and headers, so quotes, spaces and very long ones are replaced.
    if not _SAFE_ID.fullmatch(request_id):
        request_id = secrets.token_hex(8)
    context = _propagator.extract({TRACEPARENT_HEADER: headers.get(TRACEPARENT_HEADER, "")})
    echoed = {REQUEST_ID_HEADER: request_id}
    _propagator.inject(echoed, context)
    _request_id.set(request_id)
    _span.set(get_current_span(context).get_span_context())
    return echoed


class JsonFormatter(logging.Formatter):
    """Render a record, with its `extra` fields, as a single line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "msg": record.getMessage(),
        }
        if current_request_id() != "-":
            line["request_id"] = current_request_id()
        if _span.get().is_valid:
            line["trace_id"] = format_trace_id(_span.get().trace_id)
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str = "INFO") -> None:
    """Send every logger of this process through JsonFormatter. Call from `__main__` only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # The middleware writes one line per request; uvicorn's own would repeat it.
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
