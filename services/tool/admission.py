"""Who may run now: as many executions as slots, a bounded queue, an honest refusal.

    arrive -> [queue full, or the expected wait exceeds the deadline: refuse at once]
           -> wait in order of arrival -> [deadline passes: refuse] -> run -> leave

The expected wait is the number ahead, divided by the slots, times a running mean of recent
execution times.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

_MEAN_WEIGHT = 0.05
_FIRST_MEAN_S = 0.01


class OverloadedError(RuntimeError):
    """No slot within the deadline. Nothing ran."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Admission:
    """A counter of slots with a bounded queue. Belongs to one event loop."""

    def __init__(self, slots: int, max_queue: int) -> None:
        self.slots = slots
        self.max_queue = max_queue
        self.waiting = 0
        self.running = 0
        self._semaphore = asyncio.Semaphore(slots)
        self._mean_s = _FIRST_MEAN_S

    def expected_wait_s(self) -> float:
        """Seconds a newcomer has to expect."""
        if self.running < self.slots:
            return 0.0
        return (self.waiting + 1) / self.slots * self._mean_s

    @contextlib.asynccontextmanager
    async def slot(self, deadline_s: float) -> AsyncIterator[float]:
        """Hold one slot; yields the seconds spent waiting. Raises OverloadedError."""
        expected_s = self.expected_wait_s()
        if self.waiting >= self.max_queue:
            raise OverloadedError(f"{self.waiting} executions are already waiting", expected_s)
        if expected_s > deadline_s:
            raise OverloadedError(
                f"the expected wait is {expected_s:.1f} s, the deadline {deadline_s:.1f} s",
                expected_s,
            )
        arrived = time.perf_counter()
        await self._enter(deadline_s)
        started = time.perf_counter()
        self.running += 1
        try:
            yield started - arrived
        finally:
            self.running -= 1
            self._semaphore.release()
            self._mean_s += _MEAN_WEIGHT * (time.perf_counter() - started - self._mean_s)

    async def _enter(self, deadline_s: float) -> None:
        if not self._semaphore.locked():
            await self._semaphore.acquire()  # does not wait
            return
        self.waiting += 1
        try:
            async with asyncio.timeout(deadline_s):
                await self._semaphore.acquire()
        except TimeoutError:
            raise OverloadedError(
                f"no slot became free within {deadline_s:.1f} s", self.expected_wait_s()
            ) from None
        finally:
            self.waiting -= 1
