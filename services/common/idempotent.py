"""Idempotent work: each key runs once, however often it is asked for.

    new key                        -> run
    same key, same body, running   -> the caller attaches to the run
    same key, same body, finished  -> the kept answer
    same key, other body           -> RequestConflictError
    failed or cancelled            -> forgotten; the next request runs it again

A run belongs to the service and not to a connection. When its last caller disconnects it continues
for a grace period in which a retry can attach, and is then cancelled.
"""

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

Answer = TypeVar("Answer")
Submitted = Literal["started", "attached", "replayed"]
Forgotten = Literal["cancelled", "dropped", "unknown"]


class RequestIdError(Exception):
    """What a request id stands for is not what the caller takes it for."""


class RequestConflictError(RequestIdError):
    """The id came before with another body."""


class RequestUnknownError(RequestIdError):
    """Nothing runs under this id, and no answer is kept."""


class RequestCancelledError(RequestIdError):
    """The run that the caller waited for was cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept(Generic[Answer]):
    digest: bytes
    answer: Answer
    num_bytes: int
    since_s: float


class KeptAnswers(Generic[Answer]):
    """Answers by key, each with the digest of its request; the oldest are evicted first.

    Args:
        size_bytes: memory that an answer holds.
        keep_bytes: largest memory of all of them together.
        keep_s: seconds that an answer is kept.
    """

    def __init__(
        self, size_bytes: Callable[[Answer], int], keep_bytes: int, keep_s: float = math.inf
    ) -> None:
        self._size_bytes = size_bytes
        self._keep_bytes = keep_bytes
        self._keep_s = keep_s
        self._entries: OrderedDict[Hashable, _Kept[Answer]] = OrderedDict()
        self.held_bytes = 0

    def get(self, key: Hashable) -> tuple[bytes, Answer] | None:
        """Digest and answer, or None when it is not kept."""
        self._evict()
        entry = self._entries.get(key)
        return None if entry is None else (entry.digest, entry.answer)

    def put(self, key: Hashable, digest: bytes, answer: Answer) -> None:
        """Keep an answer, unless it alone is larger than everything that may be kept."""
        self.drop(key)
        size = self._size_bytes(answer)
        self._entries[key] = _Kept(
            digest=digest, answer=answer, num_bytes=size, since_s=time.monotonic()
        )
        self.held_bytes += size
        self._evict()

    def drop(self, key: Hashable) -> bool:
        """Forget an answer; whether it was kept."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self.held_bytes -= entry.num_bytes
        return True

    def _evict(self) -> None:
        oldest_s = time.monotonic() - self._keep_s
        while self._entries:
            key, entry = next(iter(self._entries.items()))
            if entry.since_s >= oldest_s and self.held_bytes <= self._keep_bytes:
                return
            self.drop(key)


@dataclass(slots=True, kw_only=True)
class _Run(Generic[Answer]):
    digest: bytes
    task: asyncio.Task[Answer]
    num_callers: int = 0
    grace: asyncio.TimerHandle | None = None


class IdempotentRuns(Generic[Answer]):
    """Running and finished work by key. Lives in one event loop.

    Args:
        kept: where answers are kept.
        grace_s: seconds that a run continues without a caller.
        is_final: whether a retry gets this answer; otherwise it runs again.
    """

    def __init__(
        self,
        kept: KeptAnswers[Answer],
        grace_s: float,
        is_final: Callable[[Answer], bool] = lambda _: True,
    ) -> None:
        self._kept = kept
        self._grace_s = grace_s
        self._is_final = is_final
        self._running: dict[Hashable, _Run[Answer]] = {}

    def __len__(self) -> int:
        """How many run now."""
        return len(self._running)

    def submit(
        self,
        key: Hashable,
        digest: bytes,
        start: Callable[[], Coroutine[Any, Any, Answer]],
        on_end: Callable[[asyncio.Task[Answer]], None] | None = None,
    ) -> Submitted:
        """Make sure that the work of `key` is running or finished; `attach` then waits for it.

        Args:
            digest: of the request; equal for requests that mean the same.
            start: begins the work; called only if it neither ran nor runs. What it raises is raised
                here, and leaves nothing behind.
            on_end: called when work that this call started has ended, in whatever way.

        Raises:
            RequestConflictError: the key was used with another digest.
        """
        running, kept = self._running.get(key), self._kept.get(key)
        known = running.digest if running else kept[0] if kept else None
        if known is not None:
            if known != digest:
                raise RequestConflictError(f"Request id {key!r} was used with another body")
            return "attached" if running else "replayed"
        run = _Run(digest=digest, task=asyncio.ensure_future(start()))
        # Registered before the first await: a retry that arrives now attaches to this run.
        self._running[key] = run
        run.task.add_done_callback(lambda task: self._finish(key, run))
        if on_end is not None:
            run.task.add_done_callback(on_end)
        return "started"

    async def attach(self, key: Hashable, wait_s: float | None = None) -> Answer | None:
        """Wait for work that is running or finished.

        Args:
            wait_s: stop waiting after this many seconds, while the run continues; None: no limit.

        Returns:
            The answer, or None when it is still running after `wait_s`.

        Raises:
            RequestUnknownError: `key` is neither running nor kept.
            RequestCancelledError: the run was cancelled meanwhile.
            Exception: whatever the run raised.
        """
        run = self._running.get(key)
        if run is None:
            kept = self._kept.get(key)
            if kept is None:
                raise RequestUnknownError(f"Request {key!r} is not running and no answer is kept")
            return kept[1]
        self._add_caller(run)
        try:
            # `wait` and not `await run.task`: cancelling this caller must not cancel the run.
            done, _ = await asyncio.wait([run.task], timeout=wait_s)
        finally:
            self._remove_caller(run)
        if not done:
            return None
        if run.task.cancelled():
            raise RequestCancelledError(f"Request {key!r} was cancelled")
        return run.task.result()

    def forget(self, key: Hashable) -> Forgotten:
        """Cancel running work, which frees what it holds at once, or drop a kept answer."""
        running = self._running.get(key)
        if running is not None:
            running.task.cancel()
            return "cancelled"
        return "dropped" if self._kept.drop(key) else "unknown"

    async def close(self) -> None:
        """Cancel all that runs."""
        tasks = [run.task for run in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _finish(self, key: Hashable, run: _Run[Answer]) -> None:
        del self._running[key]
        if run.grace is not None:
            run.grace.cancel()
        # Only successes are kept: a retry of a failure has to run again. Reading the exception
        # also keeps asyncio from logging it as never retrieved when no caller is attached.
        if run.task.cancelled() or run.task.exception() is not None:
            return
        answer = run.task.result()
        if self._is_final(answer):
            self._kept.put(key, run.digest, answer)

    def _add_caller(self, run: _Run[Answer]) -> None:
        run.num_callers += 1
        if run.grace is not None:
            run.grace.cancel()
            run.grace = None

    def _remove_caller(self, run: _Run[Answer]) -> None:
        run.num_callers -= 1
        if run.num_callers == 0 and not run.task.done():
            # A client that lost its connection retries within seconds; what nobody asks for by then
            # would only hold slots.
            loop = asyncio.get_running_loop()
            run.grace = loop.call_later(self._grace_s, run.task.cancel)
