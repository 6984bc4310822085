"""Runs one job on one slot: feed it, drain it, kill it when a limit is hit, collect the facts.

    job written -> streams drained up to a cap -> [limit: kill the slot] -> exit facts -> rest of
    the streams

Cancelling the caller (a client that hung up) kills the slot as well. Every path ends with the slot
dead and closed.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from services.tool.sandbox import wire
from services.tool.sandbox.host.slots import SlotHandle
from services.tool.sandbox.host.verdict import Outcome, Status, judge

WATCH_AFTER_S = 0.03
"""Most programs have ended by then, and cost no order to the watchdog."""
_READ_BYTES = 1 << 16
_DEATH_S = 5.0
_MAX_READS = 10_000  # a child that is about to be killed may keep writing
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
    figures: bool = False
    """Whether matplotlib's figures are returned as files."""
    seed: int | None = None


class Output:
    """What a slot prints: reads both pipes by callback and keeps at most `cap` bytes of each. Calls
    `on_overflow`, maybe several times, when there are more."""

    def __init__(self, slot: SlotHandle, cap: int, on_overflow: Callable[[], None]) -> None:
        self._cap = cap
        self._on_overflow = on_overflow
        self._kept = {slot.stdout: bytearray(), slot.stderr: bytearray()}
        self._truncated: set[int] = set()
        self._open = set(self._kept)
        self._loop = asyncio.get_running_loop()
        for pipe in self._kept:
            self._loop.add_reader(pipe, self._on_readable, pipe)

    def _on_readable(self, pipe: int) -> None:
        self._read(pipe)
        if pipe in self._truncated:
            self._on_overflow()

    def drain_now(self) -> None:
        """Read what is in the pipes without waiting for their ends, which others may hold open."""
        for pipe in self._kept:
            total = 0
            while total < _PIPE_BYTES and (count := self._read(pipe)):
                total += count

    def _read(self, pipe: int) -> int:
        """Read once and keep what there is room for. Returns bytes read; 0 when there are none."""
        if pipe not in self._open:
            return 0
        try:
            data = os.read(pipe, _READ_BYTES)
        except BlockingIOError:
            return 0
        if not data:
            self._stop(pipe)
        kept = self._kept[pipe]
        room = self._cap - len(kept)
        kept += data[:room]
        if len(data) > room:
            self._truncated.add(pipe)
        return len(data)

    def _stop(self, pipe: int) -> None:
        self._open.discard(pipe)
        self._loop.remove_reader(pipe)

    def stop(self) -> None:
        for pipe in list(self._open):
            self._stop(pipe)

    def added_to(self, outcome: Outcome) -> Outcome:
        """The outcome with what was printed; bytes that are not UTF-8 are replaced."""
        stdout, stderr = (kept.decode("utf-8", "replace") for kept in self._kept.values())
        cut = [pipe in self._truncated for pipe in self._kept]
        return replace(
            outcome, stdout=stdout, stderr=stderr, stdout_truncated=cut[0], stderr_truncated=cut[1]
        )


