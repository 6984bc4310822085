"""One session on the API side: a slot whose supervisor runs cell after cell (inside/supervisor.py).

run_cell -> "cell" -> ... -> done | died | [limit: interrupt -> died] | [no answer: kill the slot,
session lost]
"""

import asyncio
import base64
import os
import signal
import time
from dataclasses import dataclass, replace
from typing import Any

from services.tool.sandbox import wire
from services.tool.sandbox.host.execution import Job, Limits, Output, job_message, texts
from services.tool.sandbox.host.slots import SlotHandle
from services.tool.sandbox.host.verdict import (
    CpuTime,
    ExitFacts,
    Outcome,
    Status,
    as_seconds,
    as_wait_status,
    judge_stop,
    judge_wait_status,
)

_INTERRUPT_S = 2.0  # more than the supervisor waits for a cell to start
_FILE_S = 10.0
_DIED_BETWEEN = (
    "the interpreter died after the cell before, so this cell did not run; the next one starts with"
    " an empty state"
)
_OPEN_S = 10.0


def total_bytes(memory_bytes: int) -> int:
    """What all processes of a session may hold together, when each may hold `memory_bytes`.

    While a cell runs, the snapshot keeps the old copy of every page that the cell changes.
    """
    return 2 * memory_bytes


class SessionLostError(RuntimeError):
    """The session's processes are gone, and its state with them."""


class SessionFileError(ValueError):
    """A file operation was refused; `missing` is True if the file does not exist."""

    def __init__(self, message: str, *, missing: bool) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True, slots=True, kw_only=True)
class CellOutcome:
    """The result of one cell."""

    outcome: Outcome
    result: str | None = None
    """repr of the last expression, when the cell ended with one that is not None."""
    snapshot: bool = False
    """Whether the state before the cell was kept while it ran."""
    rolled_back: bool = False
    """Whether the state is that before the cell."""
    state_lost: bool = False
    """Whether the interpreter's state is gone (files are kept as long as the session lives)."""


class SandboxSession:
    """A persistent interpreter in a slot of its own. One call at a time."""

    def __init__(self, slot: SlotHandle, limits: Limits) -> None:
        self._slot = slot
        self._limits = limits
        self._reader = wire.FrameReader(limits.fetch_bytes * 2 + (1 << 20))
        self._inbox: list[wire.Message] = []
        self._closed = False

    @classmethod
    async def open(cls, slot: SlotHandle, limits: Limits, seed: int | None) -> "SandboxSession":
        """Turn a waiting slot into a session. Raises SessionLostError."""
        session = cls(slot, limits)
        slot.close_stdin()
        # A program's slot is replaced when it ends; a session would keep this one for its lifetime.
        slot.zygote.refill()
        await session._send(job_message(Job(code="", seed=seed), limits, "session"))
        answer = await session._answer(_OPEN_S)
        if not answer.get("opened"):
            session.close()
            raise SessionLostError("the sandbox could not open a session")
        slot.watch(
            total_bytes(limits.memory_bytes)
        )  # between cells as well: a cell may leave processes
        return session

    @property
    def alive(self) -> bool:
        return not self._closed and not self._slot.exited.done()

    async def run_cell(
        self, code: str, step: int, limits: Limits, *, figures: bool = False
    ) -> CellOutcome:
        """Run one cell. A lost session is told in the outcome, never raised.

        Args:
            figures: whether matplotlib's figures are returned as files.
        """
        overflow = asyncio.Event()
        output = Output(self._slot, limits.output_bytes, overflow.set)
        started = time.perf_counter()
        stopped: Status | None = None
        try:
            order = {"op": "cell", "code": code, "step": step, "cpu_s": limits.cpu_s}
            await self._send({**order, "figures": figures})
            stopped, answer = await self._wait_for_cell(limits.wall_s, overflow)
        except SessionLostError:
            answer = {"lost_session": True}
            await asyncio.wait([self._slot.exited], timeout=_INTERRUPT_S)  # the kernel knows why
        except asyncio.CancelledError:
            # Nobody will know how far the cell came, so its state is of no use.
            self.close()
            raise
        finally:
            if not self._closed:
                output.drain_now()
            output.stop()
        wall_s = time.perf_counter() - started
        lost_session = bool(answer.get("lost_session"))
        if answer.get("done") and stopped is Status.TIMEOUT:
            stopped = None  # it ended while the interrupt was on its way
        if lost_session:
            self.close()
        outcome = _judge_cell(answer, stopped, self._slot, limits)
        result, done = answer.get("result"), bool(answer.get("done"))
        lost = lost_session or bool(answer.get("lost"))
        return CellOutcome(
            outcome=replace(output.added_to(outcome), wall_s=wall_s),
            result=result if isinstance(result, str) else None,
            snapshot=bool(answer.get("snapshot")),
            rolled_back=not done and not lost,
            state_lost=not done and lost,
        )

    async def write_file(self, path: str, content: bytes) -> None:
        """Write a file below the working folder. Raises SessionFileError, SessionLostError."""
        data = base64.b64encode(content).decode("ascii")
        await self._file({"op": "put", "path": path, "data": data})

    async def read_file(self, path: str) -> bytes:
        """Read a regular file. Raises SessionFileError, SessionLostError."""
        reply = await self._file({"op": "get", "path": path, "max_bytes": self._limits.fetch_bytes})
        if not isinstance(reply, str):
            raise self._confused()
        try:
            return base64.b64decode(reply, validate=True)
        except ValueError as error:
            raise self._confused() from error

    async def take_figures(self) -> tuple[dict[str, str], dict[str, str]]:
        """Take the figures of the cells before: base64 by name, and the reasons for missing ones.

        Raises:
            SessionLostError: the session is dead.
        """
        reply = await self._file({"op": "figures", "max_bytes": self._limits.fetch_bytes})
        if not isinstance(reply, dict):
            raise self._confused()
        return texts(reply.get("files")), texts(reply.get("missing"))

    async def list_files(self) -> list[dict[str, Any]]:
        """Paths and sizes below the working folder. Raises SessionLostError."""
        reply = await self._file({"op": "list"})
        if not isinstance(reply, list) or not all(map(_is_listed_file, reply)):
            raise self._confused()
        return reply

    def close(self) -> None:
        """Kill the slot and close its descriptors. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._slot.kill()
        self._slot.close()

    def _confused(self) -> SessionLostError:
        """End a session whose answer does not fit the question: untrusted code has forged it."""
        self.close()
        return SessionLostError("the session sent a malformed answer, so it was ended")

    async def _wait_for_cell(
        self, wall_s: float, overflow: asyncio.Event
    ) -> tuple[Status | None, wire.Message]:
        answering = asyncio.ensure_future(self._answer(None))
        flooding = asyncio.ensure_future(overflow.wait())
        try:
            done, _ = await asyncio.wait(
                {answering, flooding}, timeout=wall_s, return_when=asyncio.FIRST_COMPLETED
            )
            if answering in done:
                return None, answering.result()
            stopped = Status.OUTPUT_LIMIT if flooding in done else Status.TIMEOUT
            # The supervisor kills the cell and says so; the state from before the cell survives.
            self._slot.resume()
            await self._send({"op": "interrupt"})
            try:
                return stopped, await asyncio.wait_for(answering, _INTERRUPT_S)
            except TimeoutError:
                return stopped, {"lost_session": True}
        finally:
            for task in (answering, flooding):
                task.cancel()
            await asyncio.wait({answering, flooding})

    async def _send(self, message: wire.Message) -> None:
        if not self.alive:
            raise SessionLostError("the session's processes are gone")
        try:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(self._slot.job, wire.encode(message))
        except OSError as error:
            raise SessionLostError("the session's supervisor is gone") from error

    async def _answer(self, timeout_s: float | None) -> wire.Message:
        """Wait for one frame from the supervisor. Raises SessionLostError."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s):
                while not self._inbox:
                    data = await loop.sock_recv(self._slot.job, 1 << 16)
                    if not data:
                        raise SessionLostError("the session's supervisor is gone")
                    self._inbox += map(wire.printable, self._reader.feed(data))
        except (OSError, wire.FrameError) as error:
            raise SessionLostError(f"the session does not answer: {error}") from error
        return self._inbox.pop(0)

    async def _file(self, message: wire.Message) -> Any:
        await self._send(message)
        answer = await self._answer(_FILE_S)
        if "refused" in answer:
            raise SessionFileError(str(answer["refused"]), missing=bool(answer.get("missing")))
        return answer.get("reply")


