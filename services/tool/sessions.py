"""Live sessions: ids, steps that run exactly once, idle time, eviction, end.

A session ends by DELETE, after its TTL without a call, by eviction (the longest idle one when the
cap is reached), or with its processes. Its id is then answered with the reason, for as long as the
tombstone is kept.
"""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

from services.common.idempotent import KeptAnswers
from services.tool.kept import size_bytes
from services.tool.rules import ExecutionRules, utf8
from services.tool.sandbox.host.pool import Sandbox
from services.tool.sandbox.host.session import (
    SandboxSession,
    SessionFileError,
    SessionLostError,
    total_bytes,
)
from services.tool.sandbox.host.slots import SlotFailedError, ZygoteLostError
from services.tool.sandbox.host.verdict import Outcome
from services.tool.wire.schemas import (
    CellRequest,
    CellResult,
    FileInfo,
    SessionInfo,
    SessionRequest,
)

_ID_BYTES = 16
_MAX_TOMBSTONES = 10_000
_KEPT_STEPS = 4  # callers repeat only their last steps
_SWEEP_S = 1.0


OPENING_ERRORS = (SlotFailedError, ZygoteLostError, SessionLostError)
"""What `Sessions.open` raises when the sandbox itself failed."""


class SessionGoneError(LookupError):
    """There is no live session with this id."""


class SessionExpiredError(SessionGoneError):
    """The session ended; the message says why."""


class SessionUnknownError(SessionGoneError):
    """The id was never given out, or its end is forgotten."""


class StepConflictError(ValueError):
    """The step number does not follow, or came before with other code."""


class SessionsFullError(RuntimeError):
    """The cap is reached and every session is busy."""

    retry_after_s = 1.0


@dataclass(slots=True, kw_only=True)
class Session:
    """One live session."""

    session_id: str
    sandbox: SandboxSession
    ttl_s: float
    memory_mb: int | None
    unclaimed: bool = False
    """True until a caller refers to the id; such sessions are evicted first."""
    last_used: float = field(default_factory=time.monotonic)
    next_step: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def idle_s(self) -> float:
        return time.monotonic() - self.last_used


