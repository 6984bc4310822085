"""Idempotent requests: each request id is run once, however often it is sent.

    new id                        -> admitted (or `overloaded`) and run
    same id, same body, running   -> the caller attaches to the run
    same id, same body, finished  -> the stored reply
    same id, other body           -> `request_id_reused`
    failed or cancelled           -> forgotten; the next send runs it again

A run belongs to the ledger, not to a connection. When its last caller disconnects it continues for
a grace period in which a retry can attach, and is then cancelled. Finished replies are kept for
`keep_s` seconds and within `keep_bytes`; the oldest are evicted first.
"""

import asyncio
import contextlib
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from blake3 import blake3

from services.rollout import metrics
from services.rollout.errors import RolloutError
from services.rollout.wire.schemas import GenerateRequest, GenerateResponse

Run = Callable[[], Coroutine[Any, Any, GenerateResponse]]
Forgotten = Literal["cancelled", "dropped", "unknown"]

# A kept sample holds one int object, one float object and two pointers for each token.
_BYTES_PER_TOKEN = 80
_BYTES_PER_SAMPLE = 2_000  # spans, digests and the objects around them
_DURATION_WEIGHT = 0.1  # of the newest run in the moving average behind Retry-After
_LARGEST_RETRY_AFTER_S = 60


class LedgerError(RolloutError):
    """A request id is unknown, reused or cancelled, or the service is full."""


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
    """Seconds that a run continues without any caller."""


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
        self.pending_samples = 0
        self.kept_bytes = 0
        self._mean_s = 1.0
        # Read when Prometheus scrapes, which costs nothing per request.
        metrics.PENDING_SAMPLES.set_function(lambda: self.pending_samples)
        metrics.KEPT_BYTES.set_function(lambda: self.kept_bytes)

    def submit(self, request: GenerateRequest, run: Run) -> None:
        """Make sure that `request` is running or finished; `attach` then waits for it.

        Raises:
            LedgerError: `request_id_reused` when the id was used with another body, `overloaded`
                when the service is full, `too_many_samples` when it could never fit.
        """
        # First, so that a reply past its time is not replayed.
        self._expire()
        digest = body_hash(request)
        known = self._running.get(request.request_id) or self._finished.get(request.request_id)
        if known is None:
            self._admit(request.n)
            task = asyncio.create_task(run())
            entry = _Entry(body_hash=digest, num_samples=request.n, task=task)
            # Registered before the first await: a retry that arrives now attaches to this run.
            self._running[request.request_id] = entry
            self.pending_samples += request.n
            started_s = time.monotonic()
            task.add_done_callback(lambda _: self._finish(request.request_id, entry, started_s))
        elif known.body_hash != digest:
            raise LedgerError(
                "request_id_reused",
                f"Request id {request.request_id!r} was used with a different body.",
            )
        else:
            metrics.REPEATED_REQUESTS.labels("replayed" if known.task.done() else "attached").inc()

    async def attach(self, request_id: str, wait_s: float | None = None) -> GenerateResponse | None:
        """Wait for a request that is running or finished.

        Args:
            request_id: a known id.
            wait_s: stop waiting after this many seconds, while the run continues; None: no limit.

        Returns:
            The reply, or None when it is still running after `wait_s`.

        Raises:
            LedgerError: `request_unknown`, or `request_cancelled` when the run was cancelled
                meanwhile; otherwise what the run raised.
        """
        self._expire()
        entry = self._running.get(request_id) or self._finished.get(request_id)
        if entry is None:
            message = f"Request {request_id!r} is not running and no reply is kept."
            raise LedgerError("request_unknown", message)
        self._add_caller(entry)
        try:
            # `wait` and not `await entry.task`: cancelling this caller must not cancel the run.
            done, _ = await asyncio.wait([entry.task], timeout=wait_s)
        finally:
            self._remove_caller(entry)
        if not done:
            return None
        if entry.task.cancelled():
            raise LedgerError("request_cancelled", f"Request {request_id!r} was cancelled.")
        return entry.task.result()

    def forget(self, request_id: str) -> Forgotten:
        """Cancel a running request, which frees its slots at once, or drop its stored reply."""
        running = self._running.get(request_id)
        if running is not None:
            running.task.cancel()
            return "cancelled"
        if request_id in self._finished:
            self._drop(request_id)
            return "dropped"
        return "unknown"

    @contextlib.contextmanager
    def hold(self, num_samples: int) -> Iterator[None]:
        """Count samples that are drawn without a request id, while the body runs.

        Raises:
            LedgerError: as `submit`, `overloaded` or `too_many_samples`.
        """
        self._admit(num_samples)
        self.pending_samples += num_samples
        try:
            yield
        finally:
            self.pending_samples -= num_samples

    async def close(self) -> None:
        """Cancel every running request."""
        tasks = [entry.task for entry in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _admit(self, num_samples: int) -> None:
        limit = self._limits.max_pending_samples
        if num_samples > limit:
            # No retry can succeed, so this is not `overloaded`.
            message = f"n is {num_samples}; this service admits {limit} samples in all."
            raise LedgerError("too_many_samples", message)
        if self.pending_samples + num_samples <= limit:
            return
        metrics.REJECTED_REQUESTS.inc()
        raise LedgerError(
            "overloaded",
            f"{self.pending_samples} samples are pending; the limit is {limit}.",
            retry_after_s=min(_LARGEST_RETRY_AFTER_S, max(1, math.ceil(self._mean_s))),
        )

    def _finish(self, request_id: str, entry: _Entry, started_s: float) -> None:
        del self._running[request_id]
        self.pending_samples -= entry.num_samples
        if entry.grace is not None:
            entry.grace.cancel()
        # Only successes are stored: a retry of a failure has to run again. Reading the exception
        # also keeps asyncio from logging it as never retrieved when no caller is attached.
        if entry.task.cancelled() or entry.task.exception() is not None:
            return
        elapsed_s = time.monotonic() - started_s
        self._mean_s += _DURATION_WEIGHT * (elapsed_s - self._mean_s)
        samples = entry.task.result().samples
        num_tokens = sum(len(sample.token_ids) for sample in samples)
        entry.kept_bytes = _BYTES_PER_TOKEN * num_tokens + _BYTES_PER_SAMPLE * len(samples)
        entry.finished_s = time.monotonic()
        self._finished[request_id] = entry
        self.kept_bytes += entry.kept_bytes
        self._expire()

    def _expire(self) -> None:
        """Evict what is too old or too much. The oldest entry is always the first."""
        oldest_s = time.monotonic() - self._limits.keep_s
        while self._finished:
            request_id, entry = next(iter(self._finished.items()))
            if entry.finished_s >= oldest_s and self.kept_bytes <= self._limits.keep_bytes:
                break
            self._drop(request_id)

    def _drop(self, request_id: str) -> None:
        self.kept_bytes -= self._finished.pop(request_id).kept_bytes

    def _add_caller(self, entry: _Entry) -> None:
        entry.num_callers += 1
        if entry.grace is not None:
            entry.grace.cancel()
            entry.grace = None

    def _remove_caller(self, entry: _Entry) -> None:
        entry.num_callers -= 1
        if entry.num_callers == 0 and not entry.task.done():
            # A client that lost its connection retries within seconds; what nobody asks for by then
            # would only hold engine slots.
            loop = asyncio.get_running_loop()
            entry.grace = loop.call_later(self._limits.detach_grace_s, entry.task.cancel)
