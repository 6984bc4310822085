"""Requests for samples: how many are admitted; each id runs once (see `common/idempotent`).

A request that is new is admitted, or refused as `overloaded`. Finished replies are kept for
`keep_s` seconds and within `keep_bytes`.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from blake3 import blake3

from services.common.idempotent import Forgotten, IdempotentRuns, KeptAnswers
from services.rollout import metrics
from services.rollout.errors import RolloutError
from services.rollout.wire.schemas import GenerateRequest, GenerateResponse

Run = Callable[[], Coroutine[Any, Any, GenerateResponse]]

# A kept sample holds one int object, one float object and two pointers for each token.
_BYTES_PER_TOKEN = 80
_BYTES_PER_SAMPLE = 2_000  # spans, digests and the objects around them
_DURATION_WEIGHT = 0.1  # of the newest run in the moving average behind Retry-After
_LARGEST_RETRY_AFTER_S = 60


class LedgerError(RolloutError):
    """The service is full, or could never hold what is asked for."""


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


def body_hash(request: GenerateRequest) -> bytes:
    """Identity of a request's content: equal for JSON and msgpack bodies that mean the same."""
    return blake3(request.model_dump_json().encode()).digest()


def size_bytes(reply: GenerateResponse) -> int:
    """Memory that a kept reply holds, as an estimate."""
    num_tokens = sum(len(sample.token_ids) for sample in reply.samples)
    return _BYTES_PER_TOKEN * num_tokens + _BYTES_PER_SAMPLE * len(reply.samples)


class Ledger:
    """Running and finished requests by id. Lives in one event loop."""

    def __init__(self, limits: LedgerLimits) -> None:
        self._limits = limits
        self._kept = KeptAnswers(size_bytes, limits.keep_bytes, limits.keep_s)
        self._runs = IdempotentRuns(self._kept, limits.detach_grace_s)
        self.pending_samples = 0
        self._mean_s = 1.0
        # Read when Prometheus scrapes, which costs nothing per request.
        metrics.PENDING_SAMPLES.set_function(lambda: self.pending_samples)
        metrics.KEPT_BYTES.set_function(lambda: self.kept_bytes)

    @property
    def kept_bytes(self) -> int:
        """Estimated memory of all kept replies."""
        return self._kept.held_bytes

    def submit(self, request: GenerateRequest, run: Run) -> None:
        """Make sure that `request` is running or finished; `attach` then waits for it.

        Raises:
            RequestConflictError: the id was used with another body.
            LedgerError: `overloaded` when the service is full, `too_many_samples` when it could
                never fit.
        """
        started_s = time.monotonic()

        def start() -> Coroutine[Any, Any, GenerateResponse]:
            self._admit(request.n)
            self.pending_samples += request.n
            return run()

        def end(task: asyncio.Task[GenerateResponse]) -> None:
            self.pending_samples -= request.n
            if not task.cancelled() and task.exception() is None:
                elapsed_s = time.monotonic() - started_s
                self._mean_s += _DURATION_WEIGHT * (elapsed_s - self._mean_s)

        submitted = self._runs.submit(request.request_id, body_hash(request), start, end)
        if submitted != "started":
            metrics.REPEATED_REQUESTS.labels(submitted).inc()

    async def attach(self, request_id: str, wait_s: float | None = None) -> GenerateResponse | None:
        """Wait for a request that is running or finished.

        Args, returns and raises: as `IdempotentRuns.attach`.
        """
        return await self._runs.attach(request_id, wait_s)

    def forget(self, request_id: str) -> Forgotten:
        """Cancel a running request, which frees its slots at once, or drop its stored reply."""
        return self._runs.forget(request_id)

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
        await self._runs.close()

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
