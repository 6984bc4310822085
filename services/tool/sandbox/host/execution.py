"""Run one job on one slot: feed it, drain it, stop it when a limit is hit, collect the facts.

    job written -> streams drained up to a cap -> [limit: kill the slot] -> exit facts -> ends of
    the streams

Cancelling the caller (a client that hung up) kills the slot as well. Every path ends with the slot
dead and closed.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from services.tool.sandbox import wire
from services.tool.sandbox.host.handles import ExitFacts, SlotHandle
from services.tool.sandbox.host.verdict import Outcome, Status, judge

_READ_BYTES = 1 << 16
_WATCH_AFTER_S = 0.03
_DEATH_S = 5.0
_MAX_READS = 10_000
_PIPE_BYTES = 2 << 20  # a pipe holds less; a process that keeps printing must not keep us here


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one execution may use."""

    wall_s: float
    cpu_s: int
    memory_bytes: int
    output_bytes: int
    """Of stdout and of stderr, each."""
    fetch_bytes: int
    """Of all fetched files together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What to run."""

    code: str
    stdin: bytes = b""
    files: dict[str, str] = field(default_factory=dict)
    """Relative path to base64 content."""
    fetch: list[str] = field(default_factory=list)
    seed: int | None = None


class Drain:
    """Read a pipe by callback, keep at most `cap` bytes, call `on_overflow` once when there is
    more."""

    def __init__(self, descriptor: int, cap: int, on_overflow: Callable[[], None]) -> None:
        self._descriptor = descriptor
        self._cap = cap
        self._on_overflow = on_overflow
        self._kept = bytearray()
        self.truncated = False
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._loop.add_reader(descriptor, self._on_readable)

    def _on_readable(self) -> None:
        before = self.truncated
        self._read()
        if self.truncated and not before:
            self._on_overflow()

    def drain_now(self) -> None:
        """Read what is in the pipe without waiting for its end, which others may hold open."""
        total = 0
        while total < _PIPE_BYTES and (count := self._read()):
            total += count

    def _read(self) -> int:
        """Read once and keep what there is room for. Returns bytes read; 0 when there are none."""
        if not self._open:
            return 0
        try:
            data = os.read(self._descriptor, _READ_BYTES)
        except BlockingIOError:
            return 0
        if not data:
            self.stop()
        room = self._cap - len(self._kept)
        self._kept += data[:room]
        self.truncated = self.truncated or len(data) > room
        return len(data)

    def stop(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._descriptor)

    def text(self) -> str:
        """What was printed, with bytes that are not UTF-8 replaced."""
        return self._kept.decode("utf-8", "replace")


class _Reports:
    """Collect the frames a slot sends about itself; a bad frame ends the listening, nothing
    else."""

    def __init__(self, slot: SlotHandle, max_bytes: int, *, listen: bool) -> None:
        """`listen` is for reports that may not fit the socket's buffer; others are read once, at
        the end."""
        self._job = slot.job
        self._reader = wire.FrameReader(max_bytes)
        self._loop = asyncio.get_running_loop()
        self.merged: dict[str, Any] = {}
        self._open = True
        if listen:
            self._loop.add_reader(self._job.fileno(), self._on_readable)

    def _on_readable(self) -> bool:
        """Read once; whether there was something to read."""
        try:
            data = self._job.recv(_READ_BYTES)
            for message in self._reader.feed(data):
                if "started" in self.merged:
                    message.pop("refused", None)  # foreign code says so: it runs already
                self.merged.update(wire.printable(message))
        except BlockingIOError:
            return False
        except (OSError, wire.FrameError):
            data = b""
        if not data:
            self.stop()
        return bool(data)

    def finish(self) -> None:
        """Read what is left once the sender is dead: all it sent is then in the buffer."""
        for _ in range(_MAX_READS):
            if not self._open or not self._on_readable():
                return

    def stop(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._job.fileno())