class _Reports:
    """Collects the frames that a slot sends about itself. A bad frame only ends the listening."""

    def __init__(self, slot: SlotHandle, max_bytes: int, *, listen: bool) -> None:
        """`listen` is for reports larger than the socket's buffer; others are read at the end."""
        self._job = slot.job
        self._reader = wire.FrameReader(max_bytes)
        self._loop = asyncio.get_running_loop()
        self.merged: dict[str, Any] = {}
        self._open = True
        if listen:
            self._loop.add_reader(self._job.fileno(), self._on_readable)

    def _on_readable(self) -> bool:
        """Read once. Returns whether there was something to read."""
        try:
            data = self._job.recv(_READ_BYTES)
            for message in self._reader.feed(data):
                if "started" in self.merged:
                    message.pop("refused", None)  # forged: the code was running already
                self.merged.update(wire.printable(message))
        except BlockingIOError:
            return False
        except (OSError, wire.FrameError):
            data = b""
        if not data:
            self.stop()
        return bool(data)

    def finish(self) -> None:
        """Read the rest once the sender is dead: all that it sent is in the buffer by then."""
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
        # Only the first limit counts, and none for a program that ended by itself just before.
        if not stopped and not slot.exited.done():
            stopped.append(reason)
            slot.kill()

    output = Output(slot, limits.output_bytes, lambda: stop_for(Status.OUTPUT_LIMIT))
    # Twice the files: base64 and JSON make them larger. The rest is for the error's description.
    reports = _Reports(
        slot, limits.fetch_bytes * 2 + (1 << 16), listen=bool(job.fetch) or job.figures
    )
    # Before the timers start: a program that ran into its time limit has run at least as long.
    started = time.perf_counter()
    timers = [
        loop.call_later(limits.wall_s, stop_for, Status.TIMEOUT),
        loop.call_later(WATCH_AFTER_S, slot.watch, limits.memory_bytes),
    ]
    feeding = _start_feeding(slot, job, limits)
    try:
        # Shielded: the slot's end belongs to the pool as well, and is awaited again after a cancel.
        facts = await asyncio.shield(slot.exited)
        wall_s = time.perf_counter() - started
        # The exit may be known before the last bytes were read.
        output.drain_now()
        reports.finish()
    except asyncio.CancelledError:
        slot.kill()
        # The caller's place in the queue is free after this, so the slot has to be gone.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(slot.exited), _DEATH_S)
        raise
    finally:
        for timer in timers:
            timer.cancel()
        # Readers go before the descriptors: the loop must not poll a number that is used again.
        output.stop()
        reports.stop()
        if feeding is not None:
            feeding.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await feeding
        slot.close()
    report = reports.merged
    limit = stopped[0] if stopped else None
    outcome = judge(facts, stopped=limit, report=report, cpu_limit_s=limits.cpu_s)
    files, missing = texts(report.get("files")), texts(report.get("missing"))
    return output.added_to(replace(outcome, files=files, missing=missing, wall_s=wall_s))


def texts(value: Any) -> dict[str, str]:
    """The texts of a mapping that untrusted code may have written."""
    if not isinstance(value, dict):
        return {}
    return {str(key): item for key, item in value.items() if isinstance(item, str)}


def job_message(job: Job, limits: Limits, mode: str) -> wire.Message:
    """The frame that a waiting slot understands (inside/slot.py)."""
    return {
        "mode": mode,
        "code": job.code,
        "files": job.files,
        "fetch": job.fetch,
        "figures": job.figures,
        "fetch_bytes": limits.fetch_bytes,
        "memory_bytes": limits.memory_bytes,
        "cpu_s": limits.cpu_s,
        "seed": job.seed,
    }


def _start_feeding(slot: SlotHandle, job: Job, limits: Limits) -> asyncio.Task[None] | None:
    """Write the job at once if the socket's buffer takes it; the rest and stdin in a task."""
    rest = memoryview(wire.encode(job_message(job, limits, "run")))
    with contextlib.suppress(OSError):  # the slot has just died, and its exit says so
        rest = rest[slot.job.send(rest) :]
    if rest or job.stdin:
        return asyncio.get_running_loop().create_task(_feed(slot, rest, job.stdin))
    slot.close_stdin()
    return None


async def _feed(slot: SlotHandle, rest: memoryview, stdin: bytes) -> None:
    """Write the rest of the job, then stdin. It is no error when the program ends before."""
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(slot.job, rest)
        view = memoryview(stdin)
        while view:
            try:
                view = view[os.write(slot.stdin, view) :]
            except BlockingIOError:  # the pipe is full: wait until the program reads
                writable = asyncio.Event()
                loop.add_writer(slot.stdin, writable.set)
                await writable.wait()
                loop.remove_writer(slot.stdin)
    except (BrokenPipeError, ConnectionResetError):
        return
    finally:
        loop.remove_writer(slot.stdin)
        slot.close_stdin()