def _judge_cell(
    answer: wire.Message, stopped: Status | None, slot: SlotHandle, limits: Limits
) -> Outcome:
    # What the kernel said of the whole slot comes before what its supervisor says of the cell.
    if slot.exited.done() and slot.exited.result().memory:
        return Outcome(status=Status.MEMORY_LIMIT, message="memory limit exceeded")
    cpu_s = _amount(answer.get("cpu_s"))
    if answer.get("unrun"):
        return Outcome(status=Status.CRASHED, message=_DIED_BETWEEN)
    if stopped is not None:
        outcome = judge_stop(stopped)
    elif answer.get("lost_session"):
        return _judge_lost_session(slot)
    else:
        status = as_wait_status(answer.get("died"))
        if status is None:
            code = answer.get("exit_code")
            status = (code & 0xFF) << 8 if isinstance(code, int) else 0
        over_s = as_seconds(answer.get("over_s"))
        cpu = CpuTime(used_s=cpu_s, limit_s=limits.cpu_s, over_s=over_s)
        outcome = judge_wait_status(status, cpu, answer.get("error"))
    return replace(outcome, cpu_s=cpu_s, peak_bytes=int(_amount(answer.get("peak_bytes"))))


def _judge_lost_session(slot: SlotHandle) -> Outcome:
    """A session whose supervisor is dead, or does not answer."""
    facts = slot.exited.result() if slot.exited.done() else ExitFacts(lost=True)
    if facts.lost or not os.WIFSIGNALED(facts.status):
        return Outcome(status=Status.SANDBOX_ERROR, message="the session's processes died")
    # Nobody but the session's own code sends signals to its supervisor.
    name = signal.Signals(os.WTERMSIG(facts.status)).name
    message = f"the session's code ended the session with {name}"
    return Outcome(status=Status.CRASHED, signal=name, message=message)


def _is_listed_file(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("path"), str)
        and isinstance(item.get("size_bytes"), int)
    )


def _amount(value: Any) -> float:
    """A number that untrusted code may have written; 0 for anything that cannot be one."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 2**50 else 0.0