async def run(slot: SlotHandle, job: Job, limits: Limits) -> Outcome:
    """Run `job` on `slot` and close the slot. Never raises for what the code does."""
    loop = asyncio.get_running_loop()
    stopped: list[Status] = []

    def stop_for(reason: Status) -> None:
        if not stopped and not slot.exited.done():
            stopped.append(reason)
            slot.kill()

    def overflow() -> None:
        stop_for(Status.OUTPUT_LIMIT)

    streams = [
        Drain(slot.stdout, limits.output_bytes, overflow),
        Drain(slot.stderr, limits.output_bytes, overflow),
    ]
    reports = _Reports(slot, limits.fetch_bytes * 2 + (1 << 16), listen=bool(job.fetch))
    timers = [
        loop.call_later(limits.wall_s, stop_for, Status.TIMEOUT),
        loop.call_later(_WATCH_AFTER_S, slot.zygote.watch, slot, limits.memory_bytes),
    ]
    started = time.perf_counter()
    feeding = _start_feeding(slot, job, limits)
    try:
        facts = await asyncio.shield(slot.exited)
        wall_s = time.perf_counter() - started
        for stream in streams:
            stream.drain_now()
        reports.finish()
    except asyncio.CancelledError:
        slot.kill()
        await _await_death(slot)
        raise
    finally:
        for timer in timers:
            timer.cancel()
        for stream in streams:
            stream.stop()
        reports.stop()
        if feeding is not None:
            feeding.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await feeding
        slot.close()
    return _outcome(facts, streams, reports.merged, stopped, limits, wall_s)


async def _await_death(slot: SlotHandle) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(asyncio.shield(slot.exited), _DEATH_S)


def _outcome(
    facts: ExitFacts,
    streams: list[Drain],
    report: dict[str, Any],
    stopped: list[Status],
    limits: Limits,
    wall_s: float,
) -> Outcome:
    verdict = judge(
        facts, stopped=stopped[0] if stopped else None, report=report, cpu_limit_s=limits.cpu_s
    )
    stdout, stderr = streams
    files, missing = report.get("files"), report.get("missing")
    return Outcome(
        status=verdict.status,
        stdout=stdout.text(),
        stderr=stderr.text(),
        stdout_truncated=stdout.truncated,
        stderr_truncated=stderr.truncated,
        exit_code=verdict.exit_code,
        signal=verdict.signal,
        error=verdict.error,
        message=verdict.message,
        files=_texts(files),
        missing=_texts(missing),
        wall_s=wall_s,
        cpu_s=facts.cpu_s,
        peak_bytes=facts.peak_bytes,
    )


def _texts(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        return {}
    return {str(key): item for key, item in value.items() if isinstance(item, str)}


def job_message(job: Job, limits: Limits, mode: str) -> wire.Message:
    """The frame that a waiting slot understands (see jobs.py)."""
    return {
        "mode": mode,
        "code": job.code,
        "files": job.files,
        "fetch": job.fetch,
        "fetch_bytes": limits.fetch_bytes,
        "memory_bytes": limits.memory_bytes,
        "cpu_s": limits.cpu_s,
        "seed": job.seed,
    }


def _start_feeding(slot: SlotHandle, job: Job, limits: Limits) -> asyncio.Task[None] | None:
    """Write the job and standard input: at once where the buffer takes them, else in a task."""
    rest = memoryview(wire.encode(job_message(job, limits, "run")))
    with contextlib.suppress(OSError):  # a slot that has just died; its exit says so
        rest = rest[slot.job.send(rest) :]
    if rest or job.stdin:
        return asyncio.get_running_loop().create_task(_feed(slot, rest, job.stdin))
    slot.close_stdin()
    return None


async def _feed(slot: SlotHandle, rest: memoryview, stdin: bytes) -> None:
    """Write the rest of the job, then standard input. A program that reads neither is no error."""
    try:
        await asyncio.get_running_loop().sock_sendall(slot.job, rest)
        await _write_stdin(slot, stdin)
    except (BrokenPipeError, ConnectionResetError):
        return
    finally:
        slot.close_stdin()


async def _write_stdin(slot: SlotHandle, data: bytes) -> None:
    loop = asyncio.get_running_loop()
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(slot.stdin, view) :]
        except BlockingIOError:
            writable = asyncio.Event()
            loop.add_writer(slot.stdin, writable.set)
            try:
                await writable.wait()
            finally:
                loop.remove_writer(slot.stdin)
