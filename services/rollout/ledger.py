"""Each request id is worked on once, however often it is sent.

    new id                        -> admitted (or 429) and run
    same id, same body, running   -> the caller attaches to the run
    same id, same body, finished  -> the kept reply
    same id, other body           -> 409
    failed or cancelled           -> forgotten; the next send runs it anew

A run belongs to the ledger, not to a connection. When its last caller is gone it goes on for a
grace period in which a retry can attach, and is then cancelled. Finished replies are kept for a
time and within a number of bytes; the oldest go first.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal

from blake3 import blake3

from services.common.errors import ApiError
from services.rollout import metrics
from services.rollout.wire.schemas import GenerateRequest, GenerateResponse

Run = Callable[[], Coroutine[Any, Any, GenerateResponse]]
Forgotten = Literal["cancelled", "dropped", "unknown"]

# A kept sample holds one int and one float object and two pointers for each token.
_BYTES_PER_TOKEN = 80
_BYTES_PER_SAMPLE = 2_000
_DURATION_WEIGHT = 0.1
_LARGEST_RETRY_AFTER_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerLimits:
    """How much the ledger admits and keeps."""

    max_pending_samples: int
    """Samples admitted and not yet finished, over all requests."""

    keep_s: float
    """Seconds that a finished reply is kept."""

    keep_bytes: int
    """Estimated bytes of kept replies."""

    detach_grace_s: float
    """Seconds that a run goes on without any caller."""


@dataclass(slots=True)
class _Entry:
    body_hash: bytes
    num_samples: int
    task: asyncio.Task[GenerateResponse]
    num_callers: int = 0
    grace: asyncio.TimerHandle | None = None
    kept_bytes: int = 0
    finished_s: float = field(default=0.0)


def body_hash(request: GenerateRequest) -> bytes:
    """Identity of a request's content: equal for JSON and msgpack bodies that mean the same."""
    return blake3(request.model_dump_json().encode()).digest()