class Sessions:
    """The registry of sessions of one service."""

    def __init__(self, rules: ExecutionRules, sandbox: Sandbox) -> None:
        self._rules = rules
        self._sandbox = sandbox
        self._live: dict[str, Session] = {}
        self._opening = 0
        self._tombstones: OrderedDict[str, str] = OrderedDict()
        # Of all sessions together: each answer may be tens of megabytes.
        self._answers: KeptAnswers[CellResult] = KeptAnswers(
            size_bytes, rules.settings.keep_bytes // 2
        )
        self.num_evicted = 0
        """Sessions ended because another one needed their place."""

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, session_id: str) -> bool:
        return session_id in self._live

    @contextlib.asynccontextmanager
    async def sweeping(self) -> AsyncIterator[None]:
        """End idle sessions in the background while inside; end all on leaving."""
        task = asyncio.get_running_loop().create_task(self._sweep())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            for session_id in list(self._live):
                self.end(session_id, "the service stopped")

    async def open(self, request: SessionRequest, *, unclaimed: bool = False) -> Session:
        """Open a session. Raises SessionsFullError, LimitError or one of OPENING_ERRORS."""
        limits = self._rules.limits(CellRequest(code=""), request.memory_mb)
        settings = self._rules.settings
        self._make_room(settings.max_sessions)
        # Sessions on their way count too, or a burst of requests would exceed the cap.
        self._opening += 1
        try:
            # The zygote with most libraries: nobody knows yet what the session will import.
            largest = settings.sandbox.presets[-1]
            slot = await self._sandbox.take(largest, total_bytes(limits.memory_bytes))
            sandbox = await SandboxSession.open(slot, limits, request.seed)
        finally:
            self._opening -= 1
        session = Session(
            session_id=secrets.token_hex(_ID_BYTES),
            sandbox=sandbox,
            ttl_s=min(request.ttl_s or settings.session_ttl_s, settings.session_ttl_s),
            memory_mb=request.memory_mb,
            unclaimed=unclaimed,
        )
        self._live[session.session_id] = session
        return session

    def get(self, session_id: str) -> Session:
        """Find a session and reset its idle clock. Raises SessionGoneError."""
        session = self._live.get(session_id)
        if session is None:
            reason = self._tombstones.get(session_id)
            if reason is None:
                raise SessionUnknownError("no session has this id")
            raise SessionExpiredError(reason)
        session.last_used = time.monotonic()
        return session

    def end(self, session_id: str, reason: str) -> None:
        """Kill a session and remember why. Raises SessionGoneError."""
        session = self._live.pop(session_id, None)
        if session is None:
            self.get(session_id)  # raises, with the reason of the earlier end
            return
        session.sandbox.close()
        for step in range(session.next_step - _KEPT_STEPS, session.next_step):
            self._answers.drop((session_id, step))
        self._tombstones[session_id] = reason
        while len(self._tombstones) > _MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)

    def info(self, session: Session) -> SessionInfo:
        """The wire form of a session."""
        return SessionInfo(
            session_id=session.session_id,
            next_step=session.next_step,
            idle_s=round(session.idle_s, 3),
            ttl_s=session.ttl_s,
            isolation=self._rules.level,
        )

    async def run_cell(self, session_id: str, request: CellRequest) -> CellResult:
        """Run one cell exactly once. Raises SessionGoneError, StepConflictError, LimitError,
        OverloadedError.
        """
        digest = hashlib.sha256(utf8(request.code)).digest()
        with self._rules.counting_refusals():
            limits = self._rules.limits(request, self.get(session_id).memory_mb)
            async with self.get(session_id).lock:
                # The session may have ended while this cell waited for the one before.
                session = self.get(session_id)
                stored = self._stored_answer(session, request.step, digest)
                if stored is not None:
                    return stored
                step = session.next_step
                # Admission comes after the lock: a cell that waits for its session holds no slot.
                async with self._rules.slot(request.deadline_s) as queue_s:
                    try:
                        cell = await session.sandbox.run_cell(
                            request.code, step, limits, figures=request.figures
                        )
                        outcome = await _with_figures(session, cell.outcome, request)
                    except asyncio.CancelledError:
                        # The cell ran in part, so the state is that of no step.
                        self.end(session_id, "a caller hung up while a cell was running")
                        raise
                answer = CellResult(
                    **self._rules.finish(outcome, queue_s, None).model_dump(),
                    session_id=session_id,
                    step=step,
                    result=cell.result,
                    snapshot=cell.snapshot,
                    rolled_back=cell.rolled_back,
                    state_lost=cell.state_lost,
                    replayed=False,
                )
                self._remember(session, step, digest, answer)
                # The idle clock starts at the end of a cell, which may take longer than the TTL.
                session.last_used = time.monotonic()
                if not session.sandbox.alive:
                    self.end(session_id, f"its processes died in step {step}: {answer.status}")
                return answer

    async def list_files(self, session_id: str) -> list[FileInfo]:
        """Files below the working folder. Raises SessionGoneError, SessionLostError."""
        session = self.get(session_id)
        async with session.lock:
            listed = await session.sandbox.list_files()
        return [FileInfo.model_validate(item) for item in listed]

    async def read_file(self, session_id: str, path: str) -> bytes:
        """Read a regular file. Raises SessionFileError and as `list_files`."""
        session = self.get(session_id)
        async with session.lock:
            return await session.sandbox.read_file(path)

    async def write_file(self, session_id: str, path: str, content: bytes) -> None:
        """Write a file. Raises LimitError, SessionFileError and as `list_files`."""
        session = self.get(session_id)
        self._rules.check("files", len(content), self._rules.settings.max_file_bytes)
        async with session.lock:
            await session.sandbox.write_file(path, content)

    def _make_room(self, cap: int) -> None:
        if len(self._live) + self._opening < cap:
            return
        idle = [session for session in self._live.values() if not session.lock.locked()]
        if not idle:
            raise SessionsFullError(f"all {cap} sessions are running cells")
        # First the sessions that no caller came back to, then the one idle longest.
        oldest = max(idle, key=lambda session: (session.unclaimed, session.idle_s))
        self.num_evicted += 1
        self.end(oldest.session_id, f"ended to make room: {cap} sessions are the cap")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            for session in list(self._live.values()):
                if session.lock.locked():
                    continue  # busy; run_cell notices itself when the processes die
                if not session.sandbox.alive:
                    self.end(session.session_id, "its processes died")
                elif session.idle_s > session.ttl_s:
                    self.end(session.session_id, f"idle for more than {session.ttl_s:g} s")

    def _stored_answer(
        self, session: Session, step: int | None, digest: bytes
    ) -> CellResult | None:
        """The answer of a repeated step, or None when the step is the next one."""
        if step is None or step == session.next_step:
            return None
        kept = self._answers.get((session.session_id, step))
        if kept is not None:
            known, answer = kept
            if known != digest:
                raise StepConflictError(f"step {step} was run before with other code")
            return answer.model_copy(update={"replayed": True})
        if step > session.next_step:
            raise StepConflictError(f"step {step} came, step {session.next_step} is next")
        raise StepConflictError(f"step {step} is too old to be replayed")

    def _remember(self, session: Session, step: int, digest: bytes, answer: CellResult) -> None:
        session.next_step = step + 1
        self._answers.put((session.session_id, step), digest, answer)
        self._answers.drop((session.session_id, step - _KEPT_STEPS))


async def _with_figures(session: Session, outcome: Outcome, request: CellRequest) -> Outcome:
    """Add the figures of a cell, also of one that was killed after it showed some."""
    if not request.figures or not session.sandbox.alive:
        return outcome
    try:
        files, missing = await session.sandbox.take_figures()
    except (SessionFileError, SessionLostError) as error:
        files, missing = {}, {"figure-1.png": str(error)}
    return replace(outcome, files=files, missing=missing)
