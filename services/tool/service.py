"""The tool service without HTTP. Routes of REST, SandboxFusion and MCP call this.

    api/                routes
      -> service.py     single programs          sessions.py   live interpreters
        -> rules.py     ceilings, admission, counting       kept.py       answers kept for retries
        -> sandbox/     slots for programs       isolation.py  tries out the sandbox at start

docs/tool_service.md says how to call it, what it protects from and what it does not.
"""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.common.idempotent import IdempotentRuns, KeptAnswers
from services.tool import metrics
from services.tool.isolation import establish
from services.tool.kept import GRACE_S, digest_of, is_final, size_bytes
from services.tool.rules import REFUSALS, ExecutionRules, utf8
from services.tool.sandbox.host.execution import Job
from services.tool.sandbox.host.pool import Sandbox
from services.tool.sandbox.host.verdict import Outcome, Status
from services.tool.sessions import Sessions
from services.tool.settings import ToolSettings
from services.tool.wire.schemas import ExecuteRequest, ExecuteResult, IsolationReport

logger = logging.getLogger(__name__)


class ToolService:
    """Everything behind the routes. Build it with `running`."""

    def __init__(
        self, settings: ToolSettings, sandbox: Sandbox, isolation: IsolationReport
    ) -> None:
        self.settings = settings
        self.sandbox = sandbox
        self.isolation = isolation
        self.rules = ExecutionRules(settings, isolation.level)
        self.sessions = Sessions(self.rules, sandbox)
        kept: KeptAnswers[ExecuteResult] = KeptAnswers(
            size_bytes, settings.keep_bytes // 2, settings.keep_s
        )
        self.runs = IdempotentRuns(kept, GRACE_S, is_final)

    @classmethod
    @asynccontextmanager
    async def running(cls, settings: ToolSettings) -> AsyncIterator["ToolService"]:
        """Establish the sandbox, serve, tear everything down.

        Raises:
            IsolationError: the level required is not reached; the message is a table.
        """
        sandbox, isolation = await establish(settings)
        service = cls(settings, sandbox, isolation)
        service._export_gauges()
        try:
            async with service.sessions.sweeping():
                yield service
        finally:
            await service.runs.close()
            await sandbox.stop()

    def _export_gauges(self) -> None:
        """Have every scrape of /metrics read the state of this service."""
        metrics.RUNNING.set_function(lambda: self.rules.admission.running)
        metrics.WAITING.set_function(lambda: self.rules.admission.waiting)
        metrics.SLOTS_WAITING.set_function(self.sandbox.waiting)
        metrics.SESSIONS.set_function(lambda: len(self.sessions))
        metrics.SESSIONS_EVICTED.set_function(lambda: self.sessions.num_evicted)
        metrics.LAUNCHER_RESTARTS.set_function(lambda: self.sandbox.restarts)
        for layer, report in self.isolation.layers.items():
            metrics.ISOLATION_LAYER.labels(layer).set(report.active)

    async def execute(self, request: ExecuteRequest) -> ExecuteResult:
        """Run one program; one with a request id runs once, however often it comes.

        Raises:
            LimitError: it is above a ceiling.
            OverloadedError: no slot became free.
            RequestConflictError: its request id came before with another body.
            RequestCancelledError: the service stops.
        """
        if request.request_id is None:
            return await self._run(request)
        self.runs.submit(request.request_id, digest_of(request), lambda: self._run(request))
        result = await self.runs.attach(request.request_id)
        assert result is not None, "without a time limit the answer is waited for"
        return result

    async def _run(self, request: ExecuteRequest, waited_s: float = 0.0) -> ExecuteResult:
        with self.rules.counting_refusals():
            limits = self.rules.limits(request, request.memory_mb)
            self.rules.check_files(request.files)
            job = Job(
                code=request.code,
                stdin=utf8(request.stdin),
                files=request.files,
                fetch=request.fetch,
                figures=request.figures,
                seed=request.seed,
            )
            async with self.rules.slot(request.deadline_s, waited_s) as queue_s:
                outcome = await self.sandbox.run(job, limits)
        return self.rules.finish(outcome, queue_s, request.request_id)

    async def execute_in_batch(self, request: ExecuteRequest, arrived_s: float) -> ExecuteResult:
        """Run one program of a batch, with a refusal or failure as a result.

        The request id only matches answers here: batches number their programs as they like.

        Args:
            arrived_s: monotonic time at which the batch came; its deadlines count from there.
        """
        waited_s = time.monotonic() - arrived_s
        try:
            return await self._run(request, waited_s)
        except tuple(REFUSALS) as error:
            outcome = Outcome(status=REFUSALS[type(error)], message=str(error))
        except Exception:  # one program must not end the batch
            logger.exception("an execution failed")
            outcome = Outcome(
                status=Status.SANDBOX_ERROR, message="the service failed, see its log"
            )
        return self.rules.to_result(outcome, 0.0, request.request_id)
