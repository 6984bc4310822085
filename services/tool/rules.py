"""The rules of an execution, the same for single programs and for cells of sessions.

    arrive -> [asks for more than a ceiling: reject]
           -> [queue full: refuse at once]
           -> wait in order of arrival -> [deadline passes: refuse] -> run -> count, answer

Nobody is refused because of what programs took before: a queue of quick programs behind slow ones
moves fast, and nothing says which it is. The expected wait only tells a refused caller when to
come back: the number ahead, divided by the slots, times the mean of the latest execution times.
"""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator

from services.tool import metrics
from services.tool.sandbox.host.execution import Limits
from services.tool.sandbox.host.verdict import Outcome, Status
from services.tool.settings import ToolSettings
from services.tool.wire.schemas import (
    CellRequest,
    ErrorReport,
    ExecuteRequest,
    ExecuteResult,
    Usage,
)

_FIRST_MEAN_S = 0.01
_NUM_RECENT = 16
"""Executions in the mean behind Retry-After; a change of load shows within as many."""
_CPU_PER_WALL = 4
"""CPU seconds per second of wall time, where a request names no CPU limit."""
_BYTE_FIELDS = {"code": "--max-code-bytes", "files": "--max-file-bytes"}
"""Fields whose size is limited, with the flag that sets the limit."""


