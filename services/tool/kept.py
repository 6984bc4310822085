"""Answers kept for callers that ask again, and runs that they join.

    new id                        -> run
    same id, same body, running   -> the caller joins the run
    same id, same body, finished  -> the kept answer
    same id, other body           -> RequestConflictError
    refused, failed or cancelled  -> forgotten; the next request runs it

A run belongs to the ledger and not to a connection: when its last caller hangs up it continues for
`grace_s`, in which a retry can join it, and is then cancelled.
"""

import asyncio
import hashlib
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from services.tool.sandbox.host.verdict import Status
from services.tool.wire.schemas import CellResult, ExecuteRequest, ExecuteResult

Answer = TypeVar("Answer", ExecuteResult, CellResult)

_OBJECT_BYTES = 4_000  # an answer without its texts, and its entry
_GRACE_S = 10.0


class RequestConflictError(ValueError):
    """The request id came before with another body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry(Generic[Answer]):
    digest: bytes
    answer: Answer
    size_bytes: int
    since_s: float


class KeptAnswers(Generic[Answer]):
    """Answers by key, each with the digest of its request; the oldest are dropped first.

    Args:
        keep_bytes: largest size of all texts together, as Python holds them.
        keep_s: seconds that an answer is kept.
    """

    def __init__(self, keep_bytes: int, keep_s: float = float("inf")) -> None:
        self._keep_bytes = keep_bytes
        self._keep_s = keep_s
        self._entries: OrderedDict[Hashable, _Entry[Answer]] = OrderedDict()
        self.held_bytes = 0

    def get(self, key: Hashable) -> tuple[bytes, Answer] | None:
        """Digest and answer, or None when it is not kept."""
        self._expire()
        entry = self._entries.get(key)
        return None if entry is None else (entry.digest, entry.answer)

    def put(self, key: Hashable, digest: bytes, answer: Answer) -> None:
        """Keep an answer, unless it alone is larger than everything that may be kept."""
        self.drop(key)
        size = size_bytes(answer)
        self._entries[key] = _Entry(
            digest=digest, answer=answer, size_bytes=size, since_s=time.monotonic()
        )
        self.held_bytes += size
        self._expire()

    def drop(self, key: Hashable) -> None:
        """Forget an answer, if it is kept."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.held_bytes -= entry.size_bytes

    def _expire(self) -> None:
        oldest_s = time.monotonic() - self._keep_s
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if entry.since_s >= oldest_s and self.held_bytes <= self._keep_bytes:
                return
            self.drop(key)


class Ledger:
    """Executions with a request id, each run once however often it is sent."""

    def __init__(self, kept: KeptAnswers[ExecuteResult], grace_s: float = _GRACE_S) -> None:
        self._kept = kept
        self._grace_s = grace_s
        self._running: dict[str, _Run] = {}

    def __len__(self) -> int:
        """How many run now."""
        return len(self._running)

    async def run(
        self, request: ExecuteRequest, work: Callable[[], Coroutine[Any, Any, ExecuteResult]]
    ) -> ExecuteResult:
        """The answer to `request`, by running `work` only if it neither ran nor runs.

        Raises:
            RequestConflictError: its id was used with another body.
            Whatever `work` raises.
        """
        request_id = request.request_id
        assert request_id is not None, "only a request with an id can come again"
        digest = _digest(request)
        kept = self._kept.get(request_id)
        if kept is not None:
            _compare(request_id, digest, kept[0])
            return kept[1]
        run = self._running.get(request_id)
        if run is None:
            # Registered before the first await, so that a retry that arrives now joins it.
            run = _Run(digest, asyncio.ensure_future(work()), self._grace_s)
            self._running[request_id] = run
            run.task.add_done_callback(lambda task: self._finish(request_id, digest, task))
        else:
            _compare(request_id, digest, run.digest)
        return await run.join()

    async def close(self) -> None:
        """Cancel every run."""
        tasks = [run.task for run in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _finish(self, request_id: str, digest: bytes, task: asyncio.Task[ExecuteResult]) -> None:
        del self._running[request_id]
        # Reading the exception also keeps asyncio from logging it when no caller is left.
        if task.cancelled() or task.exception() is not None:
            return
        # A sandbox that failed says "a retry runs it again".
        if task.result().status != Status.SANDBOX_ERROR:
            self._kept.put(request_id, digest, task.result())


class _Run:
    def __init__(self, digest: bytes, task: "asyncio.Task[ExecuteResult]", grace_s: float) -> None:
        self.digest = digest
        self.task = task
        self._grace_s = grace_s
        self._num_callers = 0
        self._grace: asyncio.TimerHandle | None = None

    async def join(self) -> ExecuteResult:
        self._num_callers += 1
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        try:
            # `wait` and not `await task`: cancelling this caller must not cancel the run.
            await asyncio.wait([self.task])
            return self.task.result()
        finally:
            self._num_callers -= 1
            if self._num_callers == 0 and not self.task.done():
                loop = asyncio.get_running_loop()
                self._grace = loop.call_later(self._grace_s, self.task.cancel)


def size_bytes(answer: ExecuteResult | CellResult) -> int:
    """Memory that an answer holds: its texts, which may take up to 4 bytes a character."""
    texts = [answer.stdout, answer.stderr, answer.message, *answer.files.values()]
    if isinstance(answer, CellResult) and answer.result is not None:
        texts.append(answer.result)
    return _OBJECT_BYTES + sum(map(sys.getsizeof, texts))


def _digest(request: ExecuteRequest) -> bytes:
    # As ASCII JSON: programs may hold half surrogate pairs, which have no UTF-8.
    return hashlib.sha256(json.dumps(request.model_dump()).encode()).digest()


def _compare(request_id: str, digest: bytes, known: bytes) -> None:
    if digest != known:
        raise RequestConflictError(f"request id {request_id!r} was used with another body")
