"""The tool service without HTTP: limits, admission, execution. Routes and MCP call this."""

import dataclasses
import logging
import math
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from services.tool.admission import Admission, OverloadedError
from services.tool.isolation import establish
from services.tool.metrics import Metrics
from services.tool.sandbox.host.execution import Job, Limits
from services.tool.sandbox.host.pool import Sandbox
from services.tool.sandbox.host.verdict import Outcome, Status
from services.tool.sessions import Sessions
from services.tool.settings import Settings
from services.tool.wire.schemas import (
    CellRequest,
    ErrorReport,
    ExecuteRequest,
    ExecuteResult,
    IsolationReport,
    Usage,
)

logger = logging.getLogger(__name__)


_BYTE_FIELDS = {"code": "--max-code-bytes", "files": "--max-file-bytes"}
"""Fields whose size is limited, with the flag that sets it."""


class LimitError(ValueError):
    """A request asks for more than the server allows; `field` names what."""

    def __init__(self, field: str, given: float, largest: float, flag: str) -> None:
        unit = " bytes" if field in _BYTE_FIELDS else ""
        super().__init__(f"{field}: {given:.12g}{unit} asked for, {largest:.12g} allowed")
        self.field = field
        self.flag = flag


_REFUSALS: dict[type[Exception], Status] = {
    OverloadedError: Status.OVERLOADED,
    LimitError: Status.REJECTED,
}


class ToolService:
    """Everything behind the routes. Build it with `running`."""

    def __init__(self, settings: Settings, sandbox: Sandbox, isolation: IsolationReport) -> None:
        self.settings = settings
        self.sandbox = sandbox
        self.isolation = isolation
        self.admission = Admission(settings.slots, settings.max_queue)
        self.metrics = Metrics(self)
        self.sessions = Sessions(self)

    @classmethod
    @asynccontextmanager
    async def running(cls, settings: Settings) -> AsyncIterator["ToolService"]:
        """Establish the sandbox, serve, tear everything down.

        Raises:
            IsolationError: the level required is not reached; the message is a table.
        """
        sandbox, isolation = await establish(settings)
        service = cls(settings, sandbox, isolation)
        try:
            async with service.sessions.sweeping():
                yield service
        finally:
            await sandbox.stop()

    async def execute(self, request: ExecuteRequest) -> ExecuteResult:
        """Run one program. Raises LimitError for a request above the ceilings, OverloadedError when
        there is no slot.
        """
        with self.counting_refusals():
            limits = self.limits(request)
            self.check_code(request.code)
            self.check_files(request.files)
            job = Job(
                code=request.code,
                stdin=request.stdin.encode("utf-8", "surrogatepass"),
                files=request.files,
                fetch=request.fetch,
                seed=request.seed,
            )
            async with self.admission.slot(self.wait_s(request.deadline_s)) as queue_s:
                outcome = await self.sandbox.run(job, limits)
        outcome = dataclasses.replace(outcome, queue_s=queue_s)
        self.metrics.observe(outcome)
        return self.to_result(outcome, request.request_id)

    async def execute_to_the_end(self, request: ExecuteRequest) -> ExecuteResult:
        """Like `execute`, with a refusal as a result instead of an exception (batches)."""
        try:
            return await self.execute(request)
        except (OverloadedError, LimitError) as error:
            outcome = Outcome(status=_REFUSALS[type(error)], message=str(error))
        except Exception:  # one program must not end the batch
            logger.exception("an execution failed")
            outcome = Outcome(
                status=Status.SANDBOX_ERROR, message="the service failed, see its log"
            )
        return self.to_result(outcome, request.request_id)

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Count what is refused inside, before it ran."""
        try:
            yield
        except (OverloadedError, LimitError) as error:
            self.metrics.observe_refusal(_REFUSALS[type(error)])
            raise

    def wait_s(self, deadline_s: float | None) -> float:
        return self.settings.max_wait_s if deadline_s is None else deadline_s

    def limits(self, request: ExecuteRequest | CellRequest, memory_mb: int | None = None) -> Limits:
        """Fill in the defaults and check the ceilings. Raises LimitError."""
        settings = self.settings
        if isinstance(request, ExecuteRequest):
            memory_mb = request.memory_mb
        wall_s = request.timeout_s or settings.default_timeout_s
        memory_mb = memory_mb or settings.default_memory_mb
        output = request.output_bytes or settings.default_output_bytes
        self.check("timeout_s", wall_s, settings.max_timeout_s)
        self.check("memory_mb", memory_mb, settings.max_memory_mb)
        self.check("output_bytes", output, settings.max_output_bytes)
        # Without a CPU limit of its own, code is stopped by the wall clock, whatever its threads.
        cpu_s = request.cpu_s or math.ceil(wall_s) * 4 + 1
        return Limits(
            wall_s=wall_s,
            cpu_s=cpu_s,
            memory_bytes=memory_mb << 20,
            output_bytes=output,
            fetch_bytes=settings.max_file_bytes,
        )

    def check_code(self, code: str) -> None:
        self.check("code", len(code.encode("utf-8", "surrogatepass")), self.settings.max_code_bytes)

    def check_files(self, files: dict[str, str]) -> None:
        decoded = sum(len(content) * 3 // 4 for content in files.values())
        self.check("files", decoded, self.settings.max_file_bytes)

    @staticmethod
    def check(field: str, given: float, largest: float) -> None:
        if given > largest:
            flag = _BYTE_FIELDS.get(field, f"--max-{field}".replace("_", "-"))
            raise LimitError(field, given, largest, flag)

    def to_result(self, outcome: Outcome, request_id: str | None) -> ExecuteResult:
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
                queue_ms=round(outcome.queue_s * 1e3, 3),
            ),
            isolation=self.isolation.level,
            request_id=request_id,
        )
