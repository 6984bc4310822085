"""The tool service as an episode's interpreter.

A mistake of the policy comes back as a result that it can read. A failure of the service is
retried and never shown to the policy; when it persists, the episode is lost by name.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from openrlhf_alp.clients.errors import RequestRejected, ServiceUnavailable
from openrlhf_alp.clients.tool import ToolClient, ToolSession
from openrlhf_alp.episodes.observation import CodeResult, CodeStatus
from openrlhf_alp.episodes.records import ToolLostError
from services.tool.wire.schemas import CellResult, ExecuteRequest, ExecuteResult, SessionRequest

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""Number of times a program is run whose sandbox fails; then the episode is lost."""

_TOO_LARGE, _GONE = 413, 410


class StatelessInterpreter:
    """A fresh interpreter for every program."""

    def __init__(self, client: ToolClient, *, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s

    async def run(self, code: str) -> CodeResult:
        """Run `code` in a fresh interpreter; see `episodes.protocols.Interpreter`.

        Raises:
            ToolLostError: `tool_unavailable` or `tool_sandbox_error`.
            RequestRejected: `--tool.timeout_s` is above the service's limit, or the key is wrong.
        """
        request = ExecuteRequest(code=code, timeout_s=self._timeout_s)
        for _ in range(ATTEMPTS):
            try:
                answer = await self._client.execute(request)
            except RequestRejected as error:
                return _refused(error)
            except ServiceUnavailable as error:
                raise _unavailable(error) from error
            if not _sandbox_failed(answer):
                return code_result(answer)
            # A fresh interpreter holds no state, so running the program again is safe.
            logger.warning("a sandbox failed, the program runs again: %s", answer.message)
        raise ToolLostError(reason="tool_sandbox_error", detail=answer.message)

    async def close(self) -> None:
        """Do nothing: no state is kept between programs."""


@dataclass(frozen=True, slots=True)
class _Cell:
    """A cell that ran, and what the policy was shown."""

    code: str
    shown: CodeResult

    def repeats(self, again: CodeResult) -> bool:
        # stderr is not compared: tracebacks and warnings may name addresses and line numbers.
        return all(
            getattr(self.shown, name) == getattr(again, name)
            for name in ("status", "stdout", "result")
        )


class SessionInterpreter:
    """One interpreter for all programs of an episode, which keeps variables and files.

    When a session is lost with its server or its sandbox, the cells so far run again in a new one.
    If one of them then prints something other than what the policy was shown, the episode is lost,
    because its transcript would not follow from its state.
    """

    def __init__(self, client: ToolClient, *, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._session: ToolSession | None = None
        self._cells: list[_Cell] = []

    async def run(self, code: str) -> CodeResult:
        """Run `code` as the next cell, exactly once.

        Raises:
            ToolLostError: `tool_unavailable`, `tool_sandbox_error` or `tool_state_lost`.
            RequestRejected: `--tool.timeout_s` is above the service's limit, or the key is wrong.
        """
        detail = "its session could not be restored"
        for _ in range(ATTEMPTS):
            try:
                session = self._session or await self._restore()
                if session is None:
                    continue
                answer = await session.run(code, timeout_s=self._timeout_s)
            except RequestRejected as error:
                if error.status != _GONE:
                    return _refused(error)
                # The server restarted or evicted the session: the next attempt restores it.
                self._session, detail = None, str(error)
                continue
            except ServiceUnavailable as error:
                raise _unavailable(error) from error
            if not _sandbox_failed(answer):
                shown = code_result(answer)
                self._cells.append(_Cell(code, shown))
                return shown
            detail = answer.message
            # Without this flag the failed cell has changed nothing, and the session can be reused.
            if answer.state_lost:
                self._session = None
        raise ToolLostError(reason="tool_sandbox_error", detail=detail)

    async def close(self) -> None:
        """End the session; a service that has stopped has ended it already."""
        session, self._session = self._session, None
        if session is not None:
            try:
                await session.close()
            except (RequestRejected, ServiceUnavailable) as error:
                logger.warning("a tool session is left to its time limit: %s", error)

    async def _restore(self) -> ToolSession | None:
        """Return a session in which every cell so far has run; None when its sandbox failed too."""
        session = await self._client.open_session(SessionRequest())
        for cell in self._cells:
            again = await session.run(cell.code, timeout_s=self._timeout_s)
            if _sandbox_failed(again):
                await session.close()
                return None
            if not cell.repeats(code_result(again)):
                await session.close()
                raise ToolLostError(
                    reason="tool_state_lost",
                    detail="a session was lost and its cells do not repeat what they printed",
                )
        self._session = session
        return session


def code_result(answer: ExecuteResult) -> CodeResult:
    """Convert the service's answer into the episode's record."""
    return CodeResult(
        status=CodeStatus(answer.status),
        stdout=answer.stdout,
        stderr=answer.stderr,
        result=answer.result if isinstance(answer, CellResult) else None,
        message=answer.message,
        run_s=answer.usage.wall_ms / 1e3,
    )


def _sandbox_failed(answer: ExecuteResult) -> bool:
    return answer.status in ("sandbox_error", "overloaded")


def _refused(error: RequestRejected) -> CodeResult:
    """Tell the policy that its program is too long; any other refusal is our mistake: raise it."""
    if error.status != _TOO_LARGE and error.field != "code":
        raise error
    return CodeResult(status=CodeStatus.REJECTED, message="the program is too long")


def _unavailable(error: ServiceUnavailable) -> ToolLostError:
    return ToolLostError(reason="tool_unavailable", detail=str(error))