class Ledger:
    """Running and finished requests by id. Lives in one event loop."""

    def __init__(self, limits: LedgerLimits) -> None:
        self._limits = limits
        self._running: dict[str, _Entry] = {}
        self._finished: OrderedDict[str, _Entry] = OrderedDict()
        self._pending_samples = 0
        self._kept_bytes = 0
        self._mean_s = 1.0
        # Read when Prometheus asks, not written with each request.
        metrics.PENDING_SAMPLES.set_function(lambda: self._pending_samples)
        metrics.KEPT_BYTES.set_function(lambda: self._kept_bytes)

    @property
    def pending_samples(self) -> int:
        return self._pending_samples

    @property
    def kept_bytes(self) -> int:
        return self._kept_bytes

    def submit(self, request: GenerateRequest, run: Run) -> None:
        """Make sure that `request` is running or finished; `attach` then waits for it.

        Raises:
            ApiError: 409 when the id was used with another body, 429 when the service is full.
        """
        self._expire()
        digest = body_hash(request)
        known = self._running.get(request.request_id) or self._finished.get(request.request_id)
        if known is None:
            self._admit(request.n)
            task = asyncio.create_task(run())
            entry = _Entry(body_hash=digest, num_samples=request.n, task=task)
            self._running[request.request_id] = entry
            self._pending_samples += request.n
            started_s = time.monotonic()
            task.add_done_callback(lambda _: self._finish(request.request_id, entry, started_s))
        elif known.body_hash != digest:
            raise ApiError(
                409,
                "request_id_reused",
                f"Request id {request.request_id!r} was used with a different body.",
                fix="Use a new id for a new request, and the same body for a retry.",
                field="request_id",
            )
        else:
            metrics.REPEATED_REQUESTS.labels("replayed" if known.task.done() else "attached").inc()

    async def attach(self, request_id: str, wait_s: float | None = None) -> GenerateResponse | None:
        """Wait for a request that is running or finished.

        Args:
            request_id: a known id.
            wait_s: give up waiting (not working) after this many seconds; None: no limit.

        Returns:
            The reply, or None when it is still running after `wait_s`.

        Raises:
            ApiError: 404 for an id that is not known, 410 when the run was cancelled meanwhile;
                otherwise what the run raised.
        """
        self._expire()
        entry = self._running.get(request_id) or self._finished.get(request_id)
        if entry is None:
            raise _unknown(request_id)
        self._add_caller(entry)
        try:
            done, _ = await asyncio.wait([entry.task], timeout=wait_s)
        finally:
            self._remove_caller(entry)
        if not done:
            return None
        if entry.task.cancelled():
            raise ApiError(
                410,
                "request_cancelled",
                f"Request {request_id!r} was cancelled.",
                fix="Send it again if it is still wanted; the id is free.",
            )
        return entry.task.result()

    def forget(self, request_id: str) -> Forgotten:
        """Cancel a running request, which frees its slots at once, or drop a kept reply."""
        running = self._running.get(request_id)
        if running is not None:
            running.task.cancel()
            return "cancelled"
        if request_id in self._finished:
            self._drop(request_id)
            return "dropped"
        return "unknown"

    async def close(self) -> None:
        """Cancel what is running."""
        tasks = [entry.task for entry in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _admit(self, num_samples: int) -> None:
        limit = self._limits.max_pending_samples
        if num_samples > limit:
            raise ApiError(
                422,
                "too_many_samples",
                f"n is {num_samples}; this service admits {limit} samples in all.",
                fix="Ask for fewer samples per request, or raise --max-pending-samples.",
                field="n",
            )
        if self._pending_samples + num_samples <= limit:
            return
        metrics.REJECTED_REQUESTS.inc()
        wait_s = min(_LARGEST_RETRY_AFTER_S, max(1, math.ceil(self._mean_s)))
        raise ApiError(
            429,
            "overloaded",
            f"{self._pending_samples} samples are pending; the limit is {limit}.",
            fix=f"Try again in {wait_s} s or on another server.",
            headers={"Retry-After": str(wait_s)},
        )

    def _finish(self, request_id: str, entry: _Entry, started_s: float) -> None:
        del self._running[request_id]
        self._pending_samples -= entry.num_samples
        if entry.grace is not None:
            entry.grace.cancel()
        if entry.task.cancelled() or entry.task.exception() is not None:
            return
        elapsed_s = time.monotonic() - started_s
        self._mean_s += _DURATION_WEIGHT * (elapsed_s - self._mean_s)
        samples = entry.task.result().samples
        num_tokens = sum(len(sample.token_ids) for sample in samples)
        entry.kept_bytes = _BYTES_PER_TOKEN * num_tokens + _BYTES_PER_SAMPLE * len(samples)
        entry.finished_s = time.monotonic()
        self._finished[request_id] = entry
        self._kept_bytes += entry.kept_bytes
        self._expire()

    def _expire(self) -> None:
        """Drop what is too old or too much. The oldest entry is always the first."""
        oldest_s = time.monotonic() - self._limits.keep_s
        while self._finished:
            request_id, entry = next(iter(self._finished.items()))
            if entry.finished_s >= oldest_s and self._kept_bytes <= self._limits.keep_bytes:
                break
            self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        self._kept_bytes -= self._finished.pop(request_id).kept_bytes

    def _add_caller(self, entry: _Entry) -> None:
        entry.num_callers += 1
        if entry.grace is not None:
            entry.grace.cancel()
            entry.grace = None

    def _remove_caller(self, entry: _Entry) -> None:
        entry.num_callers -= 1
        if entry.num_callers == 0 and not entry.task.done():
            loop = asyncio.get_running_loop()
            entry.grace = loop.call_later(self._limits.detach_grace_s, entry.task.cancel)


def _unknown(request_id: str) -> ApiError:
    return ApiError(
        404,
        "request_unknown",
        f"Request {request_id!r} is not running and no reply is kept.",
        fix="Send it again with POST /v1/generate.",
        field="request_id",
    )
