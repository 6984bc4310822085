"""One W3C trace through learner, rollout and tool service: the `traceparent` header of every call.

Inside an OpenTelemetry span of the caller the calls belong to that span. Elsewhere each asyncio
task gets a trace of its own with its first call. An episode runs as one task, so its turns and its
code share one trace, whichever servers they went to.
"""

import secrets
from contextvars import ContextVar

from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

_propagator = TraceContextTextMapPropagator()
_of_this_task: ContextVar[Context | None] = ContextVar("trace_of_this_task", default=None)


def trace_headers() -> dict[str, str]:
    """The headers that put a call into the current trace; starts one where there is none."""
    headers: dict[str, str] = {}
    _propagator.inject(headers)
    if not headers:
        context = _of_this_task.get() or _new_trace()
        _of_this_task.set(context)
        _propagator.inject(headers, context)
    return headers


def _new_trace() -> Context:
    span = SpanContext(
        trace_id=int.from_bytes(secrets.token_bytes(16)),
        span_id=int.from_bytes(secrets.token_bytes(8)),
        is_remote=False,
        trace_flags=TraceFlags(TraceFlags.SAMPLED),
    )
    return set_span_in_context(NonRecordingSpan(span), Context())
