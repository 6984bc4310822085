"""The API process's end of the sandbox: one handle per launcher, zygote and slot.

    LauncherHandle  the process; its death ends every zygote below it
      ZygoteHandle  a channel, a pool of slots that are fenced and waiting
        SlotHandle  descriptors of one slot and the facts of its end

All of it lives on one event loop and blocks nowhere: channels are non-blocking and read by
callbacks.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from services.tool.sandbox import channel, wire
from services.tool.sandbox.plan import Plan

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
    "LD_BIND_NOW": "1",
    "MPLBACKEND": "Agg",
}
"""Everything a snippet finds in os.environ, besides HOME and TMPDIR."""

_DESCRIPTORS_PER_SLOT = 5


class ZygoteLostError(ConnectionError):
    """The zygote died before it could hand out a slot: nothing ran, another one may be asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitFacts:
    """What the kernel says about the end of a slot's first process."""

    status: int = 0
    """Wait status as of wait4."""
    cpu_s: float = 0.0
    peak_bytes: int = 0
    memory: bool = False
    """Whether the watchdog killed it for its memory."""
    lost: bool = False
    """The zygote died first, so nobody knows how the slot ended (the kernel killed it)."""


@dataclass(slots=True, kw_only=True)
class SlotHandle:
    """A slot: write the job, read the streams, wait for the facts."""

    zygote: "ZygoteHandle"
    number: int
    job: socket.socket
    stdin: int
    stdout: int
    stderr: int
    kill_fd: int
    exited: asyncio.Future[ExitFacts]
    fenced: bool = False
    """Whether its first frame said that every fence stands."""
    failure: str = "a slot died before it was fenced"
    """Why it never will be."""
    taken: bool = False
    """Whether somebody outside of the pool has it and will close it."""

    def kill(self) -> None:
        """Kill every process of the slot (level full), or its first one and, when that is reaped,
        the rest."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.kill_fd, signal.SIGKILL)

    def close_stdin(self) -> None:
        if self.stdin >= 0:
            os.close(self.stdin)
            self.stdin = -1

    def close(self) -> None:
        """Close the descriptors. The slot must be dead or be killed first."""
        self.close_stdin()
        self.job.close()
        for descriptor in (self.stdout, self.stderr, self.kill_fd):
            os.close(descriptor)


@dataclass(slots=True, kw_only=True)
class ZygoteHandle:
    """One zygote as the API process sees it."""

    preset: str
    link: socket.socket
    target: int
    """Slots to keep waiting."""
    on_lost: Callable[[], None]
    ready: asyncio.Future[int]
    """Done when it forks; the ranges of its memory that huge pages back."""
    ordered: int = 0
    """Slots asked for and not there yet."""
    slots: dict[int, SlotHandle] = field(default_factory=dict)
    """Live slots by number, whether waiting, running or serving a session."""
    warm: deque[SlotHandle] = field(default_factory=deque)
    waiters: deque[asyncio.Future[SlotHandle]] = field(default_factory=deque)
    alive: bool = True

    def listen(self) -> None:
        asyncio.get_running_loop().add_reader(self.link.fileno(), self._on_packet)

    def refill(self) -> None:
        """Order the slots that are missing. Not called when one is handed out but when its program
        has ended or its session is open: a fork would delay what just started."""
        while self.alive and len(self.warm) + self.ordered < self.target + len(self.waiters):
            self.ordered += 1
            self._order(channel.SPAWN)

    def watch(self, slot: SlotHandle, limit_bytes: int) -> None:
        """Ask the zygote to watch the memory of a slot that has been running for a while; 0 ends
        it.
        """
        if self.alive:
            self._order(channel.WATCH, slot.number, limit_bytes)

    async def take(self) -> SlotHandle:
        """Take a waiting slot, or the next to come. Raises ZygoteLostError."""
        if not self.alive:
            raise ZygoteLostError(f"zygote {self.preset} is gone")
        if self.warm:
            slot = self.warm.popleft()
            slot.taken = True
            return slot
        waiter: asyncio.Future[SlotHandle] = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        self.refill()
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter in self.waiters:
                self.waiters.remove(waiter)
            elif not waiter.cancelled() and waiter.exception() is None:
                self._offer(waiter.result())
            raise

    def close(self) -> None:
        """Forget the zygote: fail what waits, report every live slot as lost."""
        if not self.alive:
            return
        self.alive = False
        asyncio.get_running_loop().remove_reader(self.link.fileno())
        self.link.close()
        error = ZygoteLostError(f"zygote {self.preset} is gone")
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_exception(error)
        for slot in list(self.slots.values()):
            self._finish(slot, ExitFacts(lost=True))
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # retrieved: a caller that gave up must not cause a warning

    def _order(self, kind: bytes, slot: int = 0, limit_bytes: int = 0) -> None:
        try:
            self.link.send(channel.ORDER.pack(kind, slot, limit_bytes))
        except OSError:
            self.on_lost()

    def _on_packet(self) -> None:
        while self.alive:
            try:
                data, descriptors, _, _ = socket.recv_fds(
                    self.link, channel.EVENT.size, _DESCRIPTORS_PER_SLOT
                )
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.on_lost()
                return
            self._on_event(channel.Event(*channel.EVENT.unpack(data)), descriptors)

    def _on_event(self, event: channel.Event, descriptors: list[int]) -> None:
        if event.kind == channel.READY:
            self.ready.set_result(event.slot)
        elif event.kind == channel.SLOT:
            self._adopt(event.slot, descriptors)
        elif event.slot in self.slots:
            facts = ExitFacts(
                status=event.status,
                cpu_s=event.cpu_s,
                peak_bytes=event.peak_bytes,
                memory=event.memory,
            )
            self._finish(self.slots[event.slot], facts)

    def _adopt(self, number: int, descriptors: list[int]) -> None:
        loop = asyncio.get_running_loop()
        job_fd, stdin, stdout, stderr, kill_fd = descriptors
        job = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=job_fd)
        job.setblocking(False)
        for descriptor in (stdin, stdout, stderr):
            os.set_blocking(descriptor, False)
        slot = SlotHandle(
            zygote=self,
            number=number,
            job=job,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            kill_fd=kill_fd,
            exited=loop.create_future(),
        )
        self.slots[number] = slot
        loop.add_reader(job.fileno(), self._on_fenced, slot, wire.FrameReader(1 << 16))

    def _on_fenced(self, slot: SlotHandle, reader: wire.FrameReader) -> None:
        """The slot's first frame says that its fences stand, or which one does not."""
        try:
            messages = reader.feed(slot.job.recv(1 << 16))
        except (OSError, wire.FrameError):
            messages = []
        asyncio.get_running_loop().remove_reader(slot.job.fileno())
        if messages and messages[0].get("ready") is True:
            slot.fenced = True
            self.ordered -= 1
            self._offer(slot)
            return
        if not messages:
            return  # it died: the zygote will say so, or is dead itself
        slot.failure = f"the sandbox could not fence a slot: {messages[0].get('failed')}"
        logger.error("%s", slot.failure)
        slot.kill()

    def _offer(self, slot: SlotHandle) -> None:
        slot.taken = True
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                waiter.set_result(slot)
                return
        slot.taken = False
        self.warm.append(slot)

    def _fail_waiter(self, error: Exception) -> None:
        while self.waiters:
            waiter = self.waiters.popleft()
            if not waiter.done():
                waiter.set_exception(error)
                return

    def _finish(self, slot: SlotHandle, facts: ExitFacts) -> None:
        self.slots.pop(slot.number, None)
        if not slot.exited.done():
            slot.exited.set_result(facts)
        if not slot.taken:
            asyncio.get_running_loop().remove_reader(slot.job.fileno())
            slot.close()
            if slot in self.warm:
                self.warm.remove(slot)
        if facts.lost:
            return
        if slot.fenced:
            self.refill()
            return
        self.ordered -= 1
        self._fail_waiter(SlotFailedError(slot.failure))


