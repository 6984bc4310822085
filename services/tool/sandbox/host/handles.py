"""The API process's end of the sandbox: one handle per launcher, zygote and slot.

    LauncherHandle  the process; its death ends every zygote below it (launcher_handle.py)
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
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from services.tool.sandbox import channel, wire
from services.tool.sandbox.host.cgroups import Cgroups, SlotCgroup

logger = logging.getLogger(__name__)

_DESCRIPTORS_PER_SLOT = 5


class ZygoteLostError(ConnectionError):
    """The zygote died before it could hand out a slot: nothing ran, another one may be asked."""


class SlotFailedError(RuntimeError):
    """A fence could not be put up. The snippet never ran and is not run behind fewer fences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitFacts:
    """What the kernel says about the end of a slot's first process."""

    status: int = 0
    """Wait status as of wait4."""
    cpu_s: float = 0.0
    peak_bytes: int = 0
    memory: bool = False
    """Whether the watchdog or its cgroup killed it for its memory."""
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
    cgroup: SlotCgroup | None
    """None where the watchdog counts its memory."""
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

    def limit_memory(self, limit_bytes: int) -> None:
        """Tell the kernel, where it counts, before the program starts. Raises OSError."""
        if self.cgroup is not None and not self.exited.done():
            self.cgroup.limit_memory(limit_bytes)

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
    cgroups: Cgroups | None
    on_lost: Callable[[], None]
    ready: asyncio.Future[int]
    """Done when it forks; the ranges of its memory that huge pages back."""
    ordered: int = 0
    """Slots asked for and not there yet."""
    slots: dict[int, SlotHandle] = field(default_factory=dict)
    """Live slots by number, whether waiting, running or serving a session."""
    warm: deque[SlotHandle] = field(default_factory=deque)
    waiters: deque[asyncio.Future[SlotHandle]] = field(default_factory=deque)
    joining: dict[int, SlotCgroup] = field(default_factory=dict)
    """Cgroups of the slots that were asked for and are not there yet, by number."""
    num_ordered: int = 0
    """Slots ever asked for, which numbers the next one."""
    alive: bool = True

    def listen(self) -> None:
        asyncio.get_running_loop().add_reader(self.link.fileno(), self._on_packet)

    def refill(self) -> None:
        """Order the slots that are missing. Not called when one is handed out but when its program
        has ended or its session is open: a fork would delay what just started."""
        while self.alive and len(self.warm) + self.ordered < self.target + len(self.waiters):
            self.ordered += 1
            try:
                self._order_slot()
            except OSError as error:
                logger.error("no slot can be made: %s", error)
                self.ordered -= 1
                self._fail_waiter(SlotFailedError(f"the sandbox could not make a slot: {error}"))
                return

    def watch(self, slot: SlotHandle, limit_bytes: int) -> None:
        """Ask the zygote to watch the memory of a slot that has been running for a while, unless
        its cgroup does; 0 ends it.
        """
        if self.alive and slot.cgroup is None:
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
        for cgroup in self.joining.values():
            self._give_back(cgroup)
        if not self.ready.done():
            self.ready.set_exception(error)
            self.ready.exception()  # retrieved: a caller that gave up must not cause a warning

    def _order_slot(self) -> None:
        """Order one slot, with the way into its cgroup where there are cgroups. Raises OSError."""
        number = self.num_ordered
        self.num_ordered += 1
        if self.cgroups is None:
            self._order(channel.SPAWN, number)
            return
        self.joining[number] = cgroup = self.cgroups.take()
        try:
            way_in = cgroup.open()
        except OSError:
            self._give_back(self.joining.pop(number))
            raise
        self._order(channel.SPAWN, number, descriptors=[way_in])
        os.close(way_in)

    def _order(
        self, kind: bytes, slot: int = 0, limit_bytes: int = 0, descriptors: Sequence[int] = ()
    ) -> None:
        try:
            socket.send_fds(self.link, [channel.ORDER.pack(kind, slot, limit_bytes)], descriptors)
        except OSError:
            self.on_lost()

    def _give_back(self, cgroup: SlotCgroup | None) -> None:
        if self.cgroups is not None and cgroup is not None:
            self.cgroups.give_back(cgroup)

    def _on_packet(self) -> None:
        while self.alive:
            try:
                data, descriptors, _, _ = socket.recv_fds(
                    self.link, channel.EVENT.size, _DESCRIPTORS_PER_SLOT
                )
            except BlockingIOError:
                return
            except OSError:
                data, descriptors = b"", []
            # Where this process has none left, descriptors do not arrive and cannot be asked again.
            missed = data[:1] == channel.SLOT and len(descriptors) < _DESCRIPTORS_PER_SLOT
            if not data or missed:
                for descriptor in descriptors:
                    os.close(descriptor)
                self.on_lost()
                return
            self._on_event(channel.Event(*channel.EVENT.unpack(data)), descriptors)

    def _on_event(self, event: channel.Event, descriptors: list[int]) -> None:
        if event.kind == channel.READY:
            self.ready.set_result(event.slot)
        elif event.kind == channel.SLOT:
            self._adopt(event.slot, descriptors)
        elif event.slot in self.slots:
            slot = self.slots[event.slot]
            self._finish(slot, _exit_facts(event, slot.cgroup))

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
            cgroup=self.joining.pop(number, None),
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
        if self.slots.pop(slot.number, None) is not None:
            self._give_back(slot.cgroup)
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


def _exit_facts(event: channel.Event, cgroup: SlotCgroup | None) -> ExitFacts:
    """What the zygote was told by wait4, and what the cgroup knows of all processes together."""
    memory, peak_bytes = event.memory, event.peak_bytes
    if cgroup is not None:
        try:
            memory, peak_bytes = cgroup.out_of_memory(), max(peak_bytes, cgroup.peak_bytes())
        except OSError as error:  # no descriptors left; the slot ended all the same
            logger.error("%s cannot be read: %s", cgroup.folder, error)
    return ExitFacts(status=event.status, cpu_s=event.cpu_s, peak_bytes=peak_bytes, memory=memory)