class OverloadedError(RuntimeError):
    """No slot within the deadline. Nothing ran."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class LimitError(ValueError):
    """A request asks for more than the server allows; `flag` sets the largest `field`."""

    def __init__(self, field: str, given: float, largest: float) -> None:
        unit = " bytes" if field in _BYTE_FIELDS else ""
        super().__init__(f"{field}: {given:.12g}{unit} asked for, {largest:.12g} allowed")
        self.field = field
        self.flag = _BYTE_FIELDS.get(field, f"--max-{field}".replace("_", "-"))


REFUSALS: dict[type[Exception], Status] = {
    OverloadedError: Status.OVERLOADED,
    LimitError: Status.REJECTED,
}
"""Exceptions that say that nothing ran, with the status under which they are counted."""


class Admission:
    """As many executions at once as there are slots, and a bounded queue. For one event loop."""

    def __init__(self, slots: int, max_queue: int) -> None:
        self.slots = slots
        self.max_queue = max_queue
        self.waiting = 0
        self.running = 0
        self._semaphore = asyncio.Semaphore(slots)
        self._recent_s = deque([_FIRST_MEAN_S], maxlen=_NUM_RECENT)

    def expected_wait_s(self) -> float:
        """Seconds a newcomer has to expect."""
        if self.running < self.slots:
            return 0.0
        mean_s = sum(self._recent_s) / len(self._recent_s)
        return (self.waiting + 1) / self.slots * mean_s

    @contextlib.asynccontextmanager
    async def slot(self, deadline_s: float) -> AsyncIterator[float]:
        """Hold one slot; yields the seconds spent waiting.

        Raises:
            OverloadedError: the queue is full, or no slot became free within `deadline_s`. A slot
                that is free is given also after the deadline.
        """
        if self.waiting >= self.max_queue and self._semaphore.locked():
            raise OverloadedError(
                f"{self.waiting} executions are already waiting", self.expected_wait_s()
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
            self._recent_s.append(time.perf_counter() - started)

    async def _enter(self, deadline_s: float) -> None:
        # Most requests find a free slot, and take it without setting up a timer.
        if not self._semaphore.locked():
            await self._semaphore.acquire()  # does not wait
            return
        self.waiting += 1
        try:
            async with asyncio.timeout(deadline_s):
                await self._semaphore.acquire()
        except TimeoutError:
            raise OverloadedError(
                f"no slot became free within {max(0.0, deadline_s):.1f} s", self.expected_wait_s()
            ) from None
        finally:
            self.waiting -= 1


class ExecutionRules:
    """Ceilings, admission, counting and the form of the answer.

    Args:
        level: the level of isolation in force, which every answer names.
    """

    def __init__(self, settings: ToolSettings, level: str) -> None:
        self.settings = settings
        self.level = level
        self.admission = Admission(settings.slots, settings.max_queue)

    def limits(self, request: ExecuteRequest | CellRequest, memory_mb: int | None) -> Limits:
        """Fill in the defaults and check the ceilings.

        Args:
            memory_mb: what the program or, for a cell, its session asked for.

        Raises:
            LimitError: the request is above a ceiling.
        """
        settings = self.settings
        wall_s = request.timeout_s or settings.default_timeout_s
        memory_mb = memory_mb or settings.default_memory_mb
        output_bytes = request.output_bytes or settings.default_output_bytes
        self.check("timeout_s", wall_s, settings.max_timeout_s)
        self.check("memory_mb", memory_mb, settings.max_memory_mb)
        self.check("output_bytes", output_bytes, settings.max_output_bytes)
        self.check("code", len(utf8(request.code)), settings.max_code_bytes)
        return Limits(
            wall_s=wall_s,
            # Without a CPU limit of its own, code is stopped by the wall clock, whatever its
            # threads do.
            cpu_s=request.cpu_s or math.ceil(wall_s) * _CPU_PER_WALL + 1,
            memory_bytes=memory_mb << 20,
            output_bytes=output_bytes,
            fetch_bytes=settings.max_file_bytes,
        )

    def largest_result_bytes(self, request: ExecuteRequest) -> int:
        """Memory that the result of `request` may take: two streams of text, and files."""
        settings = self.settings
        asked = request.output_bytes or settings.default_output_bytes
        # Bytes that are no UTF-8 become characters of 2 bytes, and of 3 on the wire.
        streams = 2 * 3 * min(asked, settings.max_output_bytes)
        return streams + (2 * settings.max_file_bytes if request.fetch or request.figures else 0)

    def check_files(self, files: dict[str, str]) -> None:
        """Check the size of base64 contents. Raises LimitError."""
        # From the length alone: decoding megabytes here would block the event loop.
        decoded = sum(len(content) * 3 // 4 for content in files.values())
        self.check("files", decoded, self.settings.max_file_bytes)

    @staticmethod
    def check(field: str, given: float, largest: float) -> None:
        """Raises LimitError when `given` is above `largest`."""
        if given > largest:
            raise LimitError(field, given, largest)

    @contextlib.asynccontextmanager
    async def slot(self, deadline_s: float | None, waited_s: float = 0.0) -> AsyncIterator[float]:
        """Hold one slot, as `Admission.slot`; without a deadline wait at most --max-wait-s.

        Args:
            waited_s: seconds that were spent waiting before.
        """
        longest_s = self.settings.max_wait_s if deadline_s is None else deadline_s
        async with self.admission.slot(longest_s - waited_s) as queue_s:
            yield waited_s + queue_s

    @contextlib.contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Count what is refused inside, before it ran."""
        try:
            yield
        except tuple(REFUSALS) as error:
            metrics.EXECUTIONS.labels(REFUSALS[type(error)].value).inc()
            raise

    def finish(self, outcome: Outcome, queue_s: float, request_id: str | None) -> ExecuteResult:
        """Count an execution that ran and put its outcome into the form of the wire."""
        metrics.EXECUTIONS.labels(outcome.status.value).inc()
        metrics.WALL_SECONDS.observe(outcome.wall_s)
        metrics.QUEUE_SECONDS.observe(queue_s)
        return self.to_result(outcome, queue_s, request_id)

    def to_result(self, outcome: Outcome, queue_s: float, request_id: str | None) -> ExecuteResult:
        """The wire form of an outcome."""
        error = outcome.error
        return ExecuteResult(
            status=outcome.status.value,
            exit_code=outcome.exit_code,
            signal=outcome.signal,
            error=None
            if error is None
            else ErrorReport(type=error.type, message=error.message, line=error.line),
            message=outcome.message,
            stdout=outcome.stdout,
            stderr=outcome.stderr,
            stdout_truncated=outcome.stdout_truncated,
            stderr_truncated=outcome.stderr_truncated,
            files=outcome.files,
            missing=outcome.missing,
            usage=Usage(
                wall_ms=round(outcome.wall_s * 1e3, 3),
                cpu_ms=round(outcome.cpu_s * 1e3, 3),
                peak_mb=round(outcome.peak_bytes / (1 << 20), 1),
                queue_ms=round(queue_s * 1e3, 3),
            ),
            isolation=self.level,
            request_id=request_id,
        )


def utf8(text: str) -> bytes:
    # JSON may carry half of a surrogate pair, which strict UTF-8 refuses.
    return text.encode("utf-8", "surrogatepass")