class SlotFailedError(RuntimeError):
    """A fence could not be put up. The snippet never ran and is not run behind fewer fences."""


@dataclass(slots=True, kw_only=True)
class LauncherHandle:
    """One launcher process with its zygotes."""

    process: subprocess.Popen[bytes]
    zygotes: dict[str, ZygoteHandle]
    alive: bool = True

    @classmethod
    def start(cls, plan: Plan, warm_slots: int, on_lost: Callable[[], None]) -> "LauncherHandle":
        """Start the process and its channels; returns before the zygotes are ready."""
        loop = asyncio.get_running_loop()
        pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in plan.presets]
        plan.channels[:] = [theirs.fileno() for _, theirs in pairs]
        code = (
            f"import sys; sys.path[:0] = {[plan.code_root, *plan.package_paths]!r}; "
            "from services.tool.sandbox.launcher import main; main()"
        )
        process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=ENVIRONMENT,
            cwd="/",
            pass_fds=plan.channels,
            start_new_session=True,
        )
        assert process.stdin is not None
        process.stdin.write(plan.to_json().encode())
        process.stdin.close()
        zygotes = {}
        for preset, (ours, theirs) in zip(plan.presets, pairs, strict=True):
            theirs.close()
            ours.setblocking(False)
            zygotes[preset] = ZygoteHandle(
                preset=preset,
                link=ours,
                target=warm_slots,
                on_lost=on_lost,
                ready=loop.create_future(),
            )
            zygotes[preset].listen()
        return cls(process=process, zygotes=zygotes)

    def stop(self) -> None:
        """Kill the launcher: its children die with it. Waits for the process, which is instant."""
        if not self.alive:
            return
        self.alive = False
        for zygote in self.zygotes.values():
            zygote.close()
        self.process.kill()
        self.process.wait()
